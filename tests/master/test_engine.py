"""The engine on a loop of the test's own, with real worker processes that serve small applications."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve.core.events import Event, Exited, Forked, Scaled, StartedListening, WasKilled, WorkerName
from clusterserve.core.lifecycle import WorkerState
from clusterserve.core.messages import Listening, Online, encode
from clusterserve.core.reconcile import Stop
from clusterserve.environment import Environment
from clusterserve.errors import BindError, BootError, SettingsError
from clusterserve.master.answers import BAD_GATEWAY
from clusterserve.master.dispatcher import Dispatcher
from clusterserve.master.ending import LISTENER_LINGER
from clusterserve.master.engine import Engine
from clusterserve.settings import Settings
from clusterserve.surroundings import Surroundings
from tests.helpers import proc
from tests.helpers.waiting import DEADLINE, eventually

from .rig import SkewedLoop, readable

#: Every request's path names what to do; the answer is "PID SLOT".
HELLO = """
    import asyncio, os, socket, stat, sys, time

    # Before there is an event loop these are the only two.
    CHANNELS = {}
    for number in range(3, 100):
        if os.path.exists(f"/proc/self/fd/{number}") and stat.S_ISSOCK(os.fstat(number).st_mode):
            sock = socket.socket(fileno=number)
            CHANNELS[sock.type] = sock.detach()

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        what, _, value = scope["path"][1:].partition("/")
        if what == "exit":
            os._exit(int(value))
        elif what == "block":
            open(value + ".reached", "w").close()
            while not os.path.exists(value):
                time.sleep(0.002)
        elif what == "wait":
            while not os.path.exists(value):
                await asyncio.sleep(0.002)
        elif what == "begin":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            await asyncio.Event().wait()
        elif what == "answer":
            os.write(CHANNELS[socket.SOCK_SEQPACKET], bytes.fromhex(value))
        elif what == "say":
            os.write(CHANNELS[socket.SOCK_STREAM], bytes.fromhex(value))
        elif what == "hang-up":
            os.close(CHANNELS[socket.SOCK_STREAM])
            time.sleep(60)
        body = f"{os.getpid()} {os.environ['CLUSTERSERVE_WORKER_SLOT']}".encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
