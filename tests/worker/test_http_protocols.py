"""uvicorn's own HTTP protocols on handed-over connections: what they make of a transport that is lazy at first."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.uri import parse_uri

from clusterserve.core.records import Kind
from tests.helpers.apps.full import pattern
from tests.helpers.loops import turns, until
from tests.helpers.raw import request
from tests.worker.harness import Handed, Master, phase, was_real

Loop = asyncio.AbstractEventLoop
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass
class Application:
    """An ASGI application whose paths name what it does."""

    scopes: list[dict[str, Any]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    received: list[str] = field(default_factory=list)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            await self.websocket(receive, send)
        else:
            await getattr(self, scope["path"].strip("/"))(receive, send)

    async def respond(self, send: Send, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def hello(self, receive: Receive, send: Send) -> None:
        await self.respond(send, b"hello")

    async def wait(self, receive: Receive, send: Send) -> None:
        await self.go.wait()
        await self.respond(send, b"waited")

    async def digest(self, receive: Receive, send: Send) -> None:
        digest = hashlib.sha256()
        more = True
        while more:
            message = await receive()
            digest.update(message.get("body", b""))
            more = message.get("more_body", False)
        await self.respond(send, digest.hexdigest().encode())

    async def large(self, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", str(len(LARGE)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(LARGE), 10_000):
            await send({"type": "http.response.body", "body": LARGE[start : start + 10_000], "more_body": True})
        await send({"type": "http.response.body"})

    async def disconnect(self, receive: Receive, send: Send) -> None:
        while True:
            self.received.append((await receive())["type"])
            if self.received[-1] == "http.disconnect":
                return

    async def websocket(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"].upper()})
        self.received.append(message["type"])


LARGE = pattern(3_000_000)


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def protocols() -> list[Any]:
    """The protocols that uvicorn makes."""
    return []


@pytest.fixture(params=["h11", "httptools"])
def http(
    request: pytest.FixtureRequest, loop: Loop, master: Master, application: Application, protocols: list[Any]
) -> Iterator[uvicorn.Config]:
    """uvicorn's protocol in place, on a listener that the master knows as an HTTP server's."""
    config = uvicorn.Config(application, http=request.param, ws="wsproto", lifespan="off", log_config=None)
    config.load()
    state = ServerState()

    def factory() -> Any:
        protocols.append(
            config.http_protocol_class(config=config, server_state=state, app_state={}, _loop=loop)  # type: ignore[call-arg]
        )
        return protocols[-1]

    master.serve(factory, sockname=("127.0.0.1", 8000))
    yield config
    assert {type(connection) for connection in state.connections} <= {type(protocol) for protocol in protocols}


def split(data: bytes) -> tuple[bytes, bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body


async def response(handed: Handed) -> tuple[bytes, bytes]:
    """The next response, whose body has a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await handed.reads(1)
    length = int(data.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return data, await handed.reads(length)


class TestOneTurn:
    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    async def test_a_request_that_closes(
        self, loop: Loop, master: Master, http: uvicorn.Config, protocols: list[Any], version: str
    ) -> None:
        handed = master.hand(request("GET", "/hello", "Connection: close", version=version))
        head, body = split(await handed.rest())
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert body == b"hello"
        # The event loop never had it.
        assert handed.answers == [Kind.ACK | Kind.CLOSED]
        assert not was_real(protocols[0].transport)

    async def test_its_scope(self, loop: Loop, master: Master, http: uvicorn.Config, application: Application) -> None:
        handed = master.hand(request("GET", "/hello?a=b", "Connection: close"))
        client = handed.client.getsockname()
        await handed.rest()
        (scope,) = application.scopes
        assert scope["client"] == client
        assert scope["server"] == ("127.0.0.1", 8000)
        assert (scope["scheme"], scope["query_string"]) == ("http", b"a=b")

    async def test_a_request_that_is_malformed(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(b"no request\r\n\r\n")
        assert (await handed.rest()).startswith(b"HTTP/1.1 400 Bad Request\r\n")

    async def test_many_at_once(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        connections = [master.connection() for _ in range(32)]
        for handed in connections:
            handed.arrive(request("GET", "/hello", "Connection: close"))
        master.offer(*connections)
        for handed in connections:
            assert split(await handed.rest())[1] == b"hello"
        assert [handed.answers for handed in connections] == [[Kind.ACK | Kind.CLOSED]] * 32
        assert len(master.messages) == 1


class TestLongerLives:
    async def test_keep_alive(self, loop: Loop, master: Master, http: uvicorn.Config, application: Application) -> None:
        handed = master.hand(request("GET", "/hello"))
        client = handed.client.getsockname()
        for _ in range(3):
            assert (await response(handed))[1] == b"hello"
            await handed.sends(request("GET", "/hello"))
        await response(handed)
        handed.client.close()
        await handed.ends()
        assert handed.answers == [Kind.ACK, Kind.CLOSED]
        assert {scope["client"] for scope in application.scopes} == {client}

    async def test_a_body_in_a_second_segment(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        body = pattern(300_000)
        data = request("POST", "/digest", "Connection: close", body=body)
        for cut in (10, len(data) - len(body), 60_000):
            handed = master.hand(data[:cut])
            await master.answered(handed)
            await handed.sends(data[cut:])
            assert split(await handed.rest())[1] == hashlib.sha256(body).hexdigest().encode()

    async def test_expect_100_continue(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        head = request("POST", "/digest", "Connection: close", "Expect: 100-continue", "Content-Length: 4")
        handed = master.hand(head)
        assert (await handed.reads(25)).startswith(b"HTTP/1.1 100 Continue\r\n")
        await handed.sends(b"body")
        assert (await handed.rest()).endswith(hashlib.sha256(b"body").hexdigest().encode())

    async def test_pipelining(self, loop: Loop, master: Master, http: uvicorn.Config, application: Application) -> None:
        handed = master.hand(
            request("GET", "/hello") + request("GET", "/wait") + request("GET", "/hello", "Connection: close")
        )
        assert (await response(handed))[1] == b"hello"
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        assert split(await handed.rest())[1] == b"hello"
        assert [scope["path"] for scope in application.scopes] == ["/hello", "/wait", "/hello"]

    async def test_a_client_that_pipelines_without_end_is_not_read_without_end(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Application, protocols: list[Any]
    ) -> None:
        """The pause comes from the first turn, before the loop has its transport."""
        handed = master.hand(request("GET", "/wait") + request("GET", "/hello"))
        await until(lambda: application.scopes, "the application waits")
        await until(lambda: was_real(protocols[0].transport), "the loop has it")
        await turns(3)
        assert not protocols[0].transport.is_reading()
        handed.arrive(request("GET", "/hello", "Connection: close"))
        await turns(5)
        assert handed.unread() > 0
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        assert (await response(handed))[1] == b"hello"
        assert split(await handed.rest())[1] == b"hello"

    async def test_a_slow_reader(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.connection(sndbuf=8192)
        handed.arrive(request("GET", "/large", "Connection: close", version="1.0"))
        master.offer(handed)
        data = bytearray()
        while part := await loop.sock_recv(handed.client, 9973):
            data += part
        assert split(bytes(data))[1] == LARGE

    async def test_a_client_that_leaves(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Application, protocols: list[Any]
    ) -> None:
        handed = master.hand(request("GET", "/disconnect"))
        await until(lambda: protocols and was_real(protocols[0].transport), "the loop has it")
        handed.client.close()
        await handed.ends()
        await until(lambda: "http.disconnect" in application.received, "the application is told")

    async def test_shutdown_before_the_loop_has_it(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Application, protocols: list[Any]
    ) -> None:
        """uvicorn tells every connection when it shuts down: the response is finished, and the connection closed."""
        handed = master.hand(request("GET", "/wait"))
        await until(lambda: protocols and phase(protocols[0].transport) == "PENDING", "the first turn is over")
        protocols[0].shutdown()
        application.go.set()
        assert split(await handed.rest())[1] == b"waited"


class TestWebSocket:
    @pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
    async def test_an_upgrade(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Application, ws: str
    ) -> None:
        """The HTTP protocol replaces itself on a transport that is still lazy."""
        http.ws_protocol_class = uvicorn.importer.import_from_string(uvicorn.config.WS_PROTOCOLS[ws])
        client = ClientProtocol(parse_uri("ws://test/ws"))
        client.send_request(client.connect())
        handed = master.hand(b"".join(client.data_to_send()))
        events: list[Any] = []

        async def talk() -> Any:
            while not events:
                await handed.sends(b"".join(client.data_to_send()))
                data = await loop.sock_recv(handed.client, 65536)
                client.receive_data(data) if data else client.receive_eof()
                events.extend(client.events_received())
            return events.pop(0)

        assert (await talk()).status_code == 101
        for text in ("one", "two"):
            client.send_text(text.encode())
            assert (await talk()).data == text.upper().encode()
        client.send_close(1000)
        assert (await talk()).opcode is Opcode.CLOSE
        await until(lambda: application.received, "the application is told")
        assert application.received == ["websocket.disconnect"]
        handed.client.close()
        await handed.ends()
        assert handed.answers == [Kind.ACK, Kind.CLOSED]
