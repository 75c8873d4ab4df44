"""Spawning a worker process and learning of its end, with small programs in a worker's place."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusterserve.core.records import NO_ADDRESS, OFFER_SIZE, pack_offer
from clusterserve.master import process as module
from clusterserve.master.process import Exit, WorkerProcess
from clusterserve.worker.link import MASTER_GONE
from tests.helpers import proc
from tests.helpers.server import ROOT
from tests.helpers.waiting import DEADLINE, eventually

from .rig import SkewedLoop, no_more_descriptors

Spawn = Callable[..., WorkerProcess]

#: A worker's first line: where its ends of the channels are.
PRELUDE = """
import os, signal, socket, sys
messages, connections, board, kept, master = (int(each) for each in os.environ["CLUSTERSERVE_WORKER"].split(","))
messages = socket.socket(fileno=messages)
"""


@pytest.fixture
def exits() -> list[Exit]:
    """The exits that were reported."""
    return []


@pytest.fixture
def spawn(loop: SkewedLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exits: list[Exit]) -> Iterator[Spawn]:
    """Starts a program as a worker; closes the channels, and waits for it, at the end of the test."""
    started: list[WorkerProcess] = []

    def start(source: str = "messages.recv(1)", slot: int = 0) -> WorkerProcess:
        program = tmp_path / f"worker{len(started)}.py"
        program.write_text(PRELUDE + textwrap.dedent(source))
        monkeypatch.setattr(module, "ENTRY", str(program))
        started.append(WorkerProcess(slot, loop, exits.append))
        return started[-1]

    yield start
    for each in started:
        # Without its channel a worker ends.
        each.messages.close()
        each.connections.close()
        each.board.close()
        each.kept.close()
    loop.until(lambda: len(exits) == len(started), "every worker's exit is known")


def test_a_worker_is_told_where_its_channels_are(spawn: Spawn, loop: SkewedLoop) -> None:
    worker = spawn(
        """
        import json, stat
        kinds = [messages.type, socket.socket(fileno=os.dup(connections)).type]
        opened = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        opened = [number for number in opened if os.path.exists(f"/proc/self/fd/{number}")]
        facts = [os.getpid(), os.getppid(), master, os.environ["CLUSTERSERVE_WORKER_SLOT"], kinds, opened[3:]]
        messages.sendall(json.dumps(facts).encode())
        messages.recv(1)
        """,
        slot=3,
    )
    worker.messages.settimeout(DEADLINE)
    pid, parent, master, slot, kinds, opened = json.loads(worker.messages.recv(65536))
    assert pid == worker.pid
    assert parent == master == os.getpid()
    assert slot == "3"
    assert kinds == [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]
    # Its two channels, its board and its epoll, and nothing else of the master's.
    assert len(opened) == 4
    assert "CLUSTERSERVE_WORKER" not in os.environ


def test_both_channels_work(spawn: Spawn) -> None:
    worker = spawn("messages.sendall(socket.socket(fileno=connections).recv(100))")
    worker.messages.settimeout(DEADLINE)
    assert worker.connections.offer([pack_offer(1, 1, 0, NO_ADDRESS, b"", 0)], array.array("i"))
    assert len(worker.messages.recv(100)) == OFFER_SIZE


def test_the_interpreters_options_are_the_masters(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "_args_from_interpreter_flags", lambda: ["-O", "-X", "dev"])
    worker = spawn("messages.sendall(b'%d %d' % (sys.flags.optimize, sys.flags.dev_mode)); os._exit(0)")
    worker.messages.settimeout(DEADLINE)
    assert worker.messages.recv(100) == b"1 1"


def test_a_ctrl_c_does_not_hit_one_that_only_begins(loop: SkewedLoop, exits: list[Exit]) -> None:
    """It reaches the whole group, the interpreter that starts included, which is not yet able to leave it to us."""
    worker = WorkerProcess(0, loop, exits.append)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        worker.send_signal(number)
    worker.messages.close()
    worker.connections.close()
    worker.board.close()
    worker.kept.close()
    loop.until(lambda: exits, "its exit is known")
    assert exits == [Exit(MASTER_GONE, None)]


@pytest.mark.parametrize("code", [0, 3, 255])
def test_an_exit_code(spawn: Spawn, loop: SkewedLoop, exits: list[Exit], code: int) -> None:
    worker = spawn(f"os._exit({code})")
    loop.until(lambda: exits, "its exit is known")
    assert exits == [Exit(code, None)]
    assert str(exits[0]) == f"exited with code {code}"
    assert worker.pid not in proc.children(os.getpid())


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGRTMIN + 5, f"signal {signal.SIGRTMIN + 5}")],
)
def test_killed_by_a_signal(spawn: Spawn, loop: SkewedLoop, exits: list[Exit], number: int, name: str) -> None:
    worker = spawn(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); messages.send(b'x'); signal.pause()"
    )
    worker.messages.settimeout(DEADLINE)
    assert worker.messages.recv(1) == b"x"
    worker.send_signal(number)
    loop.until(lambda: exits, "its exit is known")
    assert exits == [Exit(None, number)]
    assert str(exits[0]) == f"was killed by {name}"


def test_a_signal_to_one_that_is_gone_reaches_nobody(spawn: Spawn, loop: SkewedLoop, exits: list[Exit]) -> None:
    worker = spawn("pass")
    eventually(lambda: proc.state(worker.pid) == "Z", "it is dead, and not yet waited for")
    worker.send_signal(signal.SIGKILL)
    loop.until(lambda: exits, "its exit is known")
    # Descriptor numbers come back: this one is somebody else's by now.
    with socket.socket(), socket.socket(), socket.socket():
        worker.send_signal(signal.SIGKILL)
    assert exits == [Exit(0, None)]


def test_other_children_are_not_waited_for(spawn: Spawn, loop: SkewedLoop, exits: list[Exit]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    eventually(lambda: proc.state(stranger.pid) == "Z", "the other child is dead")
    spawn("pass")
    loop.until(lambda: exits, "the worker's exit is known")
    assert proc.state(stranger.pid) == "Z"
    assert stranger.wait() == 5


def test_somebody_else_waited_for_it(spawn: Spawn, loop: SkewedLoop, exits: list[Exit]) -> None:
    worker = spawn("os._exit(9)")
    assert os.waitpid(-1, 0) == (worker.pid, 9 << 8)
    loop.until(lambda: exits, "its exit is known")
    assert exits == [Exit(None, None)]
    assert str(exits[0]).startswith("ended in an unknown way")


def test_the_death_of_several_is_told_apart(loop: SkewedLoop, spawn: Spawn, exits: list[Exit]) -> None:
    workers = [
        spawn("messages.recv(1); os._exit(int(os.environ['CLUSTERSERVE_WORKER_SLOT']))", slot) for slot in range(3)
    ]
    for slot in (1, 2, 0):
        workers[slot].messages.sendall(b"x")
        loop.until(lambda slot=slot: Exit(slot, None) in exits, "its exit is known")  # type: ignore[misc]
    assert exits == [Exit(1, None), Exit(2, None), Exit(0, None)]


# ── what cannot be spawned ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("executable", ["/nowhere/python", "/dev/null"])
def test_no_interpreter(loop: SkewedLoop, monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    # That nothing is left open is the fixtures' business.
    with pytest.raises(OSError, match=executable):
        WorkerProcess(0, loop, print)


def test_no_descriptor(loop: SkewedLoop) -> None:
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        WorkerProcess(0, loop, print)


def test_no_descriptor_half_way(loop: SkewedLoop, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the limit is hit, nothing is left."""
    failures = 0
    for spare in range(1, 20):
        numbers = [os.dup(0) for _ in range(spare)]
        with no_more_descriptors():
            # Those below the limit are there to be had.
            for number in numbers:
                os.close(number)
            try:
                spawn("pass")
            except OSError:
                failures += 1
            else:
                break
    # Two channels with two ends each, and more.
    assert failures >= 4


def test_no_pidfd(loop: SkewedLoop, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    def pidfd_open(pid: int) -> int:
        pids.append(pid)
        raise OSError(24, "Too many open files")

    pids: list[int] = []
    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with pytest.raises(OSError, match="Too many open files"):
        spawn("signal.pause()")
    assert proc.state(pids[0]) == ""


_AT_THE_LIMIT = """
    import asyncio, os, resource, sys
    from clusterserve.master.process import WorkerProcess

    if os.getuid() == 0:
        os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    loop = asyncio.new_event_loop()
    before = sorted(os.listdir("/proc/self/fd"))
    try:
        WorkerProcess(0, loop, print)
    except OSError as exc:
        print(type(exc).__name__, sorted(os.listdir("/proc/self/fd")) == before)
    loop.close()
    # Nobody may write what would be written at an exit in order.
    sys.stdout.flush()
    os._exit(0)
"""


def test_no_process_to_be_had() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_AT_THE_LIMIT)],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True,
    )  # fmt: skip
    assert (finished.stdout, finished.stderr) == ("BlockingIOError True\n", "")
