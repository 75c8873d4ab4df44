"""`run` inside this very process.  What a command line sees of it is tests/e2e's business."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterserve
from clusterserve import BindError, BootError, SettingsError
from tests.helpers.waiting import eventually

APP = """
async def app(scope, receive, send):
    await receive()
"""

NUMBERS = [
    getattr(signal, f"SIG{name}")
    for name in ("INT", "TERM", "QUIT", "HUP", "USR1", "USR2", "TTIN", "TTOU", "PWR", "WINCH")
]

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """No signal of these tests ends the test run, whatever goes wrong."""
    before = {number: signal.signal(number, lambda number, frame: None) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    """Runs an application, and what its test wants to happen as soon as it serves."""
    caplog.set_level(logging.INFO, logger="clusterserve")
    monkeypatch.setattr(sys, "path", sys.path[:])
    logger = logging.getLogger("clusterserve")
    handlers, propagate = logger.handlers[:], logger.propagate

    def run_one(then: Callable[[], object] | None, source: str = APP, **settings: Any) -> int:
        (tmp_path / "run_app.py").write_text(source)
        options: dict[str, Any] = {"app_dir": str(tmp_path), "bind": "127.0.0.1:0", "workers": 1, "lifespan": "off"}

        def when_it_serves() -> None:
            eventually(lambda: any("is listening" in message for message in caplog.messages), "it serves")
            assert then is not None
            then()

        thread = threading.Thread(target=when_it_serves) if then is not None else None
        if thread is not None:
            thread.start()
        try:
            return clusterserve.run("run_app:app", **(options | settings))
        finally:
            if thread is not None:
                thread.join()

    yield run_one
    logger.handlers[:], logger.propagate = handlers, propagate


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_it_returns_0_when_it_is_told_to_end(run: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert run(lambda: send(signal.SIGTERM)) == 0
    assert caplog.messages[-1] == f"Stopped, master process {os.getpid()}"
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize("ends", ["in order", "in failure"])
def test_the_programs_own_handlers_are_back(run: Run, ends: str) -> None:
    heard: list[int] = []
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: heard.append(number))
    before = [signal.getsignal(number) for number in NUMBERS]
    if ends == "in order":
        assert run(lambda: send(signal.SIGTERM)) == 0
    else:
        with pytest.raises(BootError):
            run(None, "raise RuntimeError('its own trouble')")
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(NUMBERS)
    send(signal.SIGTERM)
    eventually(lambda: heard == [signal.SIGTERM], "the program hears it")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGQUIT, 131)])
def test_it_returns_what_says_that_it_was_forced(
    run: Run, caplog: pytest.LogCaptureFixture, number: int, code: int
) -> None:
    def insist() -> None:
        send(number)
        # The kernel may make one of two equal signals.
        eventually(lambda: any("Stopping" in message for message in caplog.messages), "the first has been heard")
        send(number)

    assert run(insist) == code


def test_the_first_forced_end_counts(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def both() -> None:
        send(signal.SIGQUIT)
        eventually(lambda: any("Stopping" in message for message in caplog.messages), "the first has been heard")
        send(signal.SIGINT)
        send(signal.SIGINT)

    assert run(both) == 131


def test_a_terminal_that_is_resized_is_nothing_to_speak_of(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    def resize() -> None:
        said.extend(caplog.messages)
        send(signal.SIGWINCH, signal.SIGTERM)

    assert run(resize) == 0
    assert [each.split()[0] for each in caplog.messages[len(said) :]][:1] == ["Stopping"]


def test_what_it_raises(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BootError, match="its own trouble"):
        run(None, "raise RuntimeError('its own trouble')")
    with pytest.raises(SettingsError, match="leest"):
        run(None, policy="leest")
    with pytest.raises(SettingsError, match="nowhere_at_all"):
        run(None, policy="nowhere_at_all:Policy")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(BindError, match="already in use"):
        run(None, bind=f"127.0.0.1:{other.getsockname()[1]}")


def test_a_policy_beside_the_application(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run_policy.py").write_text("from clusterserve.core.policies import Least as Mine")
    assert run(lambda: send(signal.SIGTERM), policy="run_policy:Mine") == 0
    assert any("policy run_policy:Mine" in message for message in caplog.messages)


def test_its_errors_name_the_policy_that_is_not_there(run: Run) -> None:
    with pytest.raises(SettingsError, match="no policy 'Other'"):
        run(None, policy="clusterserve.core.policies:Other")
