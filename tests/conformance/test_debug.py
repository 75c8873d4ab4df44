"""Debuggers and profiles per worker (rows I01-I11)."""

from __future__ import annotations

import contextlib
import http.client
import os
import pstats
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from clusterserve import Cluster, SettingsError
from tests.conformance.dap import Debugger
from tests.helpers import proc
from tests.helpers.server import WORKER_LISTENS, Serve, Server, run
from tests.helpers.waiting import DEADLINE, eventually

#: A debugger is two processes more for each worker: on a busy machine that takes its time (seconds).
PATIENCE = 120.0
pytestmark = pytest.mark.timeout(200)

#: What a debugger's adapter may take to end after its worker (seconds).
LINGER = 30.0

soon = partial(eventually, within=PATIENCE)

CAN_BE_DEBUGGED = r"Worker (\d+) \(slot (\d+), pid (\d+)\) can be debugged at (\S+)"

APP = """
import os, pathlib, sys
pathlib.Path(os.environ["STARTED"], str(os.getpid())).touch()

def breaks():
    return "broken"  # the breakpoint

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = (breaks() if scope["path"] == "/break" else str(os.getpid())).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""
BREAK_AT = next(number for number, line in enumerate(APP.splitlines(), 1) if "breakpoint" in line)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with an application that says which processes have imported it."""
    started = tmp_path / "started"
    started.mkdir()
    monkeypatch.setenv("STARTED", str(started))
    path = tmp_path / "debugged_app.py"
    path.write_text(APP)
    return path


def imported(app: Path) -> set[int]:
    """The processes that have come to the application's code."""
    return {int(each.name) for each in (app.parent / "started").iterdir()}


@pytest.fixture
def host() -> str:
    """A loopback address that nobody else uses: ports on it are free."""
    return f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}.{random.randrange(1, 255)}"


