"""systemd's side of it: sockets it opens, what it is told, and its watchdog."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.raw import Address, fetch
from tests.helpers.server import EXAMPLE, ROOT, Serve, run
from tests.helpers.waiting import DEADLINE

UNITS = sorted((ROOT / "examples" / "systemd").iterdir())


class NotifySocket:
    """The end of NOTIFY_SOCKET that systemd has."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.told: list[dict[str, str]] = []

    def read(self, within: float = DEADLINE) -> dict[str, str]:
        """The next message."""
        self._socket.settimeout(within)
        lines = self._socket.recv(65536).decode().split("\n")
        self.told.append(dict(line.split("=", 1) for line in lines))
        return self.told[-1]

    def wait_for(self, wanted: Callable[[dict[str, str]], object]) -> dict[str, str]:
        deadline = time.monotonic() + DEADLINE
        while not wanted(message := self.read(max(0.01, deadline - time.monotonic()))):
            pass
        return message

    def silent(self, within: float) -> bool:
        """Whether nothing is said for so long."""
        try:
            self.read(within)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notify(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[NotifySocket, str]]:
    kind = getattr(request, "param", "path")
    address = str(tmp_path / "notify") if kind == "path" else f"@clusterserve-{os.getpid()}-{time.time_ns()}"
    ends = NotifySocket(address)
    yield ends, address
    ends.close()


@pytest.mark.parametrize("notify", ["path", "abstract"], indirect=True)
def test_systemd_is_told_what_happens(serve: Serve, notify: tuple[NotifySocket, str], tmp_path: Path) -> None:
    systemd, address = notify
    gate = tmp_path / "gate"
    gate.touch()
    server = serve(
        app="tests.helpers.apps.gated:app",
        workers=2,
        ready=False,
        env={"NOTIFY_SOCKET": address, "GATE_FILE": str(gate)},
    )
    starting = systemd.read()
    assert starting == {"MAINPID": str(server.pid), "STATUS": "Starting 2 workers of tests.helpers.apps.gated:app"}
    server.wait_for("waits at the gate", count=2)
    # Nobody listens yet, and nobody has said so.
    assert systemd.silent(0.2)
    gate.unlink()
    assert systemd.read() == {"READY": "1", "STATUS": "Serving with 2 workers"}
    server.wait_ready()
    server.signal(signal.SIGHUP)
    reloading = systemd.read()
    assert (reloading["RELOADING"], reloading["STATUS"]) == ("1", "Replacing the workers")
    assert 0 < int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    assert systemd.read() == {"READY": "1", "STATUS": "Serving with 2 workers"}
    assert len(server.announced) == 4
    server.signal(signal.SIGTTIN)
    assert systemd.read() == {"STATUS": "Serving with 3 workers"}
    server.terminate()
    assert systemd.read() == {"STOPPING": "1", "STATUS": "Serving what was accepted, then stopping"}
    assert server.wait() == 0


def test_systemd_is_told_why_it_does_not_start(notify: tuple[NotifySocket, str]) -> None:
    systemd, address = notify
    done = run("no_such_module:app", "--bind", "127.0.0.1:0", env={"NOTIFY_SOCKET": address})
    assert done.code == 3
    assert "READY" not in systemd.read()
    said = systemd.read()
    assert said["STOPPING"] == "1"
    assert "no_such_module" in said["STATUS"]


def test_systemd_is_told_of_a_reload_that_is_refused(
    serve: Serve, notify: tuple[NotifySocket, str], tmp_path: Path
) -> None:
    systemd, address = notify
    file = tmp_path / "clusterserve.toml"
    file.write_text("")
    server = serve("--config", str(file), env={"NOTIFY_SOCKET": address})
    assert [systemd.read().get("READY") for _ in range(2)] == [None, "1"]
    file.write_text("wokers = 2\n")
    server.signal(signal.SIGHUP)
    # Both, or `systemctl reload` would wait for a reload to begin, and then for its end.
    reloading, ready = systemd.read(), systemd.read()
    assert (reloading["RELOADING"], ready["READY"]) == ("1", "1")
    assert "MONOTONIC_USEC" in reloading
    assert ready["STATUS"].startswith("The last reload was refused, nothing was done: ")
    assert "there is no setting 'wokers'" in ready["STATUS"]


