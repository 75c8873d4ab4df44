"""A worker whose event loop stands still writes its stacks, and is killed and replaced; nobody else is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import pytest

from tests.helpers import proc
from tests.helpers.raw import request
from tests.helpers.server import WORKER_LISTENS, Serve, Server, Worker
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"
HUNG = r"Worker {0.id} \(slot {0.slot}, pid {0.pid}\) is hung: its event loop has not turned for {1} s"
#: Of the least that a busy machine can keep: whoever is not hung must not be taken for it.
TIMEOUT = "3"

MODES = pytest.mark.parametrize(
    "mode",
    [("--dispatch", "auto"), ("--dispatch", "connection"), ("--dispatch", "request"), ("--policy", "none")],
    ids=["auto", "connection", "request", "none"],
)


def passes(seconds: float) -> None:
    """Time does; for those who show by nothing that nothing happens."""
    end = time.monotonic() + seconds
    eventually(lambda: time.monotonic() >= end, f"{seconds} s pass")


def replaced(server: Server, victim: Worker) -> None:
    """Its slot has another worker, and nobody else was replaced."""
    server.wait_for(WORKER_LISTENS, count=server.wanted_workers + 1)
    assert not proc.alive(victim.pid)
    assert server.announced[-1].slot == victim.slot
    assert len(server.found("is hung")) == 1


@MODES
def test_a_handler_that_holds_the_loop(serve: Serve, mode: tuple[str, str]) -> None:
    """Its siblings serve meanwhile."""
    server = serve(*mode, "--timeout", TIMEOUT, app=FULL, workers=2)
    with server.connect() as client:
        began = time.monotonic()
        client.send(request("GET", "/hold"))
        (held,) = server.wait_for(r"Holding the event loop of pid (\d+)")
        victim = next(worker for worker in server.workers if worker.pid == int(held[1]))

        def is_told() -> list[re.Match[str]]:
            assert server.get("/whoami").json()["pid"] != victim.pid
            return server.found(HUNG.format(victim, TIMEOUT))

        (told,) = eventually(is_told, "it is told")
        # Less what its last heartbeat before that may have been late.
        assert time.monotonic() - began >= float(TIMEOUT) - 1.0
        # Which line held it: told where everything else is.
        server.wait_for(rf"ERROR: +Worker {victim.id} \(slot {victim.slot}, pid {victim.pid}\), its stacks at the end:")
        server.wait_for(r'full\.py", line \d+ in hold')
        server.wait_for(rf"Worker {victim.id} \(.* was killed by SIGABRT")
        if mode[1] == "request":
            assert client.response().status == 504
            server.wait_for(r'127.0.0.1:\d+ - "- - HTTP/1.1" 504 Gateway Timeout')
        else:
            with contextlib.suppress(ConnectionResetError):
                assert client.rest()[:12] in (b"", b"HTTP/1.1 504")
        replaced(server, victim)
    assert told[0].startswith("Worker")
    server.warm()
    assert server.get("/").status == 200


def test_a_worker_that_is_stopped_and_an_end_while_one_is(serve: Serve) -> None:
    server = serve("--timeout", TIMEOUT, workers=2)
    victim = server.workers[1]
    os.kill(victim.pid, signal.SIGSTOP)
    server.wait_for(HUNG.format(victim, TIMEOUT))
    # It cannot write its stacks.
    server.wait_for(rf"Worker {victim.id} \(pid {victim.pid}\) is killed: it was hung, and did not die of SIGABRT")
    replaced(server, victim)
    other = server.workers[0]
    os.kill(other.pid, signal.SIGSTOP)
    server.wait_for(HUNG.format(other, TIMEOUT))
    assert server.stop() == 0


def test_several_at_once(serve: Serve) -> None:
    server = serve("--timeout", TIMEOUT, workers=2)
    for worker in server.workers:
        os.kill(worker.pid, signal.SIGSTOP)
    server.wait_for(WORKER_LISTENS, count=4)
    server.warm()
    assert [worker.slot for worker in server.workers] == [0, 1]


def test_a_handler_that_holds_the_loop_for_a_while_is_waited_for(serve: Serve) -> None:
    server = serve("--timeout", TIMEOUT, workers=1)
    for _ in range(2):
        # A heartbeat may have been due when it began, and a busy machine adds to it.
        assert server.get(f"/block?ms={int(TIMEOUT) * 1000 - 1000}").status == 200
    assert server.ask_id() == 1
    assert not server.found("is hung")


def test_zero_waits_for_ever(serve: Serve) -> None:
    server = serve("-t", "0", workers=2)
    with server.stopped_workers():
        passes(1.5)
    assert server.ask_id() in (1, 2)
    assert not server.found("is hung")


@pytest.mark.parametrize("who", ["the master", "everybody"])
def test_who_sleeps_hears_nothing_and_judges_nobody(serve: Serve, who: str) -> None:
    """1. The master (or all of it: a suspended machine, a frozen container) stands still for longer than the timeout.
    2. It goes on.  Result: no worker was hung.
    """
    server = serve("--timeout", "2", workers=2)
    pids = [server.pid] + ([worker.pid for worker in server.workers] if who == "everybody" else [])
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda pid=pid: proc.state(pid) == "T", f"{pid} is stopped")  # type: ignore[misc]
        passes(3.0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    passes(3.0)
    assert server.get("/").status == 200
    assert not server.found("is hung")
    assert [worker.id for worker in server.workers] == [1, 2]


def test_who_boots_has_a_time_of_its_own(serve: Serve) -> None:
    # The application's import takes longer than it may be silent later on.
    server = serve("--timeout", "2", app="tests.helpers.apps.slow:app", workers=1)
    # It sleeps for 3 s, less what these tests may be late in reading that it began.
    assert server.times(WORKER_LISTENS)[0] - server.times("Serving")[0] >= 2.0
    assert not server.found("is hung")
    assert server.get("/").status == 200


def test_who_leaves_has_a_time_of_its_own(serve: Serve) -> None:
    server = serve("--timeout", TIMEOUT, workers=1)
    with server.connect() as client:
        client.send(request("GET", f"/block?ms={int(TIMEOUT) * 1000 + 1000}"))
        # What was sent before is served, and from now on the worker is one that leaves.
        server.terminate()
        assert client.response().status == 200
    assert server.wait() == 0
    assert not server.found("is hung|killed")