"""


class Running:
    """An engine, its loop, and a client for it."""

    def __init__(self, loop: SkewedLoop, settings: Settings) -> None:
        self.loop = loop
        #: Everything that was told.
        self.events: list[Event] = []
        self.engine = Engine(settings, loop, self.events.append)
        self._clients = contextlib.ExitStack()

    def settle(self) -> Running:
        self.engine.start()
        self.loop.until(lambda: self.engine.settled.done() or self.engine.finished.done(), "it settles")
        assert self.engine.settled.done(), self.engine.finished.result()
        return self

    def fail(self, *, started: bool = False) -> BootError:
        """Start, and expect that it never serves."""
        if not started:
            self.engine.start()
        self.loop.until(self.engine.finished.done, "it fails")
        assert not self.engine.settled.done()
        error = self.engine.finished.result()
        assert isinstance(error, BootError)
        assert self.engine.seats == {}
        return error

    def finish(self) -> None:
        """Run until it is over, which must be no failure."""
        self.loop.until(self.engine.finished.done, "it is over")
        assert self.engine.finished.result() is None
        assert self.engine.seats == {}

    def close(self) -> None:
        self._clients.close()
        if not self.engine.finished.done():
            self.engine.stop(Stop.QUICK)
            for _, _, pid, _ in self.engine.states():
                # Their own end takes a while, and is other tests' business.
                os.kill(pid, signal.SIGKILL)
            self.loop.until(self.engine.finished.done, "it is over")

    # ── looking in ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def ids(self) -> list[int]:
        return [id for id, _, _, _ in self.engine.states()]

    def told(self, id: int) -> list[str]:
        """The names of the events about this worker, in order."""
        return [event.name for event in self.events if getattr(event, "worker", None) and event.worker.id == id]

    def pid(self, id: int) -> int:
        return {id: pid for id, _, pid, _ in self.engine.states()}[id]

    def until_listening(self, *ids: int) -> None:
        """Run until these workers and no others are there, and listen."""
        wanted = [(id, WorkerState.LISTENING) for id in ids]
        self.loop.until(
            lambda: sorted((id, state) for id, _, _, state in self.engine.states()) == wanted if wanted else True,
            f"workers {ids} listen",
        )

    def kill(self, id: int, number: int = signal.SIGKILL) -> None:
        """Signal a worker, and run until the engine knows of its end."""
        os.kill(self.pid(id), number)
        self.loop.until(lambda: id not in self.ids, f"worker {id} is gone")

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, path: str = "/") -> socket.socket:
        """A client that has sent a request."""
        (listener,) = (each for each in self.engine.handles if each.pinned)
        client = self._clients.enter_context(socket.socket(listener.family))
        client.settimeout(DEADLINE)
        name = listener.sockname
        client.connect(tuple(name[:2]) if isinstance(name, list) else name)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        return client

    def block(self, flag: Path) -> socket.socket:
        """A client whose request holds the loop of its worker until `flag` is there."""
        client = self.connect(f"/block/{flag}")
        self.loop.until(Path(f"{flag}.reached").exists, "its worker is blocked")
        return client

    def answer(self, client: socket.socket) -> bytes:
        """Everything this client still gets; closes it."""
        parts = []
        with client:
            while True:
                self.loop.until(lambda: readable(client), "there is an answer")
                try:
                    parts.append(client.recv(65536))
                except ConnectionResetError:
                    break
                if not parts[-1]:
                    break
        return b"".join(parts)

    def get(self, path: str = "/") -> tuple[int, int]:
        """(pid, slot) of the worker that serves this."""
        head, _, body = self.answer(self.connect(path)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        pid, slot = body.split()
        return int(pid), int(slot)


Make = Callable[..., Running]


@pytest.fixture
def make(loop: SkewedLoop, tmp_path: Path) -> Iterator[Make]:
    """Makes engines for applications given as source text; stops them in the end."""
    made: list[Running] = []

    def make_one(source: str = HELLO, workers: int = 1, **settings: Any) -> Running:
        (tmp_path / "small_app.py").write_text(textwrap.dedent(source))
        options: dict[str, Any] = {
            "app": "small_app:app", "app_dir": str(tmp_path), "bind": "127.0.0.1:0", "lifespan": "off", "ws": "none",
            "http": "httptools", "access_log": False, "restart_backoff": 0.01,
        }  # fmt: skip
        made.append(Running(loop, Settings.create(workers=workers, **(options | settings))))
        return made[-1]

    yield make_one
    for each in made:
        each.close()


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """A file that requests for /wait and /block wait for."""
    return tmp_path / "flag"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """The master's messages of at least this level."""
    caplog.set_level(logging.DEBUG, logger="clusterserve")
    return lambda level: [record.message for record in caplog.records if record.levelno >= level]


Log = Callable[[int], list[str]]


# ── it serves ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_settles_and_serves(make: Make, log: Log) -> None:
    running = make(workers=2).settle()
    states = running.engine.states()
    assert [(id, slot, state) for id, slot, _, state in states] == [
        (1, 0, WorkerState.LISTENING), (2, 1, WorkerState.LISTENING),
    ]  # fmt: skip
    pids = [pid for _, _, pid, _ in states]
    assert sorted(pids) == proc.children(os.getpid())
    served = [running.get() for _ in range(4)]
    assert served[0] != served[1]
    assert served[0] == served[2]
    assert served[1] == served[3]
    assert set(served) == {(pids[0], 0), (pids[1], 1)}
    told = log(logging.INFO)
    assert told[0] == f"Listening on {next(iter(running.engine.handles)).address}"
    assert told[1].startswith("Serving small_app:app with 2 workers (workers), policy rr, dispatch auto, master")
    assert sorted(told[2:]) == [f"Worker {n} (slot {n - 1}, pid {pids[n - 1]}) is listening" for n in (1, 2)]


def test_statistics(make: Make, flag: Path) -> None:
    running = make().settle()
    assert running.engine.statistics().workers == ((1, 0, 0, 0),)
    clients = [running.connect(f"/wait/{flag}") for _ in range(3)]
    running.loop.until(lambda: running.engine.statistics().borrowed == 3, "three are being served")
    assert running.engine.statistics().workers == ((1, 0, 0, 3),)
    flag.touch()
    for client in clients:
        assert b" 200 " in running.answer(client)
    running.loop.until(lambda: running.engine.statistics().borrowed == 0, "they are over")


def test_workers_that_accept_for_themselves(make: Make) -> None:
    running = make(workers=2, policy="none").settle()
    (listener,) = running.engine.handles
    port = int(listener.address.rpartition(":")[2])
    (inode,) = proc.listening_inodes(port)
    assert all(inode in proc.socket_inodes(pid) for _, _, pid, _ in running.engine.states())
    assert running.get()[0] in (running.pid(1), running.pid(2))


