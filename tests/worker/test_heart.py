"""The heartbeat of a real worker, and what is left to see when it stops."""

from __future__ import annotations

import contextlib
import select
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from clusterserve.core.messages import Beat, Online
from tests.helpers.raw import request
from tests.helpers.waiting import eventually
from tests.worker.remote import Worker, settings, starting

APP = "tests.worker.apps:app"


@contextlib.contextmanager
def serving(environment: Mapping[str, str] | None = None, **values: Any) -> Any:
    with starting(environment) as worker:
        worker.boot(settings(APP, **values))
        worker.expect(Online)
        worker.grant()
        yield worker


def says_more(worker: Worker, seconds: float) -> bool:
    """Whether a message comes within this time."""
    return bool(select.select([worker.channel], [], [], seconds)[0])


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("dispatch", ["connection", "request"])
def test_it_tells_how_many_requests_were_served(http: str, dispatch: str) -> None:
    with serving(timeout=0.2, http=http, dispatch=dispatch) as worker:
        assert worker.expect(Beat) == Beat(0)
        for _ in range(3):
            worker.get("/me")
        eventually(lambda: worker.expect(Beat) == Beat(3), "three were counted")


def test_it_beats_for_the_count_alone() -> None:
    with serving(limit_max_requests=100) as worker:
        assert worker.expect(Beat) == Beat(0)


def test_nobody_wants_to_know() -> None:
    with serving() as worker:
        assert not says_more(worker, 1.5)


def test_it_comes_from_the_loop_and_from_no_thread() -> None:
    with serving(timeout=0.2) as worker:
        worker.expect(Beat)
        with worker.hand(request("GET", "/block")):
            eventually(lambda: not says_more(worker, 1.5) or worker.expect(Beat) is None, "it falls silent")
            worker.process.send_signal(signal.SIGABRT)
            code, err = worker.ends()
        told = worker.stacks()
    assert code == -signal.SIGABRT
    assert told.startswith("Fatal Python error: Aborted")
    assert "in block" in told
    assert "Thread 0x" in told or "Current thread" in told
    # The master logs them.
    assert "in block" not in err


def test_who_wants_stacks_on_stderr_has_them_there() -> None:
    with serving(environment={"PYTHONFAULTHANDLER": "1"}) as worker:
        worker.process.send_signal(signal.SIGSEGV)
        assert "Fatal Python error: Segmentation fault" in worker.ends()[1]
        assert worker.stacks() == ""


def test_it_goes_on_while_the_worker_drains() -> None:
    with serving(timeout=0.2) as worker:
        with worker.hand(request("GET", "/wait")):
            worker.expect(Beat)
            worker.drain(10.0)
            eventually(lambda: isinstance(worker.next(), Beat), "another one")
            worker.drain(1.0, quick=True)
        worker.goodbye()
        assert worker.ends()[0] == 0


def test_every_thread_is_shown() -> None:
    with serving(timeout=0) as worker, worker.hand(request("GET", "/threads")):
        eventually(lambda: worker.get("/count_threads") >= 2, "a second thread runs")
        worker.process.send_signal(signal.SIGABRT)
        worker.ends()
        told = worker.stacks()
    assert "in in_a_thread" in told
    assert "Current thread" in told
