"""SIGUSR2: a new master, of new code and options, takes over what the old one has, and nobody notices."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_container import dockerfile, image, started
from tests.e2e.test_systemd import NotifySocket
from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.raw import Address, Client, request
from tests.helpers.server import KEEP, TAKES_OVER, Serve, Server
from tests.helpers.waiting import DEADLINE, eventually

__all__ = ["image"]

FULL = "tests.helpers.apps.full:app"
FAILED = r"Upgrade failed, the new master \(process (\d+)\) failed: (.*); process (\d+) serves on as before"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[NotifySocket]:
    found = NotifySocket(str(tmp_path / "notify"))
    yield found
    found.close()


def pid_of(client: Client) -> int:
    pid = client.ask("GET", "/whoami").json()["pid"]
    assert isinstance(pid, int)
    return pid


@pytest.mark.parametrize("dispatch", ["auto", "request", "connection"])
def test_everything_goes_on(serve: Serve, systemd: NotifySocket, tmp_path: Path, dispatch: str) -> None:
    pid_file, path = tmp_path / "pid", tmp_path / "s"
    server = serve(
        *("--pid", str(pid_file), "--dispatch", dispatch, *KEEP),
        bind=["127.0.0.1:0", f"unix:{path}"],
        workers=2,
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
    )
    first, file = server.pid, path.stat()
    with (
        server.connect() as kept,
        server.connect() as busy,
        Client(Address.parse(f"unix:{path}")) as silent,
        Client(Address.parse(f"unix:{path}")) as kept_too,
    ):
        old = {worker.pid for worker in server.workers}
        assert {pid_of(kept), pid_of(kept_too)} <= old
        busy.send(request("GET", "/sleep?ms=2000"))
        new = server.upgrade()
        # What was under way has been finished where it was.
        assert busy.response().text.startswith("Slept 2000 ms")
        assert pid_of(busy) not in old
        # Who was idle, and who had not said anything yet, have not noticed.
        assert {pid_of(kept), pid_of(kept_too), pid_of(silent)}.isdisjoint(old)
    assert server.wait() == 0
    assert pid_file.read_text() == f"{new}\n"
    systemd.wait_for(lambda message: message.get("MAINPID") == str(first) and "READY" not in message)
    systemd.wait_for(lambda message: "READY" in message)
    # The old one says who is next, as it is the one that is heard, and nothing more.
    assert "Upgrading" in systemd.wait_for(lambda message: True)["STATUS"]
    assert systemd.read() == {"MAINPID": str(new)}
    assert systemd.read() == {"READY": "1", "MAINPID": str(new), "STATUS": "Serving with 2 workers"}
    assert (path.stat().st_ino, stat.S_IMODE(path.stat().st_mode)) == (file.st_ino, stat.S_IMODE(file.st_mode))
    assert len(server.found(r"Listening on http://127.0.0.1:" + str(server.address.port))) == 2
    # A second time, from a master that was not the first.
    newest = server.upgrade()
    assert pid_file.read_text() == f"{newest}\n"
    assert server.get("/").status == 200
    server.stop()
    assert not pid_file.exists()
    assert not path.exists()
    systemd.wait_for(lambda message: "STOPPING" in message)
    assert [each["MAINPID"] for each in systemd.told if "MAINPID" in each].count(str(newest)) == 2


@pytest.mark.parametrize("dispatch", ["auto", "request"])
def test_nobody_fails_under_load(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, *KEEP, app=FULL, workers=2)
    with under_load(server.address, clients=2) as load:
        for _ in range(2):
            server.upgrade()
            load.answered(20)


def test_workers_that_accept_themselves(serve: Serve) -> None:
    server = serve("--policy", "none", workers=2)
    old = {worker.pid for worker in server.workers}
    server.upgrade()
    assert server.get("/whoami").json()["pid"] not in old


def test_new_options(serve: Serve, tmp_path: Path) -> None:
    """What both bind is taken over, by whatever name; what is not there any more is closed, what is new opened."""
    file = tmp_path / "c.toml"
    gone, stays, comes = (str(tmp_path / name) for name in ("gone", "stays", "comes"))
    file.write_text(f"umask = '077'\nworkers = 1\nbind = ['unix:{gone}', 'unix:{stays}', '127.0.0.1:0']\n")
    server = serve("--config", str(file), bind=None, workers=None, ready=False)
    server.wanted_addresses = 3
    server.wait_ready()
    (port,) = (each.port for each in server.addresses if not isinstance(each.sockaddr, str))
    with Client(Address.parse(f"unix:{gone}")) as client, Client(Address.parse(f"unix:{gone}")) as idle:
        assert idle.ask("GET", "/").status == 200
        client.send(request("GET", "/sleep?ms=1500"))
        file.write_text(f"workers = 2\nbind = ['unix:{comes}', 'unix:{stays}', 'localhost:{port}']\n")
        server.upgrade()
        # What it was promised is kept.
        assert client.response().status == 200
        assert idle.rest() == b""
    assert not os.path.exists(gone)
    # What the file says no more is as it was when the server was started, and not as the old master has made it.
    masks = [Path(f"/proc/{who}/status").read_text().split("Umask:")[1].split()[0] for who in ("self", server.master)]
    assert masks[0] == masks[1]
    for address in (f"unix:{stays}", f"unix:{comes}", f"http://127.0.0.1:{port}"):
        with Client(Address.parse(address)) as client:
            assert client.ask("GET", "/").status == 200
    assert len(server.workers) == 2


CONFIGURATIONS = {
    "a bad option": ("workers = 0", "it exited with code 2", "workers=0"),
    "an application that is not there": ("app = 'no_such:app'", "it exited with code 3", "no_such"),
    "an address that is in use": ("bind = ['127.0.0.1:{port}']", "it exited with code 1", "address already in use"),
    "one that does not come up": (
        "app = 'tests.helpers.apps.hangs:app'\ntimeout_boot = 2",
        "it exited with code 3",
        "within 2 s",
    ),
}


@pytest.mark.parametrize("wrong", CONFIGURATIONS)
def test_a_new_master_that_fails(serve: Serve, systemd: NotifySocket, tmp_path: Path, wrong: str) -> None:
    file, pid_file, path = tmp_path / "c.toml", tmp_path / "pid", tmp_path / "s"
    text, ended, said = CONFIGURATIONS[wrong]
    good = f"app = 'examples.asgi_app:app'\nworkers = 1\nbind = ['unix:{path}']\n"
    file.write_text(good)
    server = serve(
        *("--config", str(file), "--pid", str(pid_file), *KEEP),
        app="--no-access-log",
        bind=None,
        workers=None,
        env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
    )
    systemd.wait_for(lambda message: "READY" in message)
    with socket.create_server(("127.0.0.1", 0)) as other, Client(Address.parse(f"unix:{path}")) as kept:
        pid = pid_of(kept)
        lines = [line for line in good.splitlines() if not line.startswith(text[:3])]
        file.write_text("\n".join([*lines, text.format(port=other.getsockname()[1]), ""]))
        server.signal(signal.SIGUSR2)
        (failed,) = server.wait_for(FAILED)
        assert (failed[2], failed[3]) == (ended, str(server.pid))
        assert server.found(re.escape(said))
        assert pid_of(kept) == pid
        assert not proc.alive(int(failed[1]))
    assert pid_file.read_text() == f"{server.pid}\n"
    assert "The last upgrade failed" in systemd.wait_for(lambda message: "READY" in message)["STATUS"]
    assert {message["MAINPID"] for message in systemd.told if "MAINPID" in message} == {str(server.pid)}
    # And the next try, with what is whole again.
    file.write_text(good)
    server.upgrade()
    with Client(Address.parse(f"unix:{path}")) as client:
        assert pid_of(client) != pid


@pytest.fixture
def starting(serve: Serve, tmp_path: Path) -> tuple[Server, Path]:
    """A new master beside the old one, whose application waits at the gate until the file is gone."""
    gate = tmp_path / "gate"
    server = serve(app="tests.helpers.apps.gated:app", env={"GATE_FILE": str(gate)})
    gate.touch()
    server.signal(signal.SIGUSR2)
    server.wait_for("waits at the gate")
    return server, gate


def test_once_at_a_time(starting: tuple[Server, Path]) -> None:
    server, gate = starting
    (found,) = server.wait_for(r"Upgrading: process (\d+) is to take over")
    server.signal(signal.SIGUSR2)
    server.wait_for(rf"SIGUSR2: nothing was done, the new master \(process {found[1]}\) is there already")
    os.kill(int(found[1]), signal.SIGUSR2)
    server.wait_for("SIGUSR2: nothing was done, the old master has not left yet")
    gate.unlink()
    server.wait_for(TAKES_OVER)
    assert server.wait() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGQUIT, 131)], ids=["TERM", "QUIT"])
def test_a_stop_meanwhile_is_for_both(starting: tuple[Server, Path], number: signal.Signals, code: int) -> None:
    server, _ = starting
    server.signal(number)
    assert server.wait() == code
    assert not server.found("Upgrade failed")
    assert server.processes() == []


def test_a_new_master_does_not_outlive_an_old_one_that_is_killed(starting: tuple[Server, Path]) -> None:
    server, gate = starting
    server.kill()
    gate.unlink()
    eventually(lambda: not server.processes(), "nobody is left")
    server.wait_for("is not to be succeeded any more")


def test_as_process_1(image: Path) -> None:
    """It stays, passes signals on, and ends as the last master does."""
    (image / "options").mkdir()
    command = [*dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "--workers", "1", "--pid", "pid"]
    with started(image, *command) as container:
        container.wait_for("is listening")
        for count in (1, 2):
            container.signal(signal.SIGUSR2)
            container.wait_for("has left everything to process", count)
            assert (image / "pid").read_text() != "1\n"
            assert container.run(*dockerfile("HEALTHCHECK")).stdout == "200\n"
        container.signal(signal.SIGTTIN)
        container.wait_for("Scaling from 1 to 2 workers")
        container.wait_for("is listening", 4)
        container.signal(signal.SIGQUIT)
        assert container.wait() == 131
        assert not (image / "pid").exists()


def test_process_1_ends_as_the_new_master_does(image: Path) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "--workers", "1") as container:
        container.wait_for("is listening")
        container.signal(signal.SIGUSR2)
        container.wait_for("has left everything to process")
        master = re.findall(r"Process (\d+) takes over", container.log.read_text())[-1]
        container.run("sh", "-c", f"kill -9 {master}")
        assert container.wait() == 137
        container.wait_for(f"The new master (process {master}) was killed by SIGKILL: nothing new is served any more")


def test_process_1_whose_successor_fails_serves_on(image: Path) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "--workers", "1") as container:
        container.wait_for("is listening")
        (image / "shop.py").rename(image / "shop.away")
        container.signal(signal.SIGUSR2)
        container.wait_for("process 1 serves on as before")
        assert container.run(*dockerfile("HEALTHCHECK")).stdout == "200\n"
        container.signal(signal.SIGTERM)
        assert container.wait() == 0


PROGRAM = """
import asyncio, os

async def answer(reader, writer):
    await reader.readline()
    writer.write(str(os.getpid()).encode())
    writer.close()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", {port})
    # At once: the other worker writes there too.
    os.write(1, b"port %d\\n" % server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.mark.parametrize("which", ["a port of its own", "any port"])
def test_a_programs_listener(serve: Serve, tmp_path: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        wanted = probe.getsockname()[1] if which == "a port of its own" else 0
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(port=wanted))
    server = serve(str(script), app="exec", bind=None, workers=None, ready=False)
    (found,) = {match[1] for match in server.wait_for(r"^port (\d+)$")}

    def ask() -> int:
        with socket.create_connection(("127.0.0.1", int(found)), DEADLINE) as client:
            client.sendall(b"\n")
            return int(client.makefile().read())

    old = ask()
    new = server.upgrade()
    eventually(lambda: len(server.found(r"^port (\d+)$")) > 1, "the new workers listen")
    assert {match[1] for match in server.found(r"^port (\d+)$")} == {found}
    assert ask() != old
    assert new != server.pid