def test_what_is_no_text_in_the_path_does_not_matter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere"), b"/nowhere"])
    make().settle().get()


# ── it never serves ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_application_that_cannot_be_imported(make: Make, log: Log) -> None:
    error = make("raise RuntimeError('its own trouble')", workers=3).fail()
    assert "'small_app:app' could not be loaded" in error.args[0]
    assert error.traceback.count("RuntimeError: its own trouble") == 1
    assert error.traceback.count("Traceback") == 1
    assert "small_app.py" in error.traceback
    # Whoever started it tells the story, and once.
    assert log(logging.WARNING) == []


def test_a_module_that_is_not_there(make: Make) -> None:
    error = make(app="no_such_module:app").fail()
    assert 'Could not import module "no_such_module"' in str(error)


def test_a_lifespan_that_fails(make: Make) -> None:
    source = """
        async def app(scope, receive, send):
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "its own trouble"})
    """
    error = make(source, lifespan="on").fail()
    assert error.args[0] == "the application 'small_app:app' could not be started"
    assert "its own trouble" in error.traceback


def test_a_lifespan_that_raises(make: Make) -> None:
    source = """
        async def app(scope, receive, send):
            raise ZeroDivisionError("its own trouble")
    """
    error = make(source, lifespan="on", workers=2).fail()
    assert error.traceback.count("ZeroDivisionError: its own trouble") == 1


ENDLESS = "import threading; threading.Event().wait()"


def test_an_application_that_does_not_come_up_in_time(make: Make) -> None:
    running = make(ENDLESS, timeout_boot=45.0)
    running.engine.start()
    running.loop.until(lambda: running.engine.states()[0][3] is WorkerState.ONLINE, "it is importing")
    running.loop.forward(45.0)
    error = running.fail(started=True)
    assert str(error) == "no worker came to listen: worker 1 was killed, it did not listen within 45 s"


def test_an_application_that_exits(make: Make) -> None:
    error = make("import os; os._exit(7)", workers=2).fail()
    assert str(error) in [f"no worker came to listen: worker {id} exited with code 7" for id in (1, 2)]


def test_a_signal_for_all_of_a_booting_cluster_is_no_failure(make: Make) -> None:
    """The workers are dead of it before the master has read its own."""
    running = make(ENDLESS, workers=2)
    running.engine.start()
    for pid in running.engine.pids():
        os.kill(pid, signal.SIGTERM)
    running.loop.until(lambda: not running.engine.pids(), "they are dead")
    running.engine.stop(Stop.GRACEFUL)
    running.finish()


def test_a_worker_that_somebody_else_has_ended_is_one(make: Make) -> None:
    running = make(ENDLESS)
    running.engine.start()
    os.kill(running.engine.pids()[0], signal.SIGTERM)
    assert str(running.fail(started=True)) == "no worker came to listen: worker 1 was killed by SIGTERM"


