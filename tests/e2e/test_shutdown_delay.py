"""Told to stop, the cluster serves on for a while, and its application knows; and who a worker's application is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.test_systemd import NotifySocket
from tests.helpers.raw import request
from tests.helpers.server import Serve, Server
from tests.helpers.waiting import eventually

READY = "tests.helpers.apps.ready:app"
#: So long that only those stops are over within a test's time that do not wait for it.
LONG = ("--shutdown-delay", "600")


def told_to_stop(server: Server, number: signal.Signals = signal.SIGTERM) -> None:
    server.signal(number)
    server.wait_for("Told to stop: serving on for 600 s")
    eventually(lambda: server.get("/").status == 503, "a worker knows")


def test_it_serves_on_and_says_no(serve: Serve, tmp_path: Path) -> None:
    systemd = NotifySocket(str(tmp_path / "notify"))
    server = serve(
        *("--shutdown-delay", "3", "--timeout-keep-alive", "60"),
        app=READY,
        workers=2,
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
    )
    with server.connect() as kept:
        kept.send(request("GET", "/"))
        assert kept.response().json()["stopping"] is False
        began = time.monotonic()
        server.terminate()
        systemd.wait_for(lambda message: "STOPPING" in message)
        # Somebody who was there, and somebody new.
        eventually(lambda: server.get("/").status == 503, "a worker knows")
        kept.send(request("GET", "/"))
        answer = kept.response()
        assert (answer.status, answer.json()["draining"]) == (503, False)
        # Once more is no hurry.
        server.terminate()
        server.signal(signal.SIGHUP)
        server.wait_for("SIGHUP: nothing is reloaded, this master is stopping")
        assert server.wait() == 0
    assert time.monotonic() - began >= 3
    systemd.close()


def test_whoever_starts_meanwhile_knows_it_too(serve: Serve) -> None:
    server = serve(*LONG, app=READY)
    told_to_stop(server)
    died = server.workers[0].pid
    os.kill(died, signal.SIGKILL)
    server.wait_for("is listening", count=2)
    answer = server.get("/")
    assert (answer.status, answer.json()["slot"], answer.json()["worker"]) == (503, 0, 2)
    assert answer.json()["variable"] == "0"
    # A reload is over, however it is ordered.
    server.signal(signal.SIGHUP)
    server.interrupt()
    assert server.wait() == 0
    assert not server.found("Reloading")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM, signal.SIGINT), 0),
        ((signal.SIGTERM, signal.SIGQUIT), 131),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
    ids=["TERM-INT", "TERM-QUIT", "INT-INT"],
)
def test_who_is_in_a_hurry(serve: Serve, signals: tuple[signal.Signals, signal.Signals], code: int) -> None:
    server = serve(*LONG, app=READY)
    told_to_stop(server, signals[0])
    server.signal(signals[1])
    assert server.wait() == code


def test_nobody_waits_for_a_start_that_is_given_up(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    server = serve(*LONG, app="tests.helpers.apps.gated:app", ready=False, env={"GATE_FILE": str(gate)})
    server.wait_for("waits at the gate")
    server.terminate()
    assert server.wait() == 143


def test_a_slot_is_its_replacements(serve: Serve) -> None:
    server = serve(app=READY, workers=2)
    seen: dict[int, tuple[int, str]] = {}

    def ask() -> dict[int, tuple[int, str]]:
        answer = server.get("/").json()
        seen[answer["worker"]] = (answer["slot"], answer["variable"])
        return seen

    eventually(lambda: len(ask()) == 2, "both have answered")
    assert seen == {1: (0, "0"), 2: (1, "1")}
    os.kill(server.workers[0].pid, signal.SIGKILL)
    eventually(lambda: ask().get(3), "the replacement has answered")
    assert seen[3] == (0, "0")
