"""Clustering at the level of the event loop: what `create_server` asks the master for, and what it returns."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterserve.binds import Bind
from clusterserve.core.messages import Closed, Listen, Listening
from clusterserve.core.records import Kind
from clusterserve.worker.loop import ClusterLoopMixin
from clusterserve.worker.server import BindSocket, FauxServer
from tests.helpers import proc
from tests.helpers.descriptors import room_for
from tests.helpers.loops import until
from tests.worker.clustered import FakeMaster
from tests.worker.harness import Recorder, Recorders

Loop = asyncio.AbstractEventLoop
CERTIFICATE = Path(__file__).parent / "certificate.pem"


@pytest.fixture
def loop(fake: FakeMaster) -> Loop:
    """The cluster loop."""
    return fake.loop


def echo(protocol: Recorder, data: bytes) -> None:
    protocol.transport.write(data)
    protocol.transport.close()


async def fetch(loop: Loop, address: Any, data: bytes = b"hello") -> bytes:
    """What a real client gets from a real address."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.setblocking(False)
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, data)
        answer = bytearray()
        while part := await loop.sock_recv(client, 65536):
            answer += part
        return bytes(answer)


def test_the_class(loop_class: type[Any], fake: FakeMaster) -> None:
    kind = type(fake.loop)
    assert issubclass(kind, ClusterLoopMixin)
    assert issubclass(kind, loop_class)
    assert kind.__name__ == f"Cluster{loop_class.__name__}"


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────────


