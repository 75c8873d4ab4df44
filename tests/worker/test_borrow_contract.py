"""What `worker/protocols.py` relies on of uvicorn's own protocol classes, one test each.

A release of uvicorn that changes one of these must fail here, and not lose connections.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import h11
import pytest
import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.helpers.loops import until
from tests.helpers.raw import request

Loop = asyncio.AbstractEventLoop

GET = request("GET", "/")
KINDS: list[Any] = [H11Protocol, HttpToolsProtocol]


class Wire(asyncio.Transport):
    """A transport on which nothing is sent anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False
        self.protocol: Any = None

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol


class App:
    """Answers when it may."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.task: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.task = asyncio.current_task()
        await self.go.wait()
        await send({"type": scope["type"] + ".response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": scope["type"] + ".response.body", "body": b"ok"})


Make = Callable[..., Any]


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def make(loop: Loop, app: App) -> Make:
    """Makes a protocol that has its transport."""

    def make_one(kind: Any, **more: Any) -> Any:
        base = type(kind.__name__, (kind,), more)
        config = uvicorn.Config(app, http=base, lifespan="off", log_config=None)
        config.load()
        protocol = base(config=config, server_state=ServerState(), app_state={}, _loop=loop)
        protocol.connection_made(Wire())
        return protocol

    return make_one


kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@kinds
async def test_the_response_is_complete_when_it_says_so_from_the_applications_task(
    loop: Loop, make: Make, app: App, kind: Any
) -> None:
    seen: list[Any] = []

    def on_response_complete(self: Any) -> None:
        seen.append((self.cycle.response_complete, asyncio.current_task(), bytes(self.transport.written)[-2:]))
        kind.on_response_complete(self)

    protocol = make(kind, on_response_complete=on_response_complete)
    assert protocol.cycle is None
    protocol.data_received(GET)
    assert not protocol.cycle.response_complete
    app.go.set()
    await until(lambda: seen, "the response is complete")
    # All of it has been written, or there would be something to give back too early.
    assert seen == [(True, app.task, b"ok")]
    assert protocol.server_state.total_requests == 1
    protocol._unset_keepalive_if_required()


@kinds
async def test_the_cycle_is_the_newest_request(loop: Loop, make: Make, app: App, kind: Any) -> None:
    app.go.set()
    protocol = make(kind)
    protocol.data_received(GET)
    first = protocol.cycle
    await until(lambda: first.response_complete, "the response is complete")
    protocol.data_received(GET)
    assert protocol.cycle is not first
    await until(lambda: protocol.cycle.response_complete, "the second one as well")
    assert protocol.server_state.total_requests == 2
    protocol._unset_keepalive_if_required()


@kinds
async def test_the_timer_of_keep_alive_can_be_stopped(loop: Loop, make: Make, app: App, kind: Any) -> None:
    app.go.set()
    protocol = make(kind)
    protocol.data_received(GET)
    await until(lambda: protocol.timeout_keep_alive_task is not None, "it runs")
    timer = protocol.timeout_keep_alive_task
    protocol._unset_keepalive_if_required()
    assert timer.cancelled()
    assert protocol.timeout_keep_alive_task is None


@kinds
async def test_a_lost_connection_is_no_connection_of_the_servers(loop: Loop, make: Make, app: App, kind: Any) -> None:
    protocol = make(kind)
    assert protocol in protocol.server_state.connections
    protocol.connection_lost(None)
    assert protocol.server_state.connections == set()
    assert inspect.getsource(uvicorn.Server.shutdown).count("connection.shutdown()") == 1


@kinds
async def test_an_upgrade_puts_another_protocol_on_the_transport(loop: Loop, make: Make, app: App, kind: Any) -> None:
    protocol = make(kind)
    protocol.ws_protocol_class = lambda **options: asyncio.Protocol()
    protocol.data_received(request("GET", "/", "Connection: Upgrade", "Upgrade: websocket"))
    assert protocol.transport.protocol is not None
    assert protocol.transport.protocol is not protocol


async def test_httptools_says_when_a_request_begins_and_ends(loop: Loop, make: Make, app: App) -> None:
    app.go.set()
    seen: list[str] = []

    def begins(self: Any) -> None:
        seen.append("begins")
        HttpToolsProtocol.on_message_begin(self)

    def ends(self: Any) -> None:
        seen.append("ends")
        HttpToolsProtocol.on_message_complete(self)

    protocol = make(HttpToolsProtocol, on_message_begin=begins, on_message_complete=ends)
    data = request("POST", "/", body=b"body")
    protocol.data_received(data[:1])
    assert seen == ["begins"]
    protocol.data_received(data[1:-1])
    assert seen == ["begins"]
    protocol.data_received(data[-1:])
    assert seen == ["begins", "ends"]
    protocol.data_received(b"\r\n")
    assert seen == ["begins", "ends"]
    protocol.data_received(GET[:1])
    assert seen == ["begins", "ends", "begins"]
    await until(lambda: protocol.timeout_keep_alive_task is not None, "the response is complete")
    protocol._unset_keepalive_if_required()


async def test_httptools_requests_that_wait_are_in_the_pipeline(loop: Loop, make: Make, app: App) -> None:
    protocol = make(HttpToolsProtocol)
    protocol.data_received(GET * 3)
    assert len(protocol.pipeline) == 2
    assert not protocol.cycle.response_complete
    app.go.set()
    await until(lambda: protocol.server_state.total_requests == 3, "all are answered")
    assert not protocol.pipeline
    protocol._unset_keepalive_if_required()


async def test_h11_knows_what_both_sides_are_at(loop: Loop, make: Make, app: App) -> None:
    seen: list[Any] = []

    def on_response_complete(self: Any) -> None:
        seen.append((self.conn.our_state, self.conn.their_state, self.conn.trailing_data[0]))
        H11Protocol.on_response_complete(self)

    protocol = make(H11Protocol, on_response_complete=on_response_complete)
    assert (protocol.conn.our_state, protocol.conn.their_state) == (h11.IDLE, h11.IDLE)
    protocol.data_received(request("POST", "/", "Content-Length: 2"))
    app.go.set()
    await until(lambda: len(seen) == 1, "the response is complete")
    # Before the body, which is no reason to give anything back.
    assert seen.pop() == (h11.DONE, h11.SEND_BODY, b"")
    protocol.data_received(b"bo")
    assert (protocol.conn.our_state, protocol.conn.their_state) == (h11.IDLE, h11.IDLE)
    assert protocol.cycle.response_complete
    protocol.data_received(GET + GET[:5])
    await until(lambda: len(seen) == 1, "the second one as well")
    assert seen.pop() == (h11.DONE, h11.DONE, GET[:5])
    protocol._unset_keepalive_if_required()


def test_auto_is_httptools_where_it_is_installed() -> None:
    assert AutoHTTPProtocol is HttpToolsProtocol


def test_a_class_may_be_given_instead_of_a_name() -> None:
    config = uvicorn.Config(App, http=H11Protocol, log_config=None)
    config.load()
    assert config.http_protocol_class is H11Protocol
