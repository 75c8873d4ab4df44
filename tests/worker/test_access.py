"""Our own lines of the access log, and what they rely on in uvicorn: its real protocols on real sockets.

The contract: `send` is a method of an object that has the `transport`, and for a request `disconnected`; what uvicorn
answers in the place of an application that fails; what it says of WebSockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from clusterserve.access import AccessRecord, request_id
from clusterserve.core.atoms import Who
from clusterserve.core.exchange import Exchange
from clusterserve.core.records import MAX_MICROSECONDS
from clusterserve.settings import Settings
from clusterserve.worker.access import SERVER_ERROR, WEBSOCKETS, Access
from clusterserve.worker.deadline import GATEWAY_TIMEOUT
from clusterserve.worker.draining import Draining
from clusterserve.worker.transport import HandedTransport
from tests.helpers.loops import until
from tests.helpers.raw import request

Loop = asyncio.AbstractEventLoop
WS = ["websockets", "websockets-sansio", "wsproto"]

#: Of uvicorn and websockets: the older half of the latter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::uvicorn.config.UvicornDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def loop_class() -> type[Any]:
    """The contract is uvicorn's: one event loop is enough."""
    return asyncio.SelectorEventLoop


class Application:
    """Does what the path says."""

    def __init__(self) -> None:
        self.names: list[str] = []
        #: As `Deadline` has it.
        self.overdue: set[Any] = set()
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.names.append(scope["extensions"]["clusterserve"]["request_id"])
        if scope["type"] == "websocket":
            await self.websocket(scope["path"], receive, send)
            return
        path = scope["path"]
        if path == "/raise":
            raise RuntimeError("trouble")
        if path == "/too-long":
            self.overdue.add(asyncio.current_task())
            raise asyncio.CancelledError
        if path == "/nothing":
            return
        if path == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        if path == "/midway":
            raise RuntimeError("trouble")
        await send({"type": "http.response.body", "body": b"world"})
        if path == "/behind":
            await self.go.wait()

    async def websocket(self, path: str, receive: Any, send: Any) -> None:
        await receive()
        if path == "/raise":
            raise RuntimeError("trouble")
        if path == "/refuse":
            await send({"type": "websocket.close"})
            return
        if path == "/answer":
            await send({"type": "websocket.http.response.start", "status": 418, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b"teapot"})
            return
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "é"})
        await send({"type": "websocket.send", "bytes": b"123"})
        if path == "/return":
            return
        if path == "/close":
            await send({"type": "websocket.close", "code": 4001})
            return
        while (await receive())["type"] != "websocket.disconnect":
            pass


class Rig:
    def __init__(self, address: Any, app: Application, told: list[Exchange], senders: list[Any]) -> None:
        self.address, self.app, self.told = address, app, told
        #: What uvicorn's own `send` belongs to.
        self.senders = senders

    async def ask(self, path: str, *headers: str) -> bytes:
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(request("GET", path, "Connection: close", *headers))
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        return data

    async def line(self) -> Exchange:
        await until(lambda: self.told, "it is told")
        (line,) = self.told
        return line