def test_no_process_can_be_spawned(make: Make, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    error = make(workers=2).fail()
    assert str(error).startswith("no worker came to listen: worker 2 could not be spawned: ")
    assert len(log(logging.ERROR)) == 2


def test_one_address_of_several_cannot_be_had(make: Make, tmp_path: Path, log: Log) -> None:
    running = make(bind=["127.0.0.1:0", f"unix:{tmp_path}/s", "192.0.2.1:80"])
    with pytest.raises(BindError):
        running.engine.start()
    assert proc.children(os.getpid()) == []
    assert not (tmp_path / "s").exists()
    assert log(logging.INFO) == []
    running.engine.finished.set_result(None)


def test_a_policy_that_cannot_be_had(make: Make) -> None:
    # That nothing is left open is the fixtures' business.
    with pytest.raises(SettingsError, match="nowhere_at_all"):
        make(policy="nowhere_at_all:Policy")


# ── workers die ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dead_worker_is_replaced_in_its_slot(make: Make, log: Log) -> None:
    running = make(workers=2).settle()
    pid = running.pid(1)
    running.kill(1)
    running.until_listening(2, 3)
    assert {(id, slot) for id, slot, _, _ in running.engine.states()} == {(2, 1), (3, 0)}
    assert {running.get()[1] for _ in range(2)} == {0, 1}
    assert f"Worker 1 (slot 0, pid {pid}) was killed by SIGKILL" in log(logging.ERROR)


def test_each_death_in_its_youth_doubles_the_wait(loop: SkewedLoop, make: Make) -> None:
    loop.freeze()
    running = make(restart_backoff=10.0, restart_backoff_max=25.0).settle()
    for id, wait in enumerate((10.0, 20.0, 25.0, 25.0), 1):
        running.until_listening(id)
        running.kill(id)
        running.loop.forward(wait - 5.0)
        running.loop.turn()
        assert running.ids == []
        running.loop.forward(5.0)
        running.loop.until(lambda: running.ids, "the next one is there")
        assert running.ids == [id + 1]


def test_a_worker_that_had_been_well_is_replaced_at_once(loop: SkewedLoop, make: Make) -> None:
    loop.freeze()
    running = make(restart_backoff=10.0).settle()
    running.kill(1)
    running.loop.forward(10.0)
    running.until_listening(2)
    running.loop.forward(2.0)
    running.kill(2)
    # And its slot's past is forgotten.
    running.until_listening(3)


def test_a_broken_sibling_is_tried_again_for_ever(make: Make, log: Log, flag: Path) -> None:
    source = f"""
        import os
        if os.environ["CLUSTERSERVE_WORKER_SLOT"] == "1":
            open("{flag}.tried", "a").write("x")
            if not os.path.exists("{flag}"):
                raise RuntimeError("its own trouble")
    """
    running = make(textwrap.dedent(source) + textwrap.dedent(HELLO), workers=2)
    running.engine.start()
    running.loop.until(
        lambda: any(state is WorkerState.LISTENING for *_, state in running.engine.states()), "one is up"
    )
    tried = Path(f"{flag}.tried")
    running.loop.until(lambda: tried.exists() and len(tried.read_text()) >= 3, "the other was tried three times")
    assert not running.engine.settled.done()
    assert running.get()[1] == 0
    # Nobody else would tell.
    assert any("its own trouble" in message for message in log(logging.ERROR))
    flag.touch()
    running.loop.until(running.engine.settled.done, "it settles")


def test_an_exit_code_of_the_applications_own_means_nothing(make: Make) -> None:
    running = make().settle()
    assert running.answer(running.connect("/exit/3")) == BAD_GATEWAY
    running.until_listening(2)
    running.get()


def test_a_request_in_a_response_that_was_begun_is_cut(make: Make) -> None:
    running = make().settle()
    client = running.connect("/begin")
    running.loop.until(lambda: readable(client), "the response has begun")
    running.kill(1)
    answer = running.answer(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"502" not in answer


def test_a_worker_that_was_told_to_go_is_replaced(make: Make, log: Log) -> None:
    running = make(restart_backoff=10.0).settle()
    running.get()
    running.kill(1, signal.SIGTERM)
    running.until_listening(2)
    # It did as it was told.
    assert log(logging.WARNING) == []


def test_nobody_to_replace_it_with(make: Make, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    running = make().settle()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        running.kill(1)
        running.loop.until(
            lambda: any("could not be spawned" in message for message in log(logging.ERROR)), "it says so"
        )
    # It tries again.
    running.loop.until(lambda: running.ids, "there is a worker again")
    running.until_listening(*running.ids)
    running.get()


@pytest.mark.parametrize("preload", [False, True], ids=["spawned", "forked"])
def test_the_working_directory_is_gone(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preload: bool
) -> None:
    """The application is elsewhere, so nothing is missing; `app_dir` is relative to what was removed."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.chdir(site)
    monkeypatch.syspath_prepend(str(tmp_path))
    running = make(app_dir=".", preload=preload).settle()
    site.rmdir()
    for pid in {*running.engine.pids()} - {running.pid(1)}:
        os.kill(pid, signal.SIGKILL)
        # Or the worker might be ordered of one that is dead.
        running.loop.until(lambda pid=pid: pid not in running.engine.pids(), "its template has gone")
    running.kill(1)
    running.loop.until(lambda: running.ids, "there is a worker again")
    running.until_listening(2)
    running.get()
    running.engine.stop(Stop.GRACEFUL)
    running.finish()


def test_what_no_process_can_be_given_costs_no_other_worker(make: Make, log: Log) -> None:
    """It is no OSError: `Cluster.fork` refuses it, and here it is past that."""
    running = make(max_restarts=1).settle()
    running.engine.fork((("A", "\ud800"),))
    running.loop.until(lambda: len(log(logging.ERROR)) > 1, "it was tried again")
    running.kill(1)
    running.loop.until(lambda: "listening" in running.told(running.ids[0] if running.ids else 0), "it is replaced")
    running.get()
    assert running.told(2) == ["error", "exit"]
    running.engine.stop(Stop.GRACEFUL)
    running.finish()


@pytest.mark.parametrize("preload", [False, True], ids=["spawned", "forked"])
def test_a_worker_that_gets_no_place_is_not_left_behind(
    make: Make, monkeypatch: pytest.MonkeyPatch, log: Log, preload: bool
) -> None:
    """Its process is there, and then something fails.  That nothing of it is left is the fixture's business too."""
    running = make(preload=preload).settle()
    there = len(proc.children(os.getpid())), len(proc.descriptors(os.getpid()))
    failures = 0

    def fails(*details: object) -> None:
        nonlocal failures
        failures += 1
        # With this one: those before it have ended.
        assert len(proc.children(os.getpid())) <= there[0]
        assert len(proc.descriptors(os.getpid())) <= there[1]
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Dispatcher, "add_worker", fails)
        running.kill(1)
        running.loop.until(lambda: failures == 3, "three were tried")
    running.until_listening(5)
    assert [running.told(id) for id in (2, 3, 4)] == [["error", "exit"]] * 3
    running.get()


def test_settings_that_were_never_proved_are_nothing_to_go_back_to(make: Make, tmp_path: Path) -> None:
    """Two changes in a row with which nothing starts: what holds again is what was before the first."""
    running = make().settle()
    engine, settings, here = running.engine, running.engine.settings, Path.cwd()
    changes = []
    for count in (2, 3):
        before = Surroundings(Environment())
        os.chdir(tmp_path if count == 2 else "/")
        engine.adopt(dataclasses.replace(settings, workers=count, app="no_such_module:app"), before)
        changes.append(engine.reload())
    running.loop.until(lambda: all(change.done() for change in changes), "they have failed")
    assert all(isinstance(change.exception(), BootError) for change in changes)
    assert (engine.settings, Path.cwd()) == (settings, here)
    running.until_listening(1)
    # And a change with which something starts is what holds.
    os.chdir(tmp_path)
    good = dataclasses.replace(settings, workers=2)
    engine.adopt(good, Surroundings(Environment()))
    change = engine.reload()
    running.loop.until(change.done, "it is done")
    os.chdir(here)
    assert engine.settings == good
    assert [running.told(id)[-1] for id in running.ids] == ["listening", "listening"]
    assert [event for event in running.events if isinstance(event, Scaled)] == [
        Scaled(2, 1), Scaled(3, 2), Scaled(1, 3), Scaled(2, 1),
    ]  # fmt: skip


# ── hostile workers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("answer/78", "no list of answers"),
        ("say/" + b"\xff".hex() * 20, "cannot be"),
        ("say/" + encode(Online(1)).hex(), "cannot go online"),
        ("say/" + encode(Listening(99)).hex(), "did not ask for"),
    ],
    ids=["garbage answer", "garbage message", "online twice", "unknown listener"],
)
def test_what_a_worker_must_not_say_costs_that_worker(make: Make, log: Log, path: str, words: str) -> None:
    running = make(workers=2, dispatch="connection").settle()
    client = running.connect(f"/{path}")
    running.loop.until(lambda: len(running.ids) == 2 and 3 in running.ids, "the liar is gone, and replaced")
    client.close()
    survivor = min(running.ids)
    running.until_listening(survivor, 3)
    assert {running.get()[0] for _ in range(2)} == {running.pid(survivor), running.pid(3)}
    assert sum(words in message for message in log(logging.ERROR)) == 1