def test_nobody_at_the_other_end_does_no_harm_and_workers_see_nothing_of_it(serve: Serve, tmp_path: Path) -> None:
    server = serve(env={"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "100000"})
    assert server.get("/").status == 200
    environment = Path(f"/proc/{server.workers[0].pid}/environ").read_bytes()
    assert b"NOTIFY_SOCKET" not in environment
    assert b"WATCHDOG" not in environment


def test_the_watchdog_is_fed_while_a_worker_is_well(serve: Serve, tmp_path: Path) -> None:
    systemd = NotifySocket(str(tmp_path / "notify"))
    server = serve(workers=2, env={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"})
    systemd.wait_for(lambda message: "READY" in message)
    for _ in range(5):
        systemd.wait_for(lambda message: "WATCHDOG" in message)
    with server.stopped_workers() as workers:
        # One that is well is enough.
        os.kill(workers[0].pid, signal.SIGCONT)
        for _ in range(20):
            systemd.wait_for(lambda message: "WATCHDOG" in message)
        os.kill(workers[0].pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE
        while not systemd.silent(1.0):
            assert time.monotonic() < deadline
    systemd.wait_for(lambda message: "WATCHDOG" in message)
    systemd.close()


def test_a_watchdog_of_another_process_is_not_ours(serve: Serve, tmp_path: Path) -> None:
    systemd = NotifySocket(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    serve(env=env)
    systemd.wait_for(lambda message: "READY" in message)
    assert systemd.silent(0.5)
    assert not any("WATCHDOG" in message for message in systemd.told)
    systemd.close()


def free_address() -> str:
    """A port that is most likely free a moment later too, on a loopback address that hardly anybody uses."""
    host = f"127.{os.getpid() % 200 + 20}.{time.time_ns() % 250}.7"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


ACTIVATE = ("systemd-socket-activate", "-E", "CLUSTER_E2E_MARK", "-E", "TMPDIR", "-E", "PYTHONPATH")


@pytest.mark.needs_tool("systemd-socket-activate")
def test_sockets_from_systemd(serve: Serve, tmp_path: Path) -> None:
    path, tcp = str(tmp_path / "s"), free_address()
    server = serve(prefix=[*ACTIVATE, "-l", path, "-l", tcp, "--fdname=web:admin"], bind=None, workers=2, ready=False)
    server.wait_for("Listening on .*/s as 3")
    # It starts with the first client, who waits until somebody listens.
    assert fetch(Address.parse(f"unix:{path}"), "/").status == 200
    host, port = tcp.split(":")
    with socket.create_connection((host, int(port)), DEADLINE) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
    assert server.found(rf"INFO: +Listening on unix:{re.escape(path)}")
    assert server.found(rf"INFO: +Listening on http://{re.escape(tcp)}")
    assert not server.found("are not used")
    assert server.stop() == 0
    # Not ours to remove.
    assert os.path.exists(path)
    os.unlink(path)


@pytest.mark.needs_tool("systemd-socket-activate")
def test_sockets_by_name(serve: Serve, tmp_path: Path) -> None:
    web, admin = str(tmp_path / "w"), str(tmp_path / "a")
    prefix = [*ACTIVATE, "-l", web, "-l", admin, "--fdname=web:admin"]
    server = serve(prefix=prefix, bind="fd://web", ready=False)
    server.wait_for("Listening on .*/a as 4")
    assert fetch(Address.parse(f"unix:{web}"), "/").status == 200
    assert server.found(r"Sockets were passed and are not used: fd://4 \(admin\); name them with --bind")
    assert server.stop() == 0
    for path in (web, admin):
        os.unlink(path)


@pytest.mark.needs_tool("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=[unit.name for unit in UNITS])
def test_the_example_units_are_good(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_of_the_example_is_one(tmp_path: Path) -> None:
    """It starts `clusterserve` through env: what follows must be understood."""
    text = (ROOT / "examples" / "systemd" / "shop.service").read_text()
    (line,) = re.findall(r"^ExecStart=/usr/bin/env clusterserve (.*)$", text, re.MULTILINE)
    done = run("config", *line.split(), cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert 'app = "shop:app"' in done.out
    assert EXAMPLE not in done.out


def test_what_systemd_is_slow_to_read_is_not_lost(serve: Serve, tmp_path: Path) -> None:
    systemd = NotifySocket(str(tmp_path / "notify"))
    server = serve(env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
    # Far more than the kernel keeps of unread messages.
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for count in range(limit // 2 + 5):
        server.signal(signal.SIGHUP)
        server.wait_for("Reloading: generation", count=count + 1)
    server.terminate()
    for _ in range(limit // 2 + 5):
        systemd.wait_for(lambda message: "RELOADING" in message)
    systemd.wait_for(lambda message: "STOPPING" in message)
    assert server.wait() == 0
    systemd.close()
