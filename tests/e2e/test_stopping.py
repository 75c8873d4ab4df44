"""How a server ends: by signals, by Ctrl-C in a terminal, and when its master is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.helpers import proc
from tests.helpers.raw import Address, Client, refuses, request
from tests.helpers.server import (
    EXAMPLE,
    LISTENING_ON,
    ROOT,
    WORKER_LISTENS,
    Serve,
    Server,
    end_processes,
    environment,
    new_mark,
    python,
)
from tests.helpers.waiting import DEADLINE, eventually

# Far below the graceful limit of 30 s and far above what a busy machine needs: "at once".
SOON = 20.0
FULL = "tests.helpers.apps.full:app"
HOLDS = r"Holding the event loop of pid (\d+)"


def half_said(server: Server) -> Client:
    """A connection whose request is with a handler that waits for the rest of the body."""
    client = server.connect()
    client.send(request("POST", "/echo", "Content-Length: 8") + b"half")
    # The first half comes back: the handler runs.
    assert client.head().status == 200
    assert client.read(4) == b"half"
    return client


def wait_until_closed(server: Server) -> None:
    eventually(server.no_listener_left, "nobody listens any more")
    assert refuses(server.address)


def lifespans_ended(server: Server) -> int:
    return len(server.found("The application has ended in worker"))


# ── TERM and INT ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_0(serve: Serve, number: signal.Signals) -> None:
    server = serve(workers=2)
    assert server.get("/").status == 200
    server.signal(number)
    assert server.wait(SOON) == 0
    assert server.processes() == []
    eventually(lambda: lifespans_ended(server) == 2, "both applications ended in order")
    assert refuses(server.address)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("policy", ["rr", "none"])
def test_requests_in_flight_are_finished(serve: Serve, number: signal.Signals, policy: str) -> None:
    server = serve("--policy", policy, workers=2)
    with half_said(server) as one, half_said(server) as other:
        server.signal(number)
        wait_until_closed(server)
        for client in (one, other):
            client.send(b"rest")
            assert client.read(4) == b"rest"
            assert client.rest() == b""
    assert server.wait(SOON) == 0
    eventually(lambda: lifespans_ended(server) == 2, "both applications ended in order")


def test_later_clients_are_refused_and_not_left_hanging(serve: Serve) -> None:
    server = serve(bind=["127.0.0.1:0", "[::1]:0"])
    with half_said(server) as client:
        server.terminate()
        wait_until_closed(server)
        for address in server.addresses:
            assert refuses(address)
        client.send(b"rest")
        assert client.read(4) == b"rest"
    assert server.wait(SOON) == 0


def test_requests_that_wait_for_a_worker_are_served(serve: Serve) -> None:
    server = serve(workers=2)
    with contextlib.ExitStack() as stack:
        with server.stopped_workers():
            clients = [stack.enter_context(server.connect()) for _ in range(50)]
            for client in clients:
                client.send(request("GET", "/whoami"))
            server.terminate()
            wait_until_closed(server)
        for client in clients:
            assert client.response().status == 200
            assert client.rest() == b""
    assert server.wait(SOON) == 0


def test_requests_whose_workers_die_at_the_end_are_answered(serve: Serve) -> None:
    server = serve(workers=2)
    with contextlib.ExitStack() as stack, server.stopped_workers():
        clients = [stack.enter_context(server.connect()) for _ in range(50)]
        for client in clients:
            client.send(request("GET", "/whoami"))
        server.terminate()
        wait_until_closed(server)
        for worker in server.workers:
            os.kill(worker.pid, signal.SIGKILL)
        # By one that replaces the dead, as long as it is known that somebody waits.
        for client in clients:
            assert client.response().status in (200, 503)
            assert client.rest() == b""
    assert server.wait(SOON) == 0


def test_connections_that_the_master_had_not_accepted_yet_are_served(serve: Serve) -> None:
    server = serve(workers=2)
    with contextlib.ExitStack() as stack:
        os.kill(server.pid, signal.SIGSTOP)
        eventually(lambda: proc.state(server.pid) == "T", "the master stands still")
        clients = [stack.enter_context(server.connect()) for _ in range(50)]
        for client in clients:
            client.send(request("GET", "/whoami"))
        server.terminate()
        os.kill(server.pid, signal.SIGCONT)
        for client in clients:
            assert client.response().status == 200
    assert server.wait(SOON) == 0


def test_idle_and_silent_connections_do_not_hold_the_exit(serve: Serve) -> None:
    server = serve()
    with server.connect() as idle, server.connect() as silent, server.connect() as partial:
        partial.send(b"GET / HT")
        assert idle.ask("GET", "/").status == 200
        server.terminate()
        assert idle.rest() == b""
        assert partial.rest() == b""
        assert server.wait(SOON) == 0
        # TCP_DEFER_ACCEPT: nobody ever saw this one, so nobody could close it.  It ends when it says something.
        with contextlib.suppress(ConnectionError):
            silent.send(request("GET", "/"))
            assert silent.rest() == b""


@pytest.mark.parametrize("policy", ["rr", "none"])
def test_idle_and_silent_connections_of_a_unix_socket_are_closed(serve: Serve, tmp_path: Path, policy: str) -> None:
    server = serve("--policy", policy, bind=f"unix:{tmp_path / 's'}")
    with server.connect() as silent, server.connect() as idle, server.connect() as partial:
        partial.send(b"GET / HT")
        assert idle.ask("GET", "/").status == 200
        server.terminate()
        for client in (idle, silent, partial):
            assert client.rest() == b""
        assert server.wait(SOON) == 0


def test_an_endless_stream_holds_the_exit_no_longer_than_the_limit(serve: Serve) -> None:
    server = serve("--timeout-graceful-shutdown", "2", app=FULL, workers=2)
    with server.connect() as client:
        client.send(request("GET", "/obstinate"))
        assert client.head().status == 200
        assert client.chunk() == b"tick"
        began = time.monotonic()
        server.terminate()
        assert server.wait(SOON) == 0
        assert time.monotonic() - began >= 1
    eventually(lambda: lifespans_ended(server) == 2, "the lifespans ended in order all the same")


def test_a_blocked_worker_is_killed_after_the_limit_and_that_is_said(serve: Serve) -> None:
    server = serve("--timeout-graceful-shutdown", "0.5", app=FULL, workers=2)
    with server.connect() as client:
        client.send(request("GET", "/hold"))
        blocked = int(server.wait_for(HOLDS)[0][1])
        server.terminate()
        assert server.wait(SOON) == 0
    assert not proc.alive(blocked)
    server.wait_for(r"(?i)kill")


def test_a_lifespan_that_never_ends_is_cut_off_by_the_limit(serve: Serve) -> None:
    server = serve("--timeout-graceful-shutdown", "0.5", app="tests.helpers.apps.lingers:app", noise=True)
    server.terminate()
    assert server.wait(SOON) == 0


def test_a_lifespan_that_fails_at_the_end_is_shown(serve: Serve) -> None:
    server = serve(app="tests.helpers.apps.lifespans:fails_at_shutdown", workers=1, noise=True)
    assert server.get("/").status == 200
    assert server.stop() == 0
    server.wait_for("RuntimeError: the shutdown's own trouble")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_before_it_ever_served_is_no_success(serve: Serve, number: signal.Signals, code: int) -> None:
    server = serve(app="tests.helpers.apps.hangs:app", workers=2, ready=False)
    eventually(lambda: len(proc.children(server.pid)) >= 2, "the workers have been started")
    server.signal(number)
    assert server.wait(SOON) == code
    assert server.processes() == []


def test_a_stop_during_boot_tells_of_a_worker_that_has_failed(serve: Serve, tmp_path: Path) -> None:
    # Slot 0 raises, the other waits for ever: nobody has been told yet when the stop comes.
    (tmp_path / "half.py").write_text(
        "import os, threading\n"
        "if os.environ['CLUSTERSERVE_WORKER_SLOT'] == '0':\n"
        "    raise RuntimeError('its own trouble')\n"
        "threading.Event().wait()\n"
    )
    server = serve(app="half:app", workers=2, ready=False, noise=True, env={"PYTHONPATH": str(tmp_path)})
    eventually(lambda: server.found("Serving"), "it has started")
    eventually(lambda: len(proc.children(server.pid)) == 2, "two boot")
    eventually(lambda: len(proc.children(server.pid)) == 1, "one has failed")
    server.terminate()
    assert server.wait(SOON) == 3
    assert len(server.wait_for("RuntimeError: its own trouble")) == 1


def test_every_further_term_finds_it_stopping(serve: Serve) -> None:
    """Also in its last moments, when the event loop is closed: no death by signal, and no other code."""
    server = serve(workers=1)
    server.terminate()
    while server.running:
        server.terminate()
    assert server.wait(SOON) == 0


@pytest.mark.parametrize("where", ["import", "lifespan"])
def test_term_while_some_boot_and_others_serve(serve: Serve, tmp_path: Path, where: str) -> None:
    go = tmp_path / "go"
    server = serve(
        app="tests.helpers.apps.late:app", workers=2, ready=False, env={"GO_FILE": str(go), "WAIT_IN": where}
    )
    server.wait_for(WORKER_LISTENS)
    server.wait_for("The start takes its time")
    with half_said(server) as client:
        server.terminate()
        wait_until_closed(server)
        # The late one comes to listen only now: too late, and no fault of anybody's.
        go.touch()
        client.send(b"rest")
        assert client.read(4) == b"rest"
    assert server.wait(SOON) == 0
    assert server.found(r"ERROR|WARNING|CRITICAL") == []


def test_a_server_of_which_some_workers_still_boot_serves(serve: Serve, tmp_path: Path) -> None:
    go = tmp_path / "go"
    server = serve(
        app="tests.helpers.apps.late:app", workers=2, ready=False, env={"GO_FILE": str(go), "WAIT_IN": "import"}
    )
    server.wait_for(WORKER_LISTENS)
    assert [server.ask_id() for _ in range(4)] == [1] * 4
    go.touch()
    server.wait_for(WORKER_LISTENS, count=2)
    eventually(lambda: {server.ask_id(), server.ask_id()} == {1, 2}, "the late one gets its turns")


# ── being in a hurry ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_int_hurries(serve: Serve) -> None:
    server = serve(noise=True)
    with half_said(server):
        server.interrupt()
        wait_until_closed(server)
        server.interrupt()
        assert server.wait(SOON) == 130
    assert server.processes() == []


def test_a_second_term_changes_nothing(serve: Serve) -> None:
    server = serve()
    with half_said(server) as client:
        server.terminate()
        wait_until_closed(server)
        server.terminate()
        client.send(b"rest")
        assert client.read(4) == b"rest"
    assert server.wait(SOON) == 0


def test_quit_is_quick_and_still_ends_the_lifespans(serve: Serve) -> None:
    server = serve(workers=2, noise=True)
    with half_said(server):
        server.signal(signal.SIGQUIT)
        assert server.wait(SOON) == 131
    assert server.processes() == []
    eventually(lambda: lifespans_ended(server) == 2, "both applications ended in order")


def test_quit_does_not_wait_for_a_blocked_worker(serve: Serve) -> None:
    server = serve(app=FULL, workers=2, noise=True)
    with server.connect() as client:
        client.send(request("GET", "/hold"))
        server.wait_for(HOLDS)
        server.signal(signal.SIGQUIT)
        assert server.wait(SOON) == 131


# ── signals that mean something else, or nothing ────────────────────────────────────────────────────────────────────

# What HUP, TTIN and TTOU mean instead is in test_reload.py and test_scale.py.
NOTHING = [
    signal.SIGUSR1,
    signal.SIGWINCH,
    signal.SIGCHLD,
    signal.SIGPIPE,
]


@pytest.fixture(scope="module")
def hardened(serve_module: Serve) -> Server:
    return serve_module(workers=2)


@pytest.mark.parametrize("number", NOTHING, ids=lambda number: number.name)
def test_a_signal_without_a_meaning_changes_nothing(hardened: Server, number: signal.Signals) -> None:
    before = hardened.workers
    with hardened.connect() as kept:
        assert kept.ask("GET", "/").status == 200
        hardened.signal(number)
        assert [hardened.get("/").status for _ in range(4)] == [200] * 4
        assert kept.ask("GET", "/").status == 200
    assert proc.alive(hardened.pid)
    assert hardened.workers == before
    assert len(before) == 2


def test_an_int_at_a_worker_alone_ends_nothing(hardened: Server) -> None:
    # Ctrl-C reaches the whole process group; a worker stops when its master says so.
    before = hardened.workers
    for worker in before:
        os.kill(worker.pid, signal.SIGINT)
    assert [hardened.get("/").status for _ in range(4)] == [200] * 4
    assert hardened.workers == before


# ── a terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Terminal:
    """The command line in a terminal of its own."""

    def __init__(self, scratch: Path, *options: str) -> None:
        value, self.mark = new_mark()
        command = python(EXAMPLE, "--workers", "2", "--bind", "127.0.0.1:0", *options)
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            cwd=str(ROOT),
            env={**environment(value, None, scratch), "TERM": "xterm"},
            encoding="utf-8",
            timeout=DEADLINE,
            dimensions=(50, 250),
        )
        self.seen = ""
        for _ in range(2):
            self.expect(WORKER_LISTENS)
        found = LISTENING_ON.search(self.seen)
        assert found is not None
        # A coloured line ends with the sequence that switches the colour off.
        self.address = Address.parse(found[1].partition("\x1b")[0])

    def expect(self, pattern: re.Pattern[str]) -> None:
        self.child.expect(pattern)
        self.seen += self.child.before + self.child.after

    def interrupt(self) -> None:
        """What a person does: the terminal's driver turns this into SIGINT for the whole group."""
        self.child.sendintr()

    def end(self) -> int | None:
        """Read to the end; the exit code, None if a signal was the end."""
        self.child.expect(pexpect.EOF)
        self.seen += self.child.before
        self.child.close()
        status: int | None = self.child.exitstatus
        return status