class TestTheRequest:
    @pytest.mark.parametrize(
        ("arguments", "bind"),
        [
            ({"host": "127.0.0.1", "port": 8000}, "127.0.0.1:8000"),
            ({"host": "::1", "port": 8000}, "[::1]:8000"),
            ({"host": "0:0::1", "port": 8000}, "[::1]:8000"),
            ({"host": "localhost", "port": 0, "family": socket.AF_INET}, "127.0.0.1:0"),
            ({"host": None, "port": 8000}, "0.0.0.0:8000 [::]:8000"),
            ({"host": "", "port": "http"}, "0.0.0.0:80 [::]:80"),
            ({"host": None, "port": 8000, "family": socket.AF_INET6}, "[::]:8000"),
            ({"host": ["127.0.0.1", "127.0.0.2", "127.0.0.1"], "port": 1}, "127.0.0.1:1 127.0.0.2:1"),
            ({"host": "127.0.0.1"}, "127.0.0.1:0"),
            ({"host": "*", "port": 8000}, "*:8000"),
            ({"host": "fd://3"}, "fd://3"),
            ({}, "*:0"),
        ],
    )
    async def test_tcp(self, loop: Loop, fake: FakeMaster, arguments: dict[str, Any], bind: str) -> None:
        server = await loop.create_server(asyncio.Protocol, **arguments)
        assert {request.bind for request in fake.of(Listen)} == set(bind.split())
        assert len(server.sockets) == len(bind.split())
        # As asyncio: a host of IPv6 is not one of IPv4.
        assert all(request.v6only == request.bind.startswith("[") for request in fake.of(Listen))
        assert not any(request.pinned or request.client_speaks_first for request in fake.of(Listen))

    async def test_the_backlog(self, loop: Loop, fake: FakeMaster) -> None:
        await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, backlog=7)
        await loop.create_unix_server(asyncio.Protocol, "/run/x.sock", backlog=8)
        assert [request.backlog for request in fake.of(Listen)] == [7, 8]

    async def test_the_addresses_that_the_worker_is_given(self, loop: Loop, fake: FakeMaster) -> None:
        """Only of these it is known that their clients speak first."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for bind in (Bind("tcp", host="127.0.0.1", port=0), Bind("unix", path="/run/x.sock"), Bind("fd", fd=3)):
            await loop.create_server(asyncio.Protocol, sock=BindSocket(bind), backlog=2048, ssl=None)
        await loop.create_server(asyncio.Protocol, sock=BindSocket(Bind("fd", fd=3)), ssl=context)
        assert all(r.pinned for r in fake.of(Listen))
        assert [(r.bind, r.backlog, r.client_speaks_first) for r in fake.of(Listen)] == [
            ("127.0.0.1:0", 2048, True),
            ("unix:/run/x.sock", 2048, True),
            ("fd://3", 2048, True),
            # A TLS client speaks first to the loop's TLS transport.
            ("fd://3", 100, False),
        ]

    @pytest.mark.parametrize("kind", [str, Path, os.fsencode])
    async def test_a_unix_path_is_the_same_for_the_master(
        self, loop: Loop, fake: FakeMaster, kind: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        await loop.create_unix_server(asyncio.Protocol, kind("x.sock"))
        await loop.create_unix_server(asyncio.Protocol, kind("/run/x.sock"))
        assert [request.bind for request in fake.of(Listen)] == [f"unix:{tmp_path}/x.sock", "unix:/run/x.sock"]
        assert [request.client_speaks_first for request in fake.of(Listen)] == [False, False]

    @pytest.mark.parametrize("path", ["@name", "\0name", b"\0name"])
    async def test_an_abstract_name(self, loop: Loop, fake: FakeMaster, path: Any) -> None:
        await loop.create_unix_server(asyncio.Protocol, path)
        assert [request.bind for request in fake.of(Listen)] == ["unix:@name"]

    async def test_two_servers_on_port_0_are_two_listeners(self, loop: Loop, fake: FakeMaster) -> None:
        first = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        second = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        assert first.sockets[0].getsockname() != second.sockets[0].getsockname()

    @pytest.mark.parametrize("code", [errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL])
    async def test_errors_are_the_kernels(self, loop: Loop, fake: FakeMaster, code: int) -> None:
        fake.answers = fake.refuse(code, "cannot listen")
        with pytest.raises(OSError, match="cannot listen") as caught:
            await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        assert caught.value.errno == code
        with pytest.raises(OSError, match="cannot listen"):
            await loop.create_unix_server(asyncio.Protocol, "/run/x.sock")

    async def test_what_is_no_address_is_not_asked_for(self, loop: Loop, fake: FakeMaster) -> None:
        for host, port in (("no host", 0), ("127.0.0.1", 65536), ("*", -1), ("fd://x", None)):
            with pytest.raises((OSError, OverflowError, ValueError)):
                await loop.create_server(asyncio.Protocol, host, port)
        assert fake.of(Listening) == []


# ── what is returned ────────────────────────────────────────────────────────────────────────────────────────────────


class TestTheFauxServer:
    async def test_it_is_fed_by_the_master(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        server = await loop.create_server(recorders.on(data=echo), "127.0.0.1", 0)
        assert isinstance(server, FauxServer)
        assert server.sockets[0].getsockname() == ("127.0.0.1", 8001)
        assert await fake.said(Listening) == [Listening(1)]
        (client,) = fake.hand(1, b"hello")
        assert await fake.rest(client) == b"hello"
        # Its client need not have spoken: the loop's own transport from the start.
        assert recorders.only.phases[0] == "REAL"

    async def test_the_addresses_that_the_worker_is_given_are_lazy(
        self, loop: Loop, fake: FakeMaster, recorders: Recorders
    ) -> None:
        bind = BindSocket(Bind("tcp", host="127.0.0.1", port=0))
        await loop.create_server(recorders.on(data=echo), sock=bind)
        (client,) = fake.hand(1, b"hello")
        assert await fake.rest(client) == b"hello"
        assert recorders.only.phases == ["LAZY", "LAZY", "CLOSED"]

    async def test_a_unix_server(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        fake.answers = lambda request: fake.grant(request, "/run/x.sock", socket.AF_UNIX)
        server = await loop.create_unix_server(recorders.on(data=echo), "/run/x.sock")
        assert server.sockets[0].getsockname() == "/run/x.sock"
        assert server.sockets[0].family is socket.AF_UNIX
        (client,) = fake.hand(1, b"hello")
        assert await fake.rest(client) == b"hello"

    async def test_close_goes_to_the_master(self, loop: Loop, fake: FakeMaster) -> None:
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        async with server:
            pass
        assert await fake.said(Closed) == [Closed(1)]

    async def test_tls(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        await loop.create_server(recorders.on(data=echo), "127.0.0.1", 0, ssl=context, ssl_handshake_timeout=10.0)
        (client,) = fake.hand(1, b"")
        trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
        reader, writer = await asyncio.open_connection(sock=client.dup(), ssl=trusting, server_hostname="localhost")
        # Python 3.10's server waits for the end of the connection, which a second copy here would keep open.
        client.close()
        writer.write(b"hello")
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()
        await fake.answered(1, Kind.CLOSED)

    @pytest.mark.parametrize("family", ["tcp", "unix"])
    async def test_asyncios_streams(self, loop: Loop, fake: FakeMaster, family: str) -> None:
        """Everything that is built on `create_server` is clustered without knowing."""

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello, ")
            async for line in reader:
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        if family == "tcp":
            server = await asyncio.start_server(talk, "127.0.0.1", 0)
        else:
            server = await asyncio.start_unix_server(talk, "/run/x.sock")
        async with server:
            (client,) = fake.hand(1, b"one\n")
            await loop.sock_sendall(client, b"two\nthree")
            client.shutdown(socket.SHUT_WR)
            assert await fake.rest(client) == b"hello, ONE\nTWO\nTHREE"
            await fake.answered(1, Kind.CLOSED)
        assert await fake.said(Closed) == [Closed(1)]

    async def test_a_stream_that_is_not_read(self, loop: Loop, fake: FakeMaster) -> None:
        """Back-pressure both ways, through the transport that was handed over."""
        data = bytes(range(256)) * 4000

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for start in range(0, len(data), 10_000):
                writer.write(await reader.readexactly(min(10_000, len(data) - start)))
                await writer.drain()
            writer.close()

        await asyncio.start_server(talk, "127.0.0.1", 0, limit=1000)
        (client,) = fake.hand(1, b"")
        sending = loop.create_task(loop.sock_sendall(client, data))
        with client.dup() as reading:
            assert await fake.rest(reading) == data
        await sending


class TestASharedListener:
    """Policy none: the kernel decides who accepts."""

    @pytest.mark.parametrize("family", ["tcp", "unix"])
    @pytest.mark.parametrize("given", [False, True])
    async def test_a_real_server_on_the_masters_socket(
        self, loop: Loop, fake: FakeMaster, recorders: Recorders, tmp_path: Path, family: str, given: bool
    ) -> None:
        recorders.on(data=echo)
        path = str(tmp_path / "s")
        bind = Bind("unix", path=path) if family == "unix" else Bind("tcp", host="127.0.0.1", port=0)
        with socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET) as listener:
            listener.bind(path if family == "unix" else ("127.0.0.1", 0))
            listener.listen()
            fake.answers = fake.share(listener)
            if given:
                server = await loop.create_server(recorders, sock=BindSocket(bind))
            elif family == "unix":
                server = await loop.create_unix_server(recorders, path)
            else:
                server = await loop.create_server(recorders, "127.0.0.1", 0)
            assert not isinstance(server, FauxServer)
            assert server.sockets[0].getsockname() == listener.getsockname()
            assert os.fstat(server.sockets[0].fileno()).st_ino == os.fstat(listener.fileno()).st_ino
            assert await fake.said(Listening) == [Listening(1)]
            assert await fetch(loop, listener.getsockname()) == b"hello"
            server.close()
            await server.wait_closed()
            # The file is the master's.
            assert family == "tcp" or proc.unix_inodes(path)

    async def test_tls(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            fake.answers = fake.share(listener)
            server = await loop.create_server(recorders.on(data=echo), "127.0.0.1", 0, ssl=context)
            trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
            reader, writer = await asyncio.open_connection(
                *listener.getsockname(), ssl=trusting, server_hostname="localhost"
            )
            writer.write(b"hello")
            assert await reader.read() == b"hello"
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()

    async def test_it_is_lost_at_the_descriptor_limit(self, loop: Loop, fake: FakeMaster) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            requests: list[Listen] = []
            fake.answers = requests.append
            task = loop.create_task(loop.create_server(asyncio.Protocol, "127.0.0.1", 0))
            await until(lambda: requests, "it is asked for")
            fake.share(listener)(requests[0])
            with room_for(0):
                fake.link._channel._read()  # type: ignore[union-attr]
            with pytest.raises(OSError, match="too many open files in this worker") as caught:
                await task
            assert caught.value.errno == errno.EMFILE
            assert fake.of(Listening) == []


class TestPastTheMaster:
    """Servers with sockets of their own stay the loop's."""

    async def test_a_ready_made_socket(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = await loop.create_server(recorders.on(data=echo), sock=listener)
        assert await fetch(loop, listener.getsockname()) == b"hello"
        server.close()
        await server.wait_closed()
        assert fake.messages == []

    async def test_reuse_port(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        server = await loop.create_server(recorders.on(data=echo), "127.0.0.1", 0, reuse_port=True)
        assert await fetch(loop, server.sockets[0].getsockname()) == b"hello"
        server.close()
        await server.wait_closed()
        assert fake.messages == []

    async def test_a_ready_made_unix_socket(
        self, loop: Loop, fake: FakeMaster, recorders: Recorders, tmp_path: Path
    ) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        server = await loop.create_unix_server(recorders.on(data=echo), sock=listener)
        assert await fetch(loop, str(tmp_path / "s")) == b"hello"
        server.close()
        await server.wait_closed()
        assert fake.messages == []

    async def test_neither_path_nor_socket(self, loop: Loop, fake: FakeMaster) -> None:
        with pytest.raises(ValueError, match="path was not specified"):
            await loop.create_unix_server(asyncio.Protocol)
        assert fake.messages == []