def test_many_lies_are_told_once(make: Make, log: Log) -> None:
    source = HELLO.replace('elif what == "answer":', 'elif what == "lie":\n            for _ in range(50): '
        'os.write(CHANNELS[socket.SOCK_SEQPACKET], b"x")\n        elif what == "answer":')  # fmt: skip
    running = make(source, workers=1).settle()
    running.connect("/lie").close()
    running.until_listening(2)
    assert sum("no list of answers" in message for message in log(logging.ERROR)) == 1


def test_a_lie_of_one_that_fails_to_start(make: Make) -> None:
    source = textwrap.dedent(HELLO) + 'os.write(CHANNELS[socket.SOCK_SEQPACKET], b"x")\nsys.exit(1)'
    error = make(source).fail()
    assert "worker 1 was killed: a message of 1 bytes" in str(error) or "could not be" in str(error)


def test_a_worker_that_hangs_up_is_replaced_and_killed(make: Make, log: Log) -> None:
    running = make().settle()
    pid = running.pid(1)
    client = running.connect("/hang-up")
    running.loop.until(lambda: 2 in running.ids, "it is replaced at once")
    assert proc.alive(pid)
    running.loop.forward(5.0)
    running.until_listening(2)
    assert not proc.alive(pid)
    assert running.answer(client) == BAD_GATEWAY
    assert any("it closed its channel but did not exit" in message for message in log(logging.WARNING))


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(running: Running, address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_graceful_end_serves_what_was_accepted(make: Make, flag: Path, log: Log) -> None:
    running = make(workers=2).settle()
    served = running.connect(f"/wait/{flag}")
    running.loop.until(lambda: running.engine.statistics().borrowed == 1, "it is being served")
    waiting = running.connect()
    address = waiting.getpeername()
    running.engine.stop(Stop.GRACEFUL)
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: refused(running, address), "new clients are refused")
    assert b" 200 " in running.answer(waiting)
    flag.touch()
    assert b" 200 " in running.answer(served)
    running.finish()
    assert log(logging.WARNING) == []
    assert log(logging.INFO).count("Stopping when what was accepted is served") == 1