class Keeps(logging.Handler):
    """Keeps what is logged, and with what name."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.names: list[str | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.names.append(request_id.get())


@pytest.fixture
def errors() -> Iterator[Keeps]:
    """What uvicorn logs, the access log apart."""
    logger, keeps = logging.getLogger("uvicorn.error"), Keeps()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(keeps)
    yield keeps
    logger.removeHandler(keeps)
    logger.setLevel(before[0])
    logger.propagate = before[1]


@contextlib.asynccontextmanager
async def serving(settings: Settings, **options: Any) -> AsyncIterator[Rig]:
    app, keeps, senders = Application(), Keeps(), list[Any]()
    logger = logging.Logger("ours")  # noqa: LOG001 - of this test alone
    logger.addHandler(keeps)
    access, errors = Access(logger, settings, Who(1, 0, 2)), logging.getLogger("uvicorn.error")
    access.overdue = app.overdue
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **options)
    config.load()
    announced = Draining(set()).announced(access.wrapped(config.loaded_app))

    def outermost(scope: Any, receive: Any, send: Any) -> Any:
        senders.append(send.__self__)
        return announced(scope, receive, send)

    config.loaded_app = outermost
    server = uvicorn.Server(config)
    told: list[Exchange] = []
    keeps.emit = lambda record: told.append(record.exchange)  # type: ignore[attr-defined, method-assign]
    errors.addFilter(access)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener.dup()]))
        try:
            await until(lambda: server.started, "it is started")
            yield Rig(listener.getsockname(), app, told, senders)
        finally:
            app.go.set()
            server.should_exit = True
            await task
            errors.removeFilter(access)


def settings(**values: object) -> Settings:
    return Settings.create(app="module:app", workers=1, log_format="json", **values)


http = pytest.mark.parametrize("http", ["h11", "httptools"])


@http
@pytest.mark.parametrize(
    ("path", "status", "sent"),
    [
        ("/hello", 202, 10),
        ("/raise", 500, len(SERVER_ERROR)),
        ("/nothing", 500, len(SERVER_ERROR)),
        ("/midway", 202, 5),
        ("/too-long", 504, len(GATEWAY_TIMEOUT.split(b"\r\n\r\n")[1])),
    ],
)
async def test_a_request(loop: Loop, errors: Keeps, http: str, path: str, status: int, sent: int) -> None:
    async with serving(settings(), http=http) as rig:
        response = await rig.ask(path, "X-Request-ID: its-name")
        line = await rig.line()
        assert (line.status, line.sent, line.path, line.request_id) == (status, sent, path, "its-name")
        if status == 500:
            # That is what uvicorn says then.
            assert response.startswith(b"HTTP/1.1 500 ")
            assert SERVER_ERROR in response.partition(b"\r\n\r\n")[2]
        assert rig.app.names == ["its-name"]
        # uvicorn's own traceback included.
        names = {name for each, name in zip(errors.records, errors.names, strict=True) if each.exc_info}
        assert names == (set() if path in ("/hello", "/nothing") else {"its-name"})
        # The loop's own transport knows nothing of a queue.
        assert line.queue_time is None
        assert line.service_time >= 0


@http
async def test_it_is_told_when_the_response_is_complete(loop: Loop, errors: Keeps, http: str) -> None:
    async with serving(settings(), http=http) as rig:
        await rig.ask("/behind")
        assert (await rig.line()).status == 202
        rig.app.go.set()
    assert len(rig.told) == 1


@http
async def test_a_client_that_leaves(loop: Loop, errors: Keeps, http: str) -> None:
    async with serving(settings(), http=http) as rig:
        _, writer = await asyncio.open_connection(*rig.address)
        writer.write(request("GET", "/wait"))
        await until(lambda: rig.app.names, "it is there")
        writer.close()
        line = await rig.line()
        assert (line.status, line.sent) == (499, 0)


@http
async def test_send_belongs_to_who_has_the_transport(loop: Loop, errors: Keeps, http: str) -> None:
    """What `queue_time` is asked of."""
    async with serving(settings(), http=http) as rig:
        await rig.ask("/hello")
        (sender,) = rig.senders
        assert isinstance(sender.transport, asyncio.Transport)
        assert sender.disconnected is False


@pytest.mark.parametrize("ws", WS)
async def test_send_of_a_websocket_as_well(loop: Loop, errors: Keeps, ws: str) -> None:
    async with serving(settings(), ws=ws) as rig:
        async with connect(f"ws://127.0.0.1:{rig.address[1]}/stay"):
            (sender,) = rig.senders
            assert isinstance(sender.transport, asyncio.Transport)
        await rig.line()


async def test_what_is_excluded(loop: Loop, errors: Keeps) -> None:
    async with serving(settings(access_log_exclude=["/h*", "/raise"])) as rig:
        await rig.ask("/hello")
        await rig.ask("/raise")
        assert [line.path for line in rig.told] == ["/raise"]


@pytest.mark.parametrize("ws", WS)
@pytest.mark.parametrize(("path", "code"), [("/close", 4001), ("/stay", 1000), ("/return", 1006)])
async def test_a_websocket(loop: Loop, errors: Keeps, ws: str, path: str, code: int) -> None:
    async with serving(settings(), ws=ws) as rig:
        async with connect(f"ws://127.0.0.1:{rig.address[1]}{path}?a=b") as websocket:
            assert await websocket.recv() == "é"
            assert await websocket.recv() == b"123"
            if path == "/stay":
                assert rig.told == []
            else:
                with pytest.raises(ConnectionClosed):
                    await websocket.recv()
        line = await rig.line()
        assert (line.status, line.close_code, line.sent, line.target) == (101, code, 5, f"{path}?a=b")
    # What uvicorn says of it besides is left out.
    assert not [each.getMessage() for each in errors.records if "WebSocket" in each.getMessage()]


@pytest.mark.parametrize("ws", WS)
@pytest.mark.parametrize(("path", "status"), [("/refuse", 403), ("/answer", 418), ("/raise", 500)])
async def test_a_websocket_that_is_none(loop: Loop, errors: Keeps, ws: str, path: str, status: int) -> None:
    async with serving(settings(), ws=ws) as rig:
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://127.0.0.1:{rig.address[1]}{path}")
        assert caught.value.response.status_code == status
        line = await rig.line()
        assert (line.status, line.close_code) == (status, None)
    assert not [each.getMessage() for each in errors.records if '"WebSocket' in each.getMessage()]


@pytest.mark.parametrize("ws", WS)
async def test_the_lines_of_uvicorn_that_are_left_out(loop: Loop, ws: str) -> None:
    """Else a new wording would stand beside ours."""
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    logger.setLevel(logging.INFO)

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(keep)
    try:
        async with serving(settings(), ws=ws) as rig:
            async with connect(f"ws://127.0.0.1:{rig.address[1]}/stay"):
                pass
            for path in ("/refuse", "/answer"):
                with pytest.raises(InvalidStatus):
                    await connect(f"ws://127.0.0.1:{rig.address[1]}{path}")
    finally:
        logger.removeFilter(keep)
        logger.setLevel(level)
    assert {each.msg for each in records if '"WebSocket' in str(each.msg)} == WEBSOCKETS


# ── how long it has waited ──────────────────────────────────────────────────────────────────────────────────────────


class Receiver:
    """All of a receiver that counts here."""

    def __init__(self) -> None:
        self.counters = [7, 0]


@pytest.fixture
def handed() -> Iterator[Callable[[], tuple[HandedTransport, Receiver]]]:
    def make() -> tuple[HandedTransport, Receiver]:
        receiver = Receiver()
        return HandedTransport(receiver, 1, -1, asyncio.Protocol(), None, None), receiver  # type: ignore[arg-type]

    return make


def test_queue_time_is_the_first_requests(handed: Any) -> None:
    transport, _ = handed()
    assert transport.queue_time(100.0) is None
    transport.handed_over(99_500_000, 99.9, 7)
    assert transport.queue_time(100.0) == pytest.approx(0.5)
    assert transport.queue_time(100.0) is None


def test_a_head_that_is_long_on_its_way_has_waited_until_it_was_read(handed: Any) -> None:
    transport, receiver = handed()
    transport.handed_over(99_500_000, 99.9, 7)
    receiver.counters[0] += 2
    assert transport.queue_time(110.0) == pytest.approx(0.4)


def test_the_clock_of_the_record_turns_over(handed: Any) -> None:
    transport, _ = handed()
    now = (MAX_MICROSECONDS + 1) / 1e6
    transport.handed_over(MAX_MICROSECONDS - 999_999, now, 7)
    assert transport.queue_time(now + 1) == pytest.approx(2.0)


def test_a_record_is_what_the_formatters_expect() -> None:
    scope = {"type": "http", "path": "/", "headers": []}
    assert AccessRecord(Exchange(scope, "", None, 0.0), None).args == ("", "GET", "/", "1.1", 0)