# Python ≥ 3.12 warns of any fork beside threads, and pytest-timeout's is one.
in_a_terminal = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with tempfile.TemporaryDirectory(prefix="clusterserve-e2e-") as scratch:
        terminal = Terminal(Path(scratch))
        try:
            yield terminal
        finally:
            left = end_processes(terminal.mark, within=0.0)
            terminal.child.close(force=True)
        assert left == []
        assert os.listdir(scratch) == []


@in_a_terminal
def test_resizing_the_terminal_changes_nothing_and_ctrl_c_ends(terminal: Terminal) -> None:
    with Client(terminal.address) as client:
        assert client.ask("GET", "/").status == 200
        terminal.child.setwinsize(20, 100)
        assert client.ask("GET", "/").status == 200
        terminal.interrupt()
        assert terminal.end() == 0
    assert terminal.seen.count("The application has ended in worker") == 2
    assert "Traceback" not in terminal.seen
    assert proc.marked(terminal.mark) == []


@in_a_terminal
def test_ctrl_c_lets_a_request_finish(terminal: Terminal) -> None:
    with Client(terminal.address) as client:
        client.send(request("POST", "/echo", "Content-Length: 8") + b"half")
        client.head()
        terminal.interrupt()
        eventually(lambda: not proc.listening_inodes(terminal.address.port), "nobody listens any more")
        client.send(b"rest")
        assert client.read(8) == b"halfrest"
        assert terminal.end() == 0
    assert "Traceback" not in terminal.seen