def test_a_client_in_the_backlog_is_served_at_the_end(make: Make, flag: Path) -> None:
    running = make().settle()
    blocked = running.block(flag)
    # The kernel has them; the master has not seen them yet.
    clients = [running.connect() for _ in range(5)]
    running.engine.stop(Stop.GRACEFUL)
    flag.touch()
    for client in (blocked, *clients):
        assert b" 200 " in running.answer(client)
    running.finish()


def test_a_quick_end_cuts_what_is_served(make: Make, flag: Path) -> None:
    running = make().settle()
    client = running.connect(f"/wait/{flag}")
    running.loop.until(lambda: running.engine.statistics().borrowed == 1, "it is being served")
    running.engine.stop(Stop.QUICK)
    running.finish()
    assert b" 200 " not in running.answer(client)


def test_a_graceful_end_can_be_hurried(make: Make, flag: Path) -> None:
    running = make().settle()
    client = running.connect(f"/wait/{flag}")
    running.loop.until(lambda: running.engine.statistics().borrowed == 1, "it is being served")
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: running.engine.states()[0][3] is WorkerState.DRAINING, "it was told to go")
    running.engine.stop(Stop.QUICK)
    running.finish()
    client.close()
    # A slower way would be no way back.
    running.engine.stop(Stop.GRACEFUL)


def test_who_does_not_finish_in_time_is_killed(make: Make, flag: Path, log: Log) -> None:
    running = make(timeout_graceful_shutdown=30.0).settle()
    client = running.block(flag)
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: running.engine.states()[0][3] is WorkerState.DRAINING, "it was told to go")
    running.loop.forward(30.0)
    running.finish()
    # The client need not wait for what will never come.
    assert running.answer(client) == BAD_GATEWAY
    assert any("it did not finish within" in message for message in log(logging.WARNING))


def test_what_waits_at_the_deadline_is_closed(make: Make, flag: Path) -> None:
    running = make(timeout_graceful_shutdown=30.0).settle()
    blocked = running.block(flag)
    running.loop.until(lambda: running.engine._distributor.workers[1].stalled, "it is stalled")
    waiting = running.connect()
    running.loop.until(lambda: running.engine.statistics().queued == 1, "somebody waits")
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: not running.engine.handles.open, "the listeners are closed")
    assert running.engine.states()[0][3] is WorkerState.LISTENING
    running.loop.forward(30.0)
    running.finish()
    for client in (blocked, waiting):
        assert b" 200 " not in running.answer(client)


def test_a_death_that_empties_the_queue_at_the_end(make: Make, flag: Path) -> None:
    """Round robin waits for a stalled worker's turn; its death is what lets the last client go to another."""
    running = make(workers=2, dispatch="connection").settle()
    loop, engine = running.loop, running.engine
    running.get()
    stalled = running.block(flag)
    loop.until(lambda: any(worker.stalled for worker in engine._distributor.workers.values()), "one is stalled")
    # The other has its turn, and then it is the stalled one's again.
    running.get()
    loop.until(lambda: engine.statistics().borrowed == 0, "that is over")
    (id,) = (worker.id for worker in engine._distributor.workers.values() if worker.stalled)
    engine.stop(Stop.GRACEFUL)
    loop.turn()
    last = running.connect()
    loop.freeze()
    loop.forward(LISTENER_LINGER)
    while engine.handles.open:
        loop.turn()
    assert engine.statistics().queued == 1
    pid = running.pid(id)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: proc.state(pid) == "Z", "it is dead")
    while id in running.ids:
        loop.turn()
    assert engine.statistics().queued == 0
    loop.thaw()
    assert b" 200 " in running.answer(last)
    assert running.answer(stalled) == BAD_GATEWAY
    running.finish()