@pytest.fixture
def cluster(app: Path) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of the application, and stops them."""
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Cluster:
            made = Cluster("debugged_app:app", app_dir=str(app.parent), bind="127.0.0.1:0", **settings)
            stack.callback(made.stop, quick=True)
            return made

        yield make


def get(cluster: Cluster, path: str = "/") -> str:
    address = cluster.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def answers(address: str) -> bool:
    """Whether a debugger answers there as one must."""
    with Debugger.at(address) as debugger:
        return bool(debugger.initialize()["supportsConfigurationDoneRequest"])


def started(serve: Serve, *options: str, workers: int = 2, **settings: object) -> Server:
    """A server whose workers listen."""
    server = serve(*options, workers=workers, ready=False, linger=LINGER, **settings)
    server.wait_for(WORKER_LISTENS, count=workers, within=PATIENCE)
    return server


def debugged(server: Server, count: int) -> dict[int, str]:
    """Where each slot can be debugged, as the log says."""
    found = server.wait_for(CAN_BE_DEBUGGED, count=count, within=PATIENCE)
    return {int(each[2]): each[4] for each in found}


# ── I01, I02: ports by slot ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("written", "workers"), [("0.0.0.0", 1), ("[::1]", 1), ("[::]", 2)])
def test_I01_slot_i_listens_on_base_plus_i_at_the_host_that_was_given(serve: Serve, written: str, workers: int) -> None:
    base = random.randrange(20_000, 30_000)
    server = started(serve, "--debug-port", f"{written}:{base}", workers=workers)
    # Another program of this machine may have one of them; then the log says so (I08).
    taken = {each[1] for each in server.found(r"is not at (\S+): ")}
    places = debugged(server, workers)
    for slot in range(workers):
        wanted = f"{written}:{base + slot}"
        assert places[slot] == wanted or wanted in taken
        reached = places[slot].replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        assert answers(reached)
        assert proc.listening_inodes(int(places[slot].rpartition(":")[2]))


def test_I01_a_replacement_gets_the_port_of_its_slot(serve: Serve, host: str) -> None:
    server = started(serve, "--debug-port", f"{host}:7000", workers=2)
    assert debugged(server, 2) == {0: f"{host}:7000", 1: f"{host}:7001"}
    for victim, heir in ((1, 3), (3, 4)):
        (worker,) = (each for each in server.workers if each.id == victim)
        os.kill(worker.pid, signal.SIGKILL)
        (found,) = server.wait_for(rf"Worker {heir} \(slot 0, .* debugged at (\S+)", within=PATIENCE)
        assert found[1] == f"{host}:7000"
        server.wait_for(rf"Worker {heir} .*is listening", within=PATIENCE)
    assert answers(f"{host}:7000")
    assert answers(f"{host}:7001")


def test_I02_past_the_last_port_it_goes_on_at_1024(serve: Serve, host: str) -> None:
    server = started(serve, "--debug-port", f"{host}:65535", workers=2)
    assert debugged(server, 2) == {0: f"{host}:65535", 1: f"{host}:1024"}
    assert answers(f"{host}:1024")


# ── I03, I04, I06: ports from Python ────────────────────────────────────────────────────────────────────────────────


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to whoever asks for any: other tests do, all the time."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(20_000, 30_000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def test_I03_a_number_is_used_as_it_is(cluster: Callable[..., Cluster]) -> None:
    first, second = free_ports(2)
    master = cluster(respawn=False, debug_port=first)
    master.start()
    for port in (first, second):
        master.setup(debug_port=port)
        worker = master.fork()
        soon(lambda worker=worker: worker.state == "listening", "it listens")  # type: ignore[misc]
        assert master.debug_addresses[worker.id] == f"127.0.0.1:{port}"
        assert answers(master.debug_addresses[worker.id])


def test_I03_a_function_is_asked_at_every_fork(cluster: Callable[..., Cluster]) -> None:
    ports = free_ports(2)
    asked: list[int] = []

    def port() -> int:
        asked.append(threading.get_ident())
        return ports[len(asked) - 1]

    master = cluster(respawn=False, debug_port=port)
    master.start()
    workers = [master.fork() for _ in ports]
    for worker in workers:
        soon(lambda each=worker.id: each in master.debug_addresses, "the debugger listens")  # type: ignore[misc]
    assert [master.debug_addresses[worker.id] for worker in workers] == [f"127.0.0.1:{port}" for port in ports]
    assert asked == [threading.get_ident()] * 2


def test_I03_I06_zero_is_any_free_port_for_each_and_the_log_says_which(serve: Serve) -> None:
    server = started(serve, "--debug-port", "0", workers=2)
    places = debugged(server, 2)
    assert len(set(places.values())) == 2
    assert all(answers(place) for place in places.values())


BAD = [
    "no port at all",
    "99999",
    "127.0.0.1:99999",
    "-1",
    -1,
    65536,
    True,
    1.5,
    b"5678",
    [],
    "unix:/x",
    ":5678",
    "a b:1",
]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_I04_what_is_no_port_is_a_ValueError_and_no_worker_starts(
    cluster: Callable[..., Cluster], value: object
) -> None:
    with pytest.raises(ValueError, match="debug_port"):
        cluster(debug_port=value)
    master = cluster(respawn=False)
    master.start()
    with pytest.raises(ValueError, match="debug_port"):
        master.setup(debug_port=value)
    with pytest.raises(ValueError, match="debug_port"):
        master.start_debugging(value)  # type: ignore[arg-type]
    assert not master.workers


@pytest.mark.parametrize("value", ["5678", None, -1, 65536, True], ids=repr)
def test_I04_a_function_that_gives_none_is_a_ValueError_at_fork(cluster: Callable[..., Cluster], value: object) -> None:
    master = cluster(respawn=False, debug_port=lambda: value)
    master.start()
    with pytest.raises(ValueError, match="debug_port"):
        master.fork()
    assert not master.workers


def test_I04_a_function_needs_forks_to_be_asked_at(cluster: Callable[..., Cluster]) -> None:
    with pytest.raises(SettingsError, match=r"respawn=False"):
        cluster(debug_port=lambda: 5678)
    master = cluster(workers=1)
    with pytest.raises(SettingsError, match=r"respawn=False"):
        master.setup(debug_port=lambda: 5678)
    with pytest.raises(SettingsError, match="not a function"):
        master.start_debugging(lambda: 5678)  # type: ignore[arg-type]


# ── I05: waiting for the debugger ───────────────────────────────────────────────────────────────────────────────────


def place_of(master: Cluster, worker: int) -> str:
    return soon(lambda: master.debug_addresses.get(worker, ""), "its debugger listens")


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "default"])
def test_I05_a_worker_waits_for_its_debugger_before_the_program(
    cluster: Callable[..., Cluster], app: Path, host: str, explicit: bool
) -> None:
    port = {"debug_port": f"{host}:5000"} if explicit else {}
    master = cluster(respawn=False, debug_wait=True, timeout_boot=2, **port)
    master.start()
    worker = master.fork()
    place = place_of(master, worker.id)
    if explicit:
        assert place == f"{host}:5000"
    # Longer than it may boot, and nothing is imported.
    end = time.monotonic() + 3
    soon(lambda: time.monotonic() > end, "some time passes")
    assert worker.state == "online"
    assert not imported(app)
    with Debugger.at(place) as debugger:
        debugger.attach()
        soon(lambda: worker.state == "listening", "it has gone on")
        assert imported(app) == {worker.pid}
        assert get(master) == str(worker.pid)


def test_I05_a_worker_that_waits_dies_of_a_signal(cluster: Callable[..., Cluster], app: Path, host: str) -> None:
    master = cluster(respawn=False, debug_wait=True, debug_port=f"{host}:5000")
    master.start()
    *victims, last = [master.fork() for _ in range(3)]
    for worker in (*victims, last):
        place_of(master, worker.id)
    for victim, number in zip(victims, (signal.SIGTERM, signal.SIGKILL), strict=True):
        gone = victim.wait_for("exit", timeout=DEADLINE)
        victim.kill(number.name)
        assert gone.result() == (None, number)
        assert victim.exited_after_disconnect is False
        assert not last.is_dead()
    # Stopping does not wait for debuggers.
    began = time.monotonic()
    master.stop()
    assert time.monotonic() - began < DEADLINE
    assert last.is_dead()
    assert not imported(app)


def test_I05_the_program_ends_on_SIGTERM_while_all_wait(serve: Serve, host: str) -> None:
    server = serve("--debug-wait", "--debug-port", f"{host}:5000", workers=2, ready=False, linger=LINGER)
    debugged(server, 2)
    assert not server.announced
    server.terminate()
    # It was never of use to anybody.
    assert server.wait() == 143


# ── I07, I09: how it is asked for ───────────────────────────────────────────────────────────────────────────────────


def test_I07_asked_for_by_the_environment(serve: Serve, host: str) -> None:
    server = started(serve, env={"CLUSTERSERVE_DEBUG_PORT": f"{host}:7000"}, workers=1)
    assert debugged(server, 1) == {0: f"{host}:7000"}
    assert answers(f"{host}:7000")


def test_I07_I10_asked_again_changes_nothing_and_workers_with_debuggers_leave_as_others_do(
    cluster: Callable[..., Cluster], host: str
) -> None:
    master = cluster(respawn=False, workers=2, debug_port=f"{host}:7000")
    master.start()
    places = {1: f"{host}:7000", 2: f"{host}:7001"}
    assert master.start_debugging().result() == places
    assert master.start_debugging(f"{host}:8000").result() == places
    workers = list(master.workers.values())
    for worker in workers:
        soon(lambda worker=worker: worker.state == "listening", "it listens")  # type: ignore[misc]
        assert worker.disconnect() is worker
    for worker in workers:
        soon(worker.is_dead, "it has left")
        assert worker.exited_after_disconnect is True
        assert worker.process is not None
        assert worker.process.returncode == 0


def test_I09_nobody_listens_for_debuggers_unasked(serve: Serve) -> None:
    server = serve(workers=2)
    assert len(server.processes()) == 3
    theirs = {inode for pid in server.processes() for inode in proc.socket_inodes(pid)}
    assert theirs & proc.all_listening_inodes() == proc.listening_inodes(server.address.port)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("7000", "127.0.0.1:7000"),
        ("127.0.0.9:7000", "127.0.0.9:7000"),
        ("127.0.0.9", "127.0.0.9:5678"),
        ("localhost:7000", "localhost:7000"),
        ("[::1]:7000", "[::1]:7000"),
        ("[::1]", "[::1]:5678"),
    ],
)
def test_I09_every_spelling(cluster: Callable[..., Cluster], written: str, wanted: str) -> None:
    assert cluster(debug_port=written).settings.debug_port == wanted


# ── I08: the port is taken ──────────────────────────────────────────────────────────────────────────────────────────


def serves_with_a_taken_port(server: Server, host: str) -> bool:
    """What I08 promises: both workers serve, and both can be debugged."""
    gives_up = rf"^{re.escape(host)}:7000: "
    server.wait_for(rf"Worker \d .*is listening|{gives_up}", count=2, within=PATIENCE)
    if server.found(gives_up):
        return False
    places = debugged(server, 2)
    return (
        places[0] != f"{host}:7000"
        and places[1] == f"{host}:7001"
        and len(server.found(rf"Worker 1 is not at {host}:7000: .*in use")) == 1
        and all(answers(place) for place in places.values())
    )


def test_I08_a_taken_port_costs_no_worker(serve: Serve, host: str) -> None:
    with socket.create_server((host, 7000)):
        server = started(serve, "--debug-port", f"{host}:7000", workers=2)
        assert serves_with_a_taken_port(server, host)


def test_I08_can_fail(serve: Serve, host: str) -> None:
    with socket.create_server((host, 7000)):
        faulty = {"CLUSTERSERVE_FAULTS": "debug-port-free"}
        server = serve("--debug-port", f"{host}:7000", workers=2, env=faulty, ready=False, linger=LINGER)
        assert not serves_with_a_taken_port(server, host)
        # As in Node: its worker dies of it, and so does what replaces it.
        server.terminate()
        assert server.wait() in (0, 3, 143)


# ── I10: at run time ────────────────────────────────────────────────────────────────────────────────────────────────


def test_I10_debugging_starts_in_all_workers_and_those_to_come(cluster: Callable[..., Cluster], host: str) -> None:
    master = cluster(respawn=False, workers=2)
    master.start()
    soon(lambda: [each.state for each in master.workers.values()] == ["listening"] * 2, "both listen")
    assert master.debug_addresses == {}
    # This one has not begun to listen to its master when it is told.
    young = master.fork()
    assert young.state == "none"
    places = master.start_debugging(f"{host}:7000").result()
    assert places == {1: f"{host}:7000", 2: f"{host}:7001", 3: f"{host}:7002"} == master.debug_addresses
    later = master.fork()
    assert place_of(master, later.id) == f"{host}:7003"
    assert all(answers(place) for place in master.debug_addresses.values())


def test_I10_asked_for_before_the_start(cluster: Callable[..., Cluster], host: str) -> None:
    master = cluster(workers=1)
    assert master.start_debugging(f"{host}:7000").result() == {}
    master.start()
    assert master.debug_addresses == {1: f"{host}:7000"}


def test_I10_a_worker_at_a_breakpoint_is_not_hung(cluster: Callable[..., Cluster], app: Path, host: str) -> None:
    master = cluster(workers=1, timeout=2)
    master.start()
    (worker,) = master.workers.values()
    master.start_debugging(f"{host}:7000").result()
    with Debugger.at(f"{host}:7000") as debugger:
        debugger.attach(str(app), BREAK_AT)
        got: list[str] = []
        client = threading.Thread(target=lambda: got.append(get(master, "/break")))
        client.start()
        stopped = debugger.event("stopped")
        # Longer than any other worker may be silent.
        end = time.monotonic() + 5
        soon(lambda: time.monotonic() > end, "some time passes")
        assert worker.state == "listening"
        assert not got
        debugger.go_on(stopped)
        client.join(DEADLINE)
    assert got == ["broken"]
    assert worker.pid == int(get(master))


# ── without debugpy ─────────────────────────────────────────────────────────────────────────────────────────────────

WITHOUT = """
import sys
sys.modules["debugpy"] = None
from clusterserve.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("option", [("--debug-port", "5678"), ("--debug-wait",)], ids=lambda option: option[0])
def test_without_debugpy_it_is_one_clear_sentence(tmp_path: Path, option: tuple[str, ...]) -> None:
    (tmp_path / "without.py").write_text(textwrap.dedent(WITHOUT))
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "without.py"), "examples.asgi_app:app", *option],
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"clusterserve: error: {option[0]}")
    assert line.endswith("needs the package debugpy, which is not installed: pip install 'clusterserve[debug]'")


