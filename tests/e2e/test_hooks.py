"""`--hooks`: what a module hears of a real cluster's life, and that it can do it no harm."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import clusterserve
from clusterserve import Cluster, SettingsError
from tests.helpers.server import Serve, run
from tests.helpers.waiting import DEADLINE, eventually

HOOKS = "tests.helpers.hooks"
FULL = "tests.helpers.apps.full:app"
EXAMPLE = "examples.asgi_app:app"


class Note(NamedTuple):
    name: str
    worker: list[int] | None
    details: list[Any]
    where: list[Any]


class Notes:
    """What the hooks have written down."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.env = {"HOOKS_FILE": str(path)}

    @property
    def all(self) -> list[Note]:
        text = self._path.read_text() if self._path.exists() else ""
        return [Note(*json.loads(line)) for line in text.splitlines()]

    def of(self, worker: int) -> list[Note]:
        return [note for note in self.all if note.worker is not None and note.worker[0] == worker]

    def names(self, worker: int | None = None) -> list[str]:
        return [note.name for note in (self.all if worker is None else self.of(worker))]

    def wait_for(self, name: str, count: int = 1) -> None:
        eventually(lambda: self.names().count(name) >= count, f"{count} times {name}; {self.names()}")


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def test_a_whole_life(serve: Serve, notes: Notes) -> None:
    server = serve("--hooks", HOOKS, app=FULL, workers=2, env=notes.env, noise=True)
    notes.wait_for("ready")
    # The garbage collector leaves alone what is there from the beginning: this process is the master's alone.
    assert [note.details for note in notes.all if note.name == "ready"] == [[True]]
    workers = {worker.id: [worker.id, worker.slot, worker.pid] for worker in server.workers}
    for id, named in workers.items():
        assert notes.names(id) == ["fork", "online", "listening"]
        assert [note.worker for note in notes.of(id)] == [named] * 3
        assert notes.of(id)[2].details == [server.url]
    # A crash, and a hook that raises because of it.
    with server.connect() as client:
        client.send(b"GET /crash?code=7 HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(r"Worker 3 .*listening")
    notes.wait_for("exit")
    ((worker, *_),) = [note.worker for note in notes.all if note.name == "exit" and note.worker]
    assert notes.names(worker) == ["fork", "online", "listening", "disconnect", "exit"]
    assert notes.of(worker)[-1].details == [7, None]
    assert len(server.wait_for("RuntimeError: the hook's own trouble")) == 1
    assert len(server.found(r"ERROR: +on_exit of tests.helpers.hooks raised")) == 1
    server.signal(signal.SIGTTOU)
    notes.wait_for("exit", 2)
    server.signal(signal.SIGHUP)
    notes.wait_for("exit", 3)
    last = server.wait_for(r"Worker 4 .*listening") and 4
    os.kill(server.workers[0].pid, signal.SIGKILL)
    notes.wait_for("exit", 4)
    assert notes.of(last)[-1].details == [None, 9]
    server.wait_for(r"Worker 5 .*listening")
    assert server.stop() == 0
    # All of it was heard when the master ended.
    assert notes.names(5) == ["fork", "online", "listening", "draining", "disconnect", "exit"]
    assert [note.name for note in notes.all if note.worker is None] == [
        "ready", "scale", "reload", "shutdown", "stopped"
    ]  # fmt: skip
    assert notes.names()[-1] == "stopped"
    assert next(note.details for note in notes.all if note.name == "scale") == [1, 2]
    # In the master's process, and all on one thread.
    assert {tuple(note.where) for note in notes.all} == {(server.pid, "clusterserve-events")}


def test_what_the_master_kills(serve: Serve, notes: Notes) -> None:
    server = serve(
        "--hooks", HOOKS, "--timeout-boot", "1", app="tests.helpers.apps.hangs:app", env=notes.env, ready=False
    )
    assert server.wait() == 3
    # On a busy machine a fresh interpreter may not even have come online in that time.
    events = [note for note in notes.all if note.name != "online"]
    assert [note.name for note in events] == ["fork", "kill", "disconnect", "exit", "stopped"]
    assert events[1].details == ["it did not listen within 1 s"]
    assert events[3].details == [None, 9]


def test_a_hook_that_blocks_keeps_nobody_from_anything(serve: Serve) -> None:
    server = serve("--hooks", "tests.helpers.hooks_block", workers=2)
    server.wait_for("The hook blocks")
    assert [server.get("/").status for _ in range(4)] == [200] * 4
    server.signal(signal.SIGHUP)
    server.wait_for(r"Worker \d .*listening", count=4)
    began = time.monotonic()
    server.terminate()
    server.terminate()
    assert server.wait() == 0
    assert time.monotonic() - began < DEADLINE
    server.wait_for(r"on_ready of tests.helpers.hooks_block did not return within 5 s and is left behind")


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ("no_such_module", "cannot be imported: No module named 'no_such_module'"),
        ("tests.helpers.apps.raises", "cannot be imported: RuntimeError"),
        ("tests.helpers.waiting", "have none of the functions on_fork"),
        ("a:b", "must be the name of a module"),
    ],
)
def test_a_module_that_cannot_be_used_costs_one_line(hooks: str, reason: str) -> None:
    finished = run(EXAMPLE, "--bind", "127.0.0.1:0", "--workers", "1", "--hooks", hooks)
    assert finished.code == 2
    (line,) = finished.text.splitlines()
    assert line.startswith("clusterserve: error: ")
    assert reason in line


def test_in_a_program(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKS_FILE", notes.env["HOOKS_FILE"])
    with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0", hooks=HOOKS) as cluster:
        assert notes.names(1)[:1] == ["fork"]
        cluster.scale(2)
    # All of it was heard when `with` is over.
    assert notes.names()[-1] == "stopped"
    assert notes.names(2) == ["fork", "online", "listening", "draining", "disconnect", "exit"]
    assert {note.where[0] for note in notes.all} == {os.getpid()}
    # What the program has made is the garbage collector's as before.
    assert [note.details for note in notes.all if note.name == "ready"] == [[False]]
    with (
        pytest.raises(SettingsError, match=r"^the hooks 'no_such_module' cannot be imported"),
        Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0", hooks="no_such_module"),
    ):
        raise AssertionError("it has started")
    with pytest.raises(SettingsError, match=r"^the hooks 'no_such_module' cannot be imported"):
        clusterserve.run(EXAMPLE, workers=1, bind="127.0.0.1:0", hooks="no_such_module")