def test_a_worker_that_dies_at_the_end_is_replaced_for_what_waits(make: Make, flag: Path) -> None:
    running = make().settle()
    running.block(flag).close()
    running.loop.until(lambda: running.engine._distributor.workers[1].stalled, "it is stalled")
    waiting = running.connect()
    running.loop.until(lambda: running.engine.statistics().queued == 1, "somebody waits")
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: not running.engine.handles.open, "the listeners are closed")
    running.kill(1)
    assert b" 200 " in running.answer(waiting)
    running.finish()


def test_what_nobody_is_left_to_serve_is_answered(make: Make) -> None:
    running = make(dispatch="connection").settle()
    (pid,) = running.engine.pids()
    os.kill(pid, signal.SIGSTOP)
    waiting = running.connect()
    # With nobody else to take it, it is not taken back.
    running.loop.until(lambda: running.engine.statistics().offered == 1, "it is offered")
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.loop.until(lambda: not running.engine.handles.open, "the listeners are closed")
    running.kill(1)
    assert b" 503 " in running.answer(waiting)
    running.finish()


@pytest.mark.parametrize("how", [Stop.GRACEFUL, Stop.QUICK])
def test_an_end_before_it_serves(make: Make, how: Stop) -> None:
    running = make(workers=2)
    running.engine.start()
    running.engine.stop(how)
    running.finish()
    assert not running.engine.settled.done()


def test_an_end_while_the_application_is_imported(make: Make) -> None:
    running = make("import threading; threading.Event().wait()")
    running.engine.start()
    running.loop.until(lambda: running.engine.states()[0][3] is WorkerState.ONLINE, "it is importing")
    running.engine.stop(Stop.GRACEFUL)
    running.finish()


def test_an_end_while_nobody_lives(loop: SkewedLoop, make: Make) -> None:
    loop.freeze()
    running = make(restart_backoff=10.0).settle()
    running.kill(1)
    assert running.ids == []
    running.engine.stop(Stop.GRACEFUL)
    running.loop.forward(LISTENER_LINGER)
    running.finish()


# ── listeners of the workers' own ───────────────────────────────────────────────────────────────────────────────────

OWN = """
    import asyncio, os

    async def greet(reader, writer):
        line = await reader.readline()
        if line == b"close\\n":
            server.close()
        elif line == b"exit\\n":
            os._exit(1)
        writer.write(b"%d %s" % (os.getpid(), line))
        writer.close()

    async def app(scope, receive, send):
        global server
        assert scope["type"] == "lifespan"
        await receive()
        server = await asyncio.start_server(greet, HOST, PORT)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
"""


def own(host: str, port: int) -> str:
    return OWN.replace("HOST", repr(host)).replace("PORT", repr(port))


def test_workers_listeners_are_shared_and_go_with_the_last_of_them(make: Make, tmp_path: Path) -> None:
    running = make(own("localhost", 0), workers=2, lifespan="on", bind=f"unix:{tmp_path}/s").settle()
    pinned, theirs = running.engine.handles
    assert (pinned.pinned, theirs.pinned) == (True, False)
    assert len(theirs.workers) == 2
    host, port = theirs.sock.getsockname()
    # What the workers got has no descriptor.
    inodes = proc.listening_inodes(port)
    assert inodes
    assert not any(inodes & proc.socket_inodes(pid) for _, _, pid, _ in running.engine.states())

    def say(line: bytes) -> bytes:
        client = socket.create_connection((host, port))
        client.settimeout(DEADLINE)
        client.sendall(line)
        return running.answer(client)

    # The workers take turns here as well.
    greeted = [say(b"hello\n") for _ in range(4)]
    assert {int(answer.split()[0]) for answer in greeted} == {running.pid(1), running.pid(2)}
    assert all(answer.endswith(b" hello\n") for answer in greeted)
    say(b"close\n")
    running.loop.until(lambda: len(theirs.workers) == 1, "one has closed its server")
    assert say(b"hello\n") == say(b"hello\n")
    assert theirs.is_open
    say(b"close\n")
    running.loop.until(lambda: not theirs.is_open, "the last has closed its server")
    assert pinned.is_open
    with pytest.raises(ConnectionRefusedError):
        say(b"hello\n")