@in_a_terminal
def test_ctrl_c_twice(terminal: Terminal) -> None:
    with Client(terminal.address) as client:
        client.send(request("POST", "/echo", "Content-Length: 8") + b"half")
        client.head()
        terminal.interrupt()
        eventually(lambda: not proc.listening_inodes(terminal.address.port), "nobody listens any more")
        terminal.interrupt()
        assert terminal.end() == 130
    assert proc.marked(terminal.mark) == []


@in_a_terminal
def test_the_terminal_goes_away(terminal: Terminal) -> None:
    # The kernel sends HUP to the whole group, and from then on every word printed is an error.
    terminal.child.ptyproc.fileobj.close()
    with Client(terminal.address) as client:
        assert [client.ask("GET", "/").status for _ in range(4)] == [200] * 4
    os.kill(terminal.child.pid, signal.SIGTERM)
    assert terminal.child.ptyproc.wait() == 0


# ── the master is killed ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["rr", "none"])
def test_no_worker_outlives_its_master(serve: Serve, policy: str) -> None:
    server = serve("--policy", policy, app=FULL, workers=3)
    with server.connect() as idle, server.connect() as blocking, server.connect() as streaming:
        assert idle.ask("GET", "/").status == 200
        streaming.send(request("GET", "/stream?ms=1"))
        streaming.head()
        blocking.send(request("GET", "/hold"))
        server.wait_for(HOLDS)
        pids = [worker.pid for worker in server.workers]
        assert len(pids) == 3
        server.kill()
        server.wait()
        eventually(lambda: not any(proc.alive(pid) for pid in pids), "every worker is gone", within=SOON)
        assert server.processes() == []
    assert refuses(server.address)


def test_a_worker_that_is_still_booting_does_not_outlive_its_master(serve: Serve) -> None:
    server = serve(app="tests.helpers.apps.hangs:app", workers=2, ready=False)
    server.wait_for("The import goes on for ever", count=2)
    server.kill()
    server.wait()
    eventually(lambda: server.processes() == [], "every worker is gone", within=SOON)
