"""Every way to say where to listen."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.raw import Address, fetch
from tests.helpers.server import LISTENING_ON, Serve


def hello(address: Address) -> None:
    response = fetch(address, "/")
    assert response.status == 200
    assert response.text.startswith("Hello from worker ")


def test_every_spelling_and_each_address_is_told_once(serve: Serve) -> None:
    server = serve(
        bind=["127.0.0.1:0", "127.0.0.1:0", "[::1]:0", "localhost:0", ":0", f"unix:@clusterserve-e2e-{os.getpid()}"]
    )
    assert len(server.found(LISTENING_ON)) == 6
    first, second, version6, _, everywhere, abstract = server.addresses
    for address in (first, second):
        # The real one.
        assert address.port != 0
        assert len(proc.listening_inodes(address.port)) == 1
    assert first.port != second.port
    assert version6.family == socket.AF_INET6
    assert abstract.family == socket.AF_UNIX
    for address in server.addresses:
        if address != everywhere:
            hello(address)
    hello(everywhere.reached_by("127.0.0.1"))
    hello(everywhere.reached_by("127.0.0.9"))


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody else gets, neither to listen nor to connect from, but that may be bound all the same."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_a_port_that_is_given_can_be_bound_again_at_once(serve: Serve, port: int) -> None:
    first = serve(bind=f"127.0.0.1:{port}")
    assert first.address.port == port
    with first.connect() as client:
        assert client.ask("GET", "/").status == 200
        # The server closes first, so that its end is the one in TIME_WAIT.
        assert first.stop() == 0
    second = serve(bind=f"127.0.0.1:{port}")
    assert second.address.port == port
    hello(second.address)


def test_a_unix_path(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = serve(bind=f"unix:{path}", workers=2)
    assert server.address.sockaddr == str(path)
    assert stat.S_ISSOCK(path.stat().st_mode)
    # Everybody may connect, as under uvicorn: the directory says who can reach it.
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    server.warm()
    with server.client() as client:
        assert client.get("/").status_code == 200
    assert server.stop() == 0
    assert not path.exists()


def test_a_stale_socket_file_is_replaced(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    hello(serve(bind=f"unix:{path}").address)


def test_a_socket_file_left_by_a_killed_master_is_replaced(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = serve(bind=f"unix:{path}")
    first.kill()
    first.wait()
    assert path.exists()
    hello(serve(bind=f"unix:{path}").address)


@pytest.mark.parametrize("option", ["--bind", "--fd"])
def test_an_inherited_tcp_socket(serve: Serve, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        number = inherited.fileno()
        options = ["--bind", f"fd://{number}"] if option == "--bind" else ["--fd", str(number)]
        server = serve(*options, bind=None, pass_fds=[number])
        assert server.address.port == inherited.getsockname()[1]
        hello(server.address)


def test_an_inherited_unix_socket(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(str(path))
        inherited.listen()
        server = serve(bind=f"fd://{inherited.fileno()}", pass_fds=[inherited.fileno()])
        hello(Address.parse(f"unix:{path}"))
        assert server.stop() == 0
        # Its file belongs to whoever made it.
        assert path.exists()
        path.unlink()


@pytest.mark.parametrize("policy", ["rr", "none"])
def test_several_kinds_at_once(serve: Serve, tmp_path: Path, policy: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        server = serve(
            "--policy",
            policy,
            workers=2,
            bind=["127.0.0.1:0", "[::1]:0", f"unix:{tmp_path / 's'}", "127.0.0.1:0", f"fd://{inherited.fileno()}"],
            pass_fds=[inherited.fileno()],
        )
        families = [address.family for address in server.addresses]
        assert families == [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_INET, socket.AF_INET]
        assert len({address.sockaddr for address in server.addresses}) == 5
        assert len(server.found(LISTENING_ON)) == 5
        for address in server.addresses:
            for _ in range(3):
                hello(address)


def test_host_and_port(serve: Serve) -> None:
    server = serve("--host", "127.0.0.2", "--port", "0", bind=None)
    assert server.address.sockaddr == ("127.0.0.2", server.address.port)
    hello(server.address)


def test_port_alone(serve: Serve) -> None:
    server = serve("--port", "0", bind=None)
    assert server.address.sockaddr == ("127.0.0.1", server.address.port)
    hello(server.address)


def test_uds(serve: Serve, tmp_path: Path) -> None:
    server = serve("--uds", str(tmp_path / "s"), bind=None)
    assert server.address.sockaddr == str(tmp_path / "s")
    hello(server.address)


@pytest.mark.needs_tool("ss")
@pytest.mark.parametrize("policy", ["rr", "none"])
@pytest.mark.parametrize(("options", "expected"), [((), 2048), (("--backlog", "77"), 77)])
def test_the_backlog_reaches_the_kernel(serve: Serve, policy: str, options: tuple[str, ...], expected: int) -> None:
    # The kernel caps what a program asks for.
    expected = min(expected, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    server = serve("--policy", policy, *options)
    filter_ = f"sport = :{server.address.port}"
    table = subprocess.run(["ss", "-ltnH", filter_], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(table) == 1
    # State, Recv-Q, Send-Q: for a listening socket the last is its backlog.
    assert int(table[0].split()[2]) == expected
