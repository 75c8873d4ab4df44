"""Opening what a `Bind` names: every kind, both ends of its life, and every reason why it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusterserve.binds import Bind
from clusterserve.errors import BindError
from clusterserve.master.listeners import Access, Listener, open_listener, set_access
from tests.helpers.server import ROOT
from tests.helpers.waiting import DEADLINE

from .rig import connect, no_more_descriptors, readable, reset

Open = Callable[..., Listener]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens listeners that are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def open_one(bind: str, backlog: int = 16) -> Listener:
            listener = open_listener(1, Bind.parse(bind), backlog, pinned=True)
            stack.callback(listener.close)
            return listener

        yield open_one


def refused(bind: str) -> BindError:
    """The error that opening `bind` raises."""
    with pytest.raises(BindError) as caught:
        open_listener(1, Bind.parse(bind), 16, pinned=True)
    assert caught.value.address == str(Bind.parse(bind))
    return caught.value


def accept(listener: Listener) -> socket.socket:
    """The next connection, once there is one."""
    assert select.select([listener.sock], [], [], DEADLINE)[0], "there is a connection to accept"
    return listener.sock.accept()[0]


# ── TCP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_port_0_becomes_a_real_port(opened: Open) -> None:
    listener = opened("127.0.0.1:0")
    host, port = listener.sock.getsockname()
    assert host == "127.0.0.1"
    assert port > 0
    assert listener.sockname == [host, port]
    assert listener.url == listener.address == f"http://127.0.0.1:{port}"
    assert listener.is_open
    assert listener.sock.getblocking() is False
    assert listener.sock.get_inheritable() is False
    assert listener.sock.proto == socket.IPPROTO_TCP
    with connect(listener), accept(listener):
        pass


def test_two_listeners_on_port_0_are_two(opened: Open) -> None:
    assert opened("127.0.0.1:0").url != opened("127.0.0.1:0").url


def test_all_interfaces_are_reached_at_the_loopback_address(opened: Open) -> None:
    listener = opened(":0")
    port = listener.sock.getsockname()[1]
    assert listener.url == f"http://127.0.0.1:{port}"
    assert listener.address == f"http://0.0.0.0:{port}"


def test_ipv6(opened: Open) -> None:
    listener = opened("[::1]:0")
    port = listener.sock.getsockname()[1]
    assert listener.url == listener.address == f"http://[::1]:{port}"
    assert listener.sockname == ["::1", port, 0, 0]
    with connect(listener), accept(listener) as server:
        assert server.family == socket.AF_INET6


def test_ipv6_on_all_interfaces_is_dual_stack(opened: Open) -> None:
    listener = opened("[::]:0")
    port = listener.sock.getsockname()[1]
    assert listener.url == f"http://[::1]:{port}"
    assert listener.address == f"http://[::]:{port}"
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as client:
            client.connect((host, port))
            with accept(listener) as server:
                assert server.getpeername()[0] in (host, f"::ffff:{host}")


def test_a_name_means_one_address(opened: Open) -> None:
    assert opened("localhost:0").sock.getsockname()[0] == "127.0.0.1"


def test_a_port_whose_last_connections_are_in_time_wait_can_be_had_again() -> None:
    listener = open_listener(1, Bind.parse("127.0.0.1:0"), 16, pinned=True)
    port = listener.sock.getsockname()[1]
    with connect(listener) as client:
        # Whoever closes first waits.
        accept(listener).close()
        assert client.recv(1) == b""
    listener.close()
    again = open_listener(2, Bind.parse(f"127.0.0.1:{port}"), 16, pinned=True)
    assert again.sock.getsockname()[1] == port
    again.close()


def test_accepted_sockets_inherit_nodelay(opened: Open) -> None:
    for bind in ("127.0.0.1:0", "[::1]:0"):
        listener = opened(bind)
        with connect(listener), accept(listener) as server:
            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_deferred_client_comes_with_its_first_bytes(opened: Open) -> None:
    listener = opened("127.0.0.1:0")
    assert listener.defer(True) is True
    with connect(listener) as client:
        # Its handshake is over: a listener that does not defer would have it by now.
        assert not select.select([listener.sock], [], [], 0)[0]
        client.sendall(b"x")
        with accept(listener) as server:
            assert readable(server)


def test_a_deferred_client_that_leaves_in_silence_comes_at_once(opened: Open) -> None:
    listener = opened("127.0.0.1:0")
    listener.defer(True)
    connect(listener).close()
    with accept(listener) as server:
        assert server.recv(1) == b""


def test_deferring_can_be_ended(opened: Open) -> None:
    listener = opened("127.0.0.1:0")
    listener.defer(True)
    assert listener.defer(False) is False
    with connect(listener), accept(listener) as server:
        assert not readable(server)


def test_unix_sockets_cannot_defer(opened: Open, tmp_path: Path) -> None:
    listener = opened(f"unix:{tmp_path}/s")
    assert listener.defer(True) is False
    with connect(listener), accept(listener) as server:
        assert not readable(server)


def backlog_of(listener: Listener) -> int:
    """What the kernel says it is."""
    port = listener.sock.getsockname()[1]
    shown = subprocess.run(
        ["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True, check=True, timeout=DEADLINE
    ).stdout
    # State, Recv-Q, Send-Q: of a listening socket the third is its backlog.
    return int(shown.split()[2])


@pytest.mark.needs_tool("ss")
def test_the_backlog_reaches_the_kernel_and_only_grows(opened: Open) -> None:
    listener = opened("127.0.0.1:0", 7)
    assert backlog_of(listener) == listener.backlog == 7
    listener.listen(23)
    assert backlog_of(listener) == listener.backlog == 23
    listener.listen(5)
    assert backlog_of(listener) == listener.backlog == 23


def test_the_backlog_of_a_unix_socket_is_how_many_may_wait(opened: Open, tmp_path: Path) -> None:
    listener = opened(f"unix:{tmp_path}/s", 2)
    with contextlib.ExitStack() as stack:
        # The kernel lets one more in than it is told.
        for _ in range(3):
            stack.enter_context(connect(listener))
        late = stack.enter_context(socket.socket(socket.AF_UNIX))
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.connect(f"{tmp_path}/s")


# ── unix ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_unix_socket_and_its_file(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0o077)
    try:
        listener = opened(f"unix:{path}")
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert listener.url == listener.address == f"unix:{path}"
    assert listener.sockname == str(path)
    with connect(listener), accept(listener):
        pass
    listener.close()
    assert not path.exists()
    assert not listener.is_open


def test_addresses_can_be_asked_for_after_the_end(tmp_path: Path) -> None:
    for bind in ("127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/s"):
        listener = open_listener(1, Bind.parse(bind), 16, pinned=True)
        known = listener.url, listener.address, listener.sockname
        listener.close()
        assert (listener.url, listener.address, listener.sockname) == known


def test_a_stale_file_is_replaced(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    listener = opened(f"unix:{path}")
    with connect(listener), accept(listener):
        pass


@pytest.mark.parametrize("waiting", [0, 2])
def test_a_file_in_use_is_left_alone(tmp_path: Path, waiting: int) -> None:
    path = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        alive = stack.enter_context(socket.socket(socket.AF_UNIX))
        alive.bind(str(path))
        alive.listen(1)
        for _ in range(waiting):
            # With two of them its backlog is full: it cannot even be asked.
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        error = refused(f"unix:{path}")
        assert error.errno == errno.EADDRINUSE
        assert str(error) == (
            f"cannot listen on unix:{path}: address already in use; "
            "stop the program that uses it, or choose another address"
        )
        alive.setblocking(False)
        for _ in range(waiting):
            stack.enter_context(alive.accept()[0])
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "s"
    make(path)
    before = path.stat()
    error = refused(f"unix:{path}")
    assert error.errno == errno.EEXIST
    assert "a file that is no socket is in the way" in str(error)
    assert path.stat() == before


def test_a_dangling_link_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.symlink_to(tmp_path / "nothing")
    assert refused(f"unix:{path}").errno == errno.EADDRINUSE
    assert path.is_symlink()


def test_another_programs_file_is_not_removed_at_the_end(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = opened(f"unix:{path}")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        listener.close()
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_a_file_that_is_gone_at_the_end(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = opened(f"unix:{path}")
    path.unlink()
    listener.close()


def test_a_relative_path_is_found_again_from_another_directory(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = opened("unix:s")
    assert (tmp_path / "s").exists()
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "s").exists()


def test_an_abstract_name_has_no_file(opened: Open) -> None:
    name = f"@clusterserve-{uuid.uuid4().hex}"
    listener = opened(f"unix:{name}")
    assert listener.url == listener.address == f"unix:{name}"
    assert listener.sockname == name
    assert not Path(name).exists()
    with connect(listener), accept(listener):
        pass
    assert refused(f"unix:{name}").errno == errno.EADDRINUSE
    listener.close()
    opened(f"unix:{name}")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    error = refused(f"unix:{tmp_path}/{'s' * 108}")
    assert error.errno == errno.EINVAL
    assert "path too long" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_path_in_no_directory(tmp_path: Path) -> None:
    error = refused(f"unix:{tmp_path}/no/s")
    assert error.errno == errno.ENOENT
    assert str(error).endswith("; create the directory first")


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(f"unix:{tmp_path}/file/s").errno == errno.ENOTDIR


# ── inherited ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_an_inherited_socket(opened: Open, tmp_path: Path, kind: str) -> None:
    addresses: dict[str, tuple[int, tuple[str, int] | str]] = {
        "tcp": (socket.AF_INET, ("127.0.0.1", 0)),
        "tcp6": (socket.AF_INET6, ("::1", 0)),
        "unix": (socket.AF_UNIX, str(tmp_path / "s")),
    }
    family, address = addresses[kind]
    with socket.socket(family) as given:
        given.bind(address)
        given.listen(1)
        listener = opened(f"fd://{given.fileno()}")
        assert listener.sock.family == family
        assert listener.sock.getsockname() == given.getsockname()
        assert listener.sock.proto == (0 if kind == "unix" else socket.IPPROTO_TCP)
        with connect(listener), accept(listener) as server:
            assert kind == "unix" or server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        listener.close()
        # Whoever gave it still has it, its file included.
        with connect(Listener(1, Bind.parse(f"fd://{given.fileno()}"), given, True, 1)):
            pass


def _datagram() -> socket.socket:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def _silent() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def _packets() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(f"\0clusterserve-{uuid.uuid4().hex}")
    sock.listen()
    return sock


def _connected() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname())


@pytest.mark.parametrize("make", [_datagram, _silent, _packets, _connected, lambda: socket.socket(socket.AF_UNIX)])
def test_an_inherited_socket_that_does_not_listen(make: Callable[[], socket.socket]) -> None:
    with make() as given:
        given.settimeout(7)
        error = refused(f"fd://{given.fileno()}")
        assert error.errno == errno.EINVAL
        assert str(error) == f"cannot listen on fd://{given.fileno()}: it is not a listening socket"
        assert given.gettimeout() == 7


def test_an_inherited_descriptor_that_is_no_socket(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        error = refused(f"fd://{file.fileno()}")
    assert error.errno == errno.ENOTSOCK
    assert str(error) == f"cannot listen on fd://{error.address.removeprefix('fd://')}: it is not a socket"


def test_a_descriptor_that_is_not_open() -> None:
    number = os.dup(0)
    os.close(number)
    error = refused(f"fd://{number}")
    assert error.errno == errno.EBADF
    assert str(error).endswith("; pass the descriptor of a listening socket")


# ── what cannot be had ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_address_in_use(opened: Open) -> None:
    port = opened("127.0.0.1:0").sock.getsockname()[1]
    error = refused(f"127.0.0.1:{port}")
    assert error.errno == errno.EADDRINUSE
    assert str(error) == (
        f"cannot listen on 127.0.0.1:{port}: address already in use; "
        "stop the program that uses it, or choose another address"
    )


def test_an_address_of_another_machine() -> None:
    error = refused("192.0.2.1:8000")
    assert error.errno == errno.EADDRNOTAVAIL
    assert str(error).endswith("; this machine has no such address")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70, "a..b"])
def test_a_host_without_an_address(host: str) -> None:
    error = refused(f"{host}:8000")
    assert error.errno == errno.EADDRNOTAVAIL
    assert str(error).startswith(f"cannot listen on {host}:8000: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:{}/s", "fd://0"])
def test_no_descriptor_to_be_had(tmp_path: Path, bind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        bind = bind.format(tmp_path).replace("fd://0", f"fd://{given.fileno()}")
        with no_more_descriptors():
            error = refused(bind)
    assert error.errno == errno.EMFILE
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_mode_cannot_be_set_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chmod(path: str, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # No file system at hand creates sockets and refuses their owner to change the mode.
    monkeypatch.setattr(os, "chmod", chmod)
    error = refused(f"unix:{tmp_path}/s")
    assert error.errno == errno.EPERM
    assert str(error).endswith("; choose an address you may use")
    assert list(tmp_path.iterdir()) == []


_AS_NOBODY = """
    import ctypes, os, socket, sys
    from clusterserve.binds import Bind
    from clusterserve.errors import BindError
    from clusterserve.master.listeners import open_listener

    bind = Bind.parse(sys.argv[1])
    # Who is nobody may not be able to import it any more.
    "localhost".encode("idna")
    family, address = socket.AF_UNIX, bind.path
    if bind.kind == "tcp":
        family, address = socket.AF_INET, (bind.host, bind.port)
    if os.getuid() == 0:
        # A network namespace of its own knows privileged ports, wherever the machine has abolished them.
        ctypes.CDLL(None).unshare(0x40000000)
        os.setuid(65534)
    try:
        with socket.socket(family) as probe:
            probe.bind(address)
        refused = False
    except PermissionError:
        refused = True
    try:
        open_listener(1, bind, 16, pinned=True).close()
        print(refused, False)
    except BindError as exc:
        print(refused, exc.errno, exc)
    # Nobody may write what would be written at an exit in order.
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("kind", ["port", "path"])
def test_no_permission(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o555)
    bind = "0.0.0.0:1" if kind == "port" else f"unix:{tmp_path}/s"
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_AS_NOBODY), bind],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=True,
    )  # fmt: skip
    advice = "choose a port of at least 1024, or a directory you may write to"
    told = f"True {errno.EACCES} cannot listen on {bind}: permission denied; {advice}\n"
    assert finished.stdout == told, finished.stderr
    assert finished.stderr == ""
    tmp_path.chmod(0o755)


def test_a_client_that_is_gone_before_it_was_accepted(opened: Open) -> None:
    listener = opened("127.0.0.1:0")
    reset(connect(listener))
    with accept(listener) as server, pytest.raises(ConnectionResetError):
        server.recv(1)


def test_access_is_given_to_a_socket_and_to_nothing_else(tmp_path: Path) -> None:
    """Who can write to the directory may have put something in its place meanwhile."""
    others = tmp_path / "others"
    others.touch(mode=0o600)
    (tmp_path / "link").symlink_to(others)
    for path in (others, tmp_path / "link", tmp_path / "nothing"):
        with pytest.raises(OSError, match=r"No such file|Too many levels"):
            set_access(str(path), Access(0o666))
    assert others.stat().st_mode & 0o777 == 0o600
