"""The faux server as an `asyncio.AbstractServer`, and the sockets that stand in for the master's."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from clusterserve.binds import Bind
from clusterserve.core.messages import Listened
from clusterserve.errors import ClusterError
from clusterserve.worker.server import BindSocket, Entrance, FauxServer, FauxSocket
from tests.helpers.loops import turns

Loop = asyncio.AbstractEventLoop


class Server(FauxServer):
    """One of its kind, and how often it was closed."""

    def __init__(self, loop: Loop, family: int = socket.AF_INET, sockname: Any = ("127.0.0.1", 8000)) -> None:
        self.closed = 0
        name = sockname if isinstance(sockname, str) else list(sockname)
        answer = Listened(1, 7, 0, "", family, name, False)
        super().__init__(loop, [Entrance(answer, asyncio.Protocol, {}, True)], lambda server: None, self._count)

    def _count(self, server: FauxServer) -> None:
        assert server is self
        self.closed += 1


@pytest.fixture
def server(loop: Loop) -> Server:
    server = Server(loop)
    loop.run_until_complete(server.start_serving())
    return server


class TestFauxServer:
    async def test_it_serves_from_the_start(self, loop: Loop, server: Server) -> None:
        assert isinstance(server, asyncio.AbstractServer)
        assert server.is_serving()
        assert server.get_loop() is loop
        await server.start_serving()
        assert server.is_serving()
        server.close()
        with pytest.raises(RuntimeError, match="is closed"):
            await server.start_serving()

    async def test_its_address_can_be_asked(self, loop: Loop, server: Server) -> None:
        (sock,) = server.sockets
        assert sock.getsockname() == ("127.0.0.1", 8000)
        assert sock.family is socket.AF_INET
        assert sock.type is socket.SOCK_STREAM
        assert sock.proto == socket.IPPROTO_TCP
        # There is nothing to listen on here.
        assert sock.fileno() == -1

    async def test_close(self, loop: Loop, server: Server) -> None:
        server.close()
        assert not server.is_serving()
        assert server.sockets == ()
        server.close()
        assert server.closed == 1

    async def test_wait_closed(self, loop: Loop, server: Server) -> None:
        waiting = [loop.create_task(server.wait_closed()) for _ in range(2)]
        await turns(2)
        # Who stops waiting does not close it, nor wake up others.
        waiting[0].cancel()
        await turns(2)
        assert waiting[0].cancelled()
        assert not waiting[1].done()
        server.close()
        await waiting[1]
        await server.wait_closed()

    async def test_as_a_context(self, loop: Loop, server: Server) -> None:
        async with server as entered:
            assert entered is server
            assert server.is_serving()
        assert not server.is_serving()
        assert server.closed == 1

    async def test_serve_forever(self, loop: Loop, server: Server) -> None:
        serving = loop.create_task(server.serve_forever())
        await turns(2)
        assert server.is_serving()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not server.is_serving()
        assert server.closed == 1

    async def test_serve_forever_until_it_is_closed(self, loop: Loop, server: Server) -> None:
        serving = loop.create_task(server.serve_forever())
        await turns(2)
        server.close()
        await serving
        assert server.closed == 1

    async def test_its_repr_says_what_it_is(self, loop: Loop, server: Server) -> None:
        assert repr(server) == "<FauxServer listener 7 serving>"
        assert repr(server.sockets[0]) == "<FauxSocket of the master's listener on ('127.0.0.1', 8000)>"
        server.close()
        assert repr(server) == "<FauxServer listener 7 closed>"

    @pytest.mark.parametrize(
        ("family", "sockname", "known"),
        [
            (socket.AF_INET, ("127.0.0.1", 8000), ("127.0.0.1", 8000)),
            (socket.AF_INET6, ("::1", 8000, 0, 0), ("::1", 8000)),
            (socket.AF_UNIX, "/run/x.sock", "/run/x.sock"),
            # Only the kernel knows which of its addresses a client has found.
            (socket.AF_INET, ("0.0.0.0", 8000), None),
            (socket.AF_INET6, ("::", 8000, 0, 0), None),
        ],
    )
    async def test_the_local_address_of_its_connections(
        self, loop: Loop, family: int, sockname: Any, known: Any
    ) -> None:
        server = Server(loop, family, sockname)
        assert server.entrances[0].sockname == known
        assert server.sockets[0].getsockname() == sockname


class TestBindSocket:
    @pytest.mark.parametrize(
        ("bind", "family", "name"),
        [
            (Bind("tcp", host="127.0.0.1", port=80), socket.AF_INET, ("127.0.0.1", 80)),
            (Bind("tcp", host="localhost", port=0), socket.AF_INET, ("localhost", 0)),
            (Bind("tcp", host="::1", port=80), socket.AF_INET6, ("::1", 80)),
            (Bind("unix", path="/run/x.sock"), socket.AF_UNIX, "/run/x.sock"),
        ],
    )
    def test_it_stands_for_an_address(self, bind: Bind, family: int, name: Any) -> None:
        sock = BindSocket(bind)
        assert isinstance(sock, FauxSocket)
        assert sock.bind is bind
        assert sock.family == family
        assert sock.getsockname() == name
        assert sock.proto == (0 if family == socket.AF_UNIX else socket.IPPROTO_TCP)
        sock.close()
        assert sock.fileno() == -1


class TestHandleConnection:
    """Connections that come by another way, as in a message."""

    async def test_it_is_served_as_an_accepted_one(self, loop: Loop, server: Server) -> None:
        class Greeter(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                transport.write(b"hello")  # type: ignore[attr-defined]
                transport.close()

        server.factory = Greeter
        near, far = socket.socketpair()
        with far:
            server.handle_connection(near)
            far.setblocking(False)
            assert await loop.sock_recv(far, 99) == b"hello"
            assert await loop.sock_recv(far, 99) == b""
        server.close()

    async def test_a_factory_that_raises_costs_the_connection(
        self, loop: Loop, server: Server, complaints: list[dict[str, Any]]
    ) -> None:
        def broken() -> asyncio.Protocol:
            raise LookupError("no protocol")

        server.factory = broken
        near, far = socket.socketpair()
        with far:
            server.handle_connection(near)
            far.setblocking(False)
            assert await loop.sock_recv(far, 99) == b""
        assert [type(each["exception"]) for each in complaints] == [LookupError]
        complaints.clear()
        server.close()

    async def test_a_closed_server_leaves_it_to_its_owner(self, loop: Loop, server: Server) -> None:
        server.factory = asyncio.Protocol
        server.close()
        near, far = socket.socketpair()
        with near, far:
            with pytest.raises(ClusterError, match=r"^<FauxServer listener 7 closed> takes no connections$"):
                server.handle_connection(near)
            assert near.fileno() >= 0
