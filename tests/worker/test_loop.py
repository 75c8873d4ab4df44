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

from clusterserve import listen_options
from clusterserve.binds import Bind
from clusterserve.core.messages import Closed, Listen, Listened, Listening
from clusterserve.core.records import Kind
from clusterserve.listen_options import pack_data, unpack_data
from clusterserve.worker.loop import ClusterLoopMixin
from clusterserve.worker.server import BindSocket, FauxServer
from tests.helpers import proc
from tests.helpers.descriptors import room_for
from tests.helpers.loops import turns, until
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
        assert all(r.client_speaks_first for r in fake.of(Listen))
        assert [(r.bind, r.backlog, r.tls) for r in fake.of(Listen)] == [
            ("127.0.0.1:0", 2048, False),
            ("unix:/run/x.sock", 2048, False),
            ("fd://3", 2048, False),
            ("fd://3", 100, True),
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


# ── several listeners, and options ──────────────────────────────────────────────────────────────────────────────────


class TestSeveral:
    async def test_one_server_on_several_listeners(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        server = await loop.create_server(recorders.on(data=echo), ["127.0.0.1", "127.0.0.2"], 0)
        assert await fake.said(Listening, 2) == [Listening(1), Listening(2)]
        for key in (1, 2):
            (client,) = fake.hand(key, b"hello")
            assert await fake.rest(client) == b"hello"
        server.close()
        assert server.sockets == ()
        assert await fake.said(Closed, 2) == [Closed(1), Closed(2)]

    async def test_under_policy_none(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
            sockets = [one, two]
            fake.answers = lambda request: fake.share(sockets[request.request - 1])(request)
            server = await loop.create_server(recorders.on(data=echo), ["127.0.0.1", "127.0.0.2"], 0)
            assert [sock.getsockname() for sock in server.sockets] == [one.getsockname(), two.getsockname()]
            assert server.is_serving()
            for each in sockets:
                assert await fetch(loop, each.getsockname()) == b"hello"
            server.close()
            await server.wait_closed()
            assert server.sockets == ()
            assert await fake.said(Closed, 2) == [Closed(1), Closed(2)]

    async def test_all_or_none(self, loop: Loop, fake: FakeMaster) -> None:
        refuse = fake.refuse(errno.EADDRINUSE, "taken")
        fake.answers = lambda request: refuse(request) if "0.2" in request.bind else fake.grant(request)
        with pytest.raises(OSError, match="taken"):
            await loop.create_server(asyncio.Protocol, ["127.0.0.1", "127.0.0.2"], 80)
        assert await fake.said(Closed) == [Closed(1)]
        assert fake.of(Listening) == []

    async def test_a_family_that_is_missing(self, loop: Loop, fake: FakeMaster) -> None:
        """As asyncio: a machine without IPv6 has all addresses without those."""
        refuse = fake.refuse(errno.EAFNOSUPPORT, "no such family")
        fake.answers = lambda request: refuse(request) if "[" in request.bind else fake.grant(request)
        server = await loop.create_server(asyncio.Protocol, None, 80)
        assert len(server.sockets) == 1
        with pytest.raises(OSError, match="no such family"):
            await loop.create_server(asyncio.Protocol, "::1", 80)


class TestOptions:
    async def test_what_is_passed_on(self, loop: Loop, fake: FakeMaster) -> None:
        await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, reuse_address=False, keep_alive=True)  # type: ignore[call-overload]
        (request,) = fake.of(Listen)
        assert (request.reuse_address, request.keep_alive) == (False, True)

    @pytest.mark.parametrize("shared", [False, True])
    async def test_serving_later(self, loop: Loop, fake: FakeMaster, recorders: Recorders, shared: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            if shared:
                fake.answers = fake.share(listener)
            server = await loop.create_server(recorders, "127.0.0.1", 0, start_serving=False)
            await turns(3)
            assert not server.is_serving()
            assert fake.of(Listening) == []
            await server.start_serving()
            assert server.is_serving()
            assert await fake.said(Listening) == [Listening(1)]

    async def test_closed_before_it_serves(self, loop: Loop, fake: FakeMaster) -> None:
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, start_serving=False)
        server.close()
        assert await fake.said(Closed) == [Closed(1)]
        assert fake.of(Listening) == []

    @pytest.mark.parametrize("data", [{"a": [1, None]}, b"\0\xff"])
    async def test_data_for_all(self, loop: Loop, fake: FakeMaster, data: Any) -> None:
        def answer(request: Listen) -> None:
            fake.channel.send(Listened(request.request, 1, 0, "", 2, ["127.0.0.1", 1], False, data=pack_data("first")))

        fake.answers = answer
        with listen_options(data=data) as options:
            await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        (request,) = fake.of(Listen)
        assert unpack_data(request.data) == data
        assert options.data == "first"

    def test_data_that_cannot_be(self) -> None:
        with pytest.raises(TypeError, match="not JSON"):
            listen_options(data=object())
        with pytest.raises(ValueError, match="limited to 262144 bytes"):
            listen_options(data="x" * 300_000)

    async def test_ipv4_as_well(self, loop: Loop, fake: FakeMaster) -> None:
        with listen_options(v6only=False):
            await loop.create_server(asyncio.Protocol, "::", 0)
        assert [(request.bind, request.v6only) for request in fake.of(Listen)] == [("[::]:0", False)]

    @pytest.mark.parametrize("options", [{"ssl": True}, {"ssl_handshake_timeout": 1.0}])
    async def test_what_asyncio_refuses(self, loop: Loop, fake: FakeMaster, options: dict[str, Any]) -> None:
        with pytest.raises((TypeError, ValueError), match="ssl"):
            await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, **options)
        assert fake.messages == []

    @pytest.mark.parametrize("shared", [False, True])
    async def test_withdrawing_a_server_whose_program_goes_on(
        self, loop: Loop, fake: FakeMaster, recorders: Recorders, shared: bool
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            if shared:
                fake.answers = fake.share(listener)
            server = await loop.create_server(recorders, "127.0.0.1", 0)
            serving = loop.create_task(server.serve_forever())
            await turns(2)
            if shared:
                client = socket.create_connection(listener.getsockname())
            else:
                (client,) = fake.hand(1, b"")
            await until(lambda: recorders.all, "it is connected")
            (known,) = fake.link.servers
            withdrawn = loop.create_task(known.withdraw())
            assert await fake.said(Closed) == [Closed(1)]
            await turns(5)
            assert not serving.done()
            # Of the connections of a faux server others know.
            assert withdrawn.done() is not shared
            client.close()
            await withdrawn
            server.close()
            await serving
            assert fake.of(Closed) == [Closed(1)]


# ── what a transport that was handed over must be able to do ────────────────────────────────────────────────────────


class TestTheTransport:
    async def test_start_tls(self, loop: Loop, fake: FakeMaster) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)

        class Upgrading(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def data_received(self, data: bytes) -> None:
                if data == b"STARTTLS":
                    self.task = loop.create_task(self.upgrade())
                else:
                    self.transport.write(b"secret " + data)
                    self.transport.close()

            async def upgrade(self) -> None:
                self.transport.write(b"go")
                new = await loop.start_tls(self.transport, self, context, server_side=True)
                assert new is not None
                self.transport = new
                new.write(b"ready")

        await loop.create_server(Upgrading, "127.0.0.1", 0)
        (client,) = fake.hand(1, b"STARTTLS")
        assert await loop.sock_recv(client, 2) == b"go"
        trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
        reader, writer = await asyncio.open_connection(sock=client.dup(), ssl=trusting, server_hostname="localhost")
        client.close()
        assert await reader.readexactly(5) == b"ready"
        writer.write(b"hello")
        assert await reader.read() == b"secret hello"
        writer.close()
        await writer.wait_closed()
        # The master hears of the end all the same.
        await fake.answered(1, Kind.CLOSED)

    async def test_sendfile(self, loop: Loop, fake: FakeMaster, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
        answers: list[asyncio.Task[int]] = []

        async def serve(transport: asyncio.Transport) -> int:
            try:
                with (tmp_path / "file").open("rb") as file:
                    return await loop.sendfile(transport, file, 0, 200_000)
            finally:
                transport.close()

        class Sending(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                answers.append(loop.create_task(serve(transport)))

        await loop.create_server(Sending, "127.0.0.1", 0)
        (client,) = fake.hand(1, b"")
        sent = await fake.rest(client)
        if isinstance(loop, asyncio.SelectorEventLoop):
            assert sent == (bytes(range(256)) * 1000)[:200_000]
            assert await answers[0] == 200_000
        else:
            # uvloop has none, here or elsewhere.
            with pytest.raises(NotImplementedError):
                await answers[0]