# ── I11: profiles ───────────────────────────────────────────────────────────────────────────────────────────────────


def profiles(directory: Path) -> dict[int, pstats.Stats]:
    """By worker; nothing else is there."""
    found = {}
    for path in directory.iterdir():
        name = re.fullmatch(r"worker-(\d+)-slot-(\d+)-pid-(\d+)\.prof", path.name)
        assert name is not None, path
        found[int(name[1])] = pstats.Stats(str(path))
    return found


def functions(stats: pstats.Stats) -> set[str]:
    return {name for _, _, name in stats.stats}  # type: ignore[attr-defined]


def test_I11_each_worker_writes_a_file_of_its_own(serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there"
    server = serve("--profile", str(directory), workers=2)
    assert {server.get("/sleep?ms=1").status for _ in range(8)} == {200}
    pids = {worker.id: worker.pid for worker in server.workers}
    assert not list(directory.iterdir())
    assert server.stop() == 0
    found = profiles(directory)
    assert sorted(found) == [1, 2]
    for worker, stats in found.items():
        assert (directory / f"worker-{worker}-slot-{worker - 1}-pid-{pids[worker]}.prof").exists()
        assert "sleep" in functions(stats)


def test_I11_from_python_and_for_later_workers_only(cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    directory = tmp_path / "profiles"
    master = cluster(respawn=False)
    master.start()
    for settings in ({}, {"profile": directory}):
        master.setup(**settings)
        worker = master.fork()
        soon(lambda worker=worker: worker.state == "listening", "it listens")  # type: ignore[misc]
        assert get(master)
        worker.disconnect()
        soon(worker.is_dead, "it has left")
    assert sorted(profiles(directory)) == [2]
    assert "app" in functions(profiles(directory)[2])


def test_I11_a_directory_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        ended = run("examples.asgi_app:app", "--profile", str(place))
        assert ended.code == 2
        (line,) = ended.err.splitlines()
        assert line.startswith(f"clusterserve: error: --profile {place}: cannot be ")