def test_a_server_of_the_applications_own_spelled_like_the_bind(make: Make) -> None:
    """Port 0 twice are two listeners, and each client reaches the server it means."""
    running = make(own("127.0.0.1", 0), lifespan="on", bind="127.0.0.1:0").settle()
    pinned, theirs = running.engine.handles
    assert (pinned.pinned, theirs.pinned) == (True, False)
    for listener, word in ((theirs, b" hello\n"), (pinned, b"HTTP/1.1 ")):
        client = socket.create_connection(listener.sock.getsockname())
        client.settimeout(DEADLINE)
        client.sendall(b"hello\n" if listener is theirs else b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert word in running.answer(client)


def test_a_listener_survives_the_crash_of_its_last_worker(make: Make, tmp_path: Path) -> None:
    running = make(own("127.0.0.1", 0), lifespan="on", bind=f"unix:{tmp_path}/s").settle()
    _, theirs = running.engine.handles
    with socket.create_connection(theirs.sock.getsockname()) as client:
        client.sendall(b"exit\n")
        running.loop.until(lambda: 1 not in running.ids, "it has crashed")
    assert theirs.is_open
    with socket.create_connection(theirs.sock.getsockname()) as client:
        client.settimeout(DEADLINE)
        client.sendall(b"hello\n")
        running.loop.until(lambda: readable(client), "the next one answers")
        assert client.recv(100).endswith(b" hello\n")


def test_an_address_a_worker_cannot_have_is_its_own_trouble(make: Make, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = make(own("127.0.0.1", port), lifespan="on", bind=f"unix:{tmp_path}/s").fail()
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in error.traceback
    assert str(errno.EADDRINUSE) in error.traceback


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_told_of_a_life(make: Make) -> None:
    running = make(workers=2).settle()
    first, second = (WorkerName(id, id - 1, running.pid(id)) for id in (1, 2))
    assert [running.told(id) for id in (1, 2)] == [["fork", "online", "listening"]] * 2
    assert running.events[:2] == [Forked(first), Forked(second)]
    address = running.engine.handles.address(1)
    assert StartedListening(second, address) in running.events
    assert str(address) == next(iter(running.engine.handles)).url
    assert running.events[-1].name == "ready"
    running.kill(1)
    assert Exited(first, None, signal.SIGKILL) in running.events
    running.until_listening(2, 3)
    running.engine.scale(1)
    running.until_listening(3)
    assert Exited(second, 0, None) in running.events
    running.engine.reload()
    running.until_listening(4)
    running.engine.stop(Stop.GRACEFUL)
    # No news: the second order only hurries.
    running.engine.stop(Stop.QUICK)
    running.finish()
    assert running.told(1) == ["fork", "online", "listening", "disconnect", "exit"]
    for id in (2, 3, 4):
        assert running.told(id) == ["fork", "online", "listening", "draining", "disconnect", "exit"]
    assert Scaled(1, 2) in running.events
    cluster = [event.name for event in running.events if not hasattr(event, "worker")]
    assert cluster == ["ready", "scale", "reload", "shutdown", "stopped"]


def test_what_is_told_of_one_that_hangs_up(make: Make) -> None:
    running = make().settle()
    worker = WorkerName(1, 0, running.pid(1))
    running.connect("/hang-up")
    running.loop.until(lambda: 2 in running.ids, "it is replaced at once")
    running.loop.forward(5.0)
    running.until_listening(2)
    assert running.told(1)[3:] == ["disconnect", "kill", "exit"]
    assert WasKilled(worker, "it closed its channel but did not exit") in running.events


def test_what_is_told_of_one_that_lies(make: Make) -> None:
    running = make().settle()
    running.connect("/answer/78").close()
    running.until_listening(2)
    assert running.told(1)[3:] == ["kill", "disconnect", "exit"]


@pytest.mark.parametrize("how", [Stop.GRACEFUL, Stop.QUICK])
def test_what_is_told_of_an_end_before_it_serves(make: Make, how: Stop) -> None:
    running = make()
    running.engine.start()
    running.engine.stop(how)
    running.finish()
    assert not running.engine.served
    # Whatever it still said while it went is no news.
    told = running.told(1)
    assert [told[0], *told[-3:]] == ["fork", "draining", "disconnect", "exit"]
    assert "listening" not in told
    assert [event.name for event in running.events if not hasattr(event, "worker")] == ["shutdown", "stopped"]


def test_a_failure_that_nobody_was_told_of(make: Make) -> None:
    """The one has failed and the other still boots when it is stopped."""
    running = make(
        "import os, threading\nif os.environ['CLUSTERSERVE_WORKER_SLOT'] == '0':\n    raise ValueError('trouble')\n"
        "threading.Event().wait()",
        workers=2,
    )
    running.engine.start()
    running.loop.until(lambda: running.ids == [2], "one has failed")
    running.engine.stop(Stop.GRACEFUL)
    assert "ValueError: trouble" in str(running.fail(started=True))
