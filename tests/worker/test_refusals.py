"""The access log's lines of what uvicorn's protocols, and our limits, answer themselves: both parsers, both logs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from clusterserve.access import LOGGER, AccessRecord, Line
from clusterserve.core.atoms import Template, Who
from clusterserve.core.head import HeadLimits
from clusterserve.settings import Settings
from clusterserve.worker.access import Access
from clusterserve.worker.limits import BODY_LOOKS
from clusterserve.worker.protocols import Borrowing, http_protocol
from clusterserve.worker.receiver import HEAD_LOOKS
from clusterserve.worker.refusals import Refusals
from tests.helpers.loops import turns
from tests.helpers.raw import request

Loop = asyncio.AbstractEventLoop
FORMAT = '%(h)s "%(r)s" %(s)s %(B)s %({X-A}i)s'
BAD = len("Invalid HTTP request received.")
HEAD = b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\nX-A: b\r\n"
POST = request("POST", "/body", "Transfer-Encoding: chunked", "X-A: b")
LIMITS = HeadLimits(100, 5, 200)


@pytest.fixture
def loop_class() -> type[Any]:
    """Nothing is sent anywhere: one event loop is enough."""
    return asyncio.SelectorEventLoop


class Wire(asyncio.Transport):
    """A transport on which nothing is sent anywhere; its client has an address."""

    def __init__(self, loop: Loop, protocol: Any) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.written = bytearray()
        self._loop, self._protocol, self._closing = loop, protocol, False

    def write(self, data: Any) -> None:
        assert not self._closing
        self.written += data

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self._closing

    def can_write_eof(self) -> bool:
        return False

    def get_protocol(self) -> Any:
        return self._protocol

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Application:
    """Reads the body, and answers whether there is one or not; "/early" before, "/stream" in the midst."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/early":
            await self.respond(send)
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        while (message := await receive()).get("more_body"):
            pass
        if path == "/body":
            assert message["type"] == "http.disconnect"
            await self.respond(send)

    async def respond(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Connection:
    def __init__(self, loop: Loop, http: str, refusals: Refusals, wrapped: Any) -> None:
        kind: Any = http_protocol(http, Borrowing(), LIMITS, refusals)
        app = Application()
        config = uvicorn.Config(wrapped(app), http=kind, lifespan="off", interface="asgi3", log_config=None)
        config.load()
        self.protocol = kind(config=config, server_state=ServerState(), app_state={}, _loop=loop)
        self.wire = Wire(loop, self.protocol)
        self.protocol.connection_made(self.wire)

    async def say(self, *pieces: bytes) -> bytes:
        for piece in pieces:
            self.protocol.data_received(piece)
            await turns(3)
        return bytes(self.wire.written)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[AccessRecord] = []

    def emit(self, record: Any) -> None:
        self.records.append(record)

    @property
    def said(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture(params=["h11", "httptools"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def ours(loop: Loop, http: str, lines: Lines) -> Connection:
    """With an access log of our own."""
    logger = logging.Logger("ours")  # noqa: LOG001 - of this test alone
    logger.addHandler(lines)
    access = Access(logger, Settings.create(app="a:b", access_logformat=FORMAT), Who(1, 0, 2))

    def wrapped(app: Any) -> Any:
        app = access.wrapped(app)
        return lambda scope, *pair: app({**scope, "extensions": {"clusterserve": {}}}, *pair)

    return Connection(loop, http, access.refusals, wrapped)


@pytest.fixture
def uvicorns(lines: Lines) -> Iterator[logging.Logger]:
    """With uvicorn's own."""
    logger = logging.getLogger(LOGGER)
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    yield logger
    logger.removeHandler(lines)
    logger.setLevel(level)
    logger.propagate = True


WHOLE = '127.0.0.1 "GET /a%%20b?c=d HTTP/1.1" %d'
UNKNOWN = '127.0.0.1 "-" %d'


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        # A field is wrong; in the first, in the second read, behind a request that was answered.
        ([HEAD + b"Bad Name: x\r\n\r\n"], f"{WHOLE % 400} {BAD}"),
        ([HEAD, b"Bad Name: x\r\n\r\n"], f"* 400 {BAD}"),
        ([b"\x16\x03\x01\x02\x00\x01\x00"], f"{UNKNOWN % 400} {BAD} -"),
        ([b"GET /a b HTTP/1.1\r\n\r\n"], f"{UNKNOWN % 400} {BAD} -"),
        ([request("GET", "/" + "x" * 100)], f"{UNKNOWN % 414} 27 -"),
        ([b"GET /" + b"x" * 200], f"{UNKNOWN % 414} 27 -"),
        ([HEAD + b"A: b\r\n" * 4 + b"\r\n"], f"{WHOLE % 431} 24 b"),
        ([HEAD, b"A: b\r\n" * 4, b"A: b\r\n"], f"{WHOLE % 431} 24 b"),
        ([HEAD + b"A: " + b"b" * 300], f"{WHOLE % 431} 35 b"),
    ],
)
async def test_a_head_that_is_refused(ours: Connection, lines: Lines, pieces: list[bytes], line: str) -> None:
    answer = await ours.say(*pieces)
    assert answer.startswith(b"HTTP/1.1 4")
    (said,) = lines.said
    if line.startswith("*"):
        # h11 has forgotten it.
        assert said.startswith((f"{WHOLE % 400} {BAD} ", f"{UNKNOWN % 400} {BAD} -"))
    else:
        assert said.startswith(line)
    assert said.split(" ")[-3].encode() == answer[9:12]


async def test_a_head_that_is_late(ours: Connection, lines: Lines) -> None:
    await ours.say(HEAD[:-1])
    for _ in range(HEAD_LOOKS + 1):
        ours.protocol.look_at_head()
    assert ours.wire.written.startswith(b"HTTP/1.1 408")
    (said,) = lines.said
    assert said.startswith(WHOLE % 408)


async def test_a_late_head_of_which_nothing_is_known(ours: Connection, lines: Lines) -> None:
    await ours.say(b"GET /a")
    for _ in range(HEAD_LOOKS + 1):
        ours.protocol.look_at_head()
    assert lines.said == [f"{UNKNOWN % 408} 33 -"]


async def test_the_request_before_is_not_taken_for_it(ours: Connection, lines: Lines) -> None:
    answer = await ours.say(request("POST", "/early", "Content-Length: 2") + b"ok", b"GET /next\r\nA b: c\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 202")
    assert lines.said == ['127.0.0.1 "POST /early HTTP/1.1" 202 2 -', f"{UNKNOWN % 400} {BAD} -"]


async def test_what_comes_behind_an_upgrade_to_nothing(ours: Connection, lines: Lines) -> None:
    await ours.say(request("GET", "/early", "Connection: Upgrade", "Upgrade: nothing"), b"\x00\x01\x02")
    assert lines.said[0] == '127.0.0.1 "GET /early HTTP/1.1" 202 2 -'
    assert lines.said[1:] == [f"{UNKNOWN % 400} {BAD} -"]


async def late(connection: Connection) -> None:
    await connection.say(POST, b"2\r\nok\r\n")
    for _ in range(BODY_LOOKS + 1):
        connection.protocol.look_at_body()
    await turns(3)


async def bad(connection: Connection) -> None:
    await connection.say(POST, b"nonsense\r\n")


@pytest.mark.parametrize(("ends", "status"), [(late, 408), (bad, 400)])
async def test_a_body_that_is_refused_is_in_its_requests_line(
    ours: Connection, lines: Lines, ends: Any, status: int
) -> None:
    await ends(ours)
    answer = bytes(ours.wire.written)
    # The application answers all the same: nobody hears that.
    assert answer.count(b"HTTP/1.1") == 1
    # h11 sends it in chunks.
    size = BAD if status == 400 else len(answer.partition(b"\r\n\r\n")[2])
    assert lines.said == [f'127.0.0.1 "POST /body HTTP/1.1" {status} {size} b']


@pytest.mark.parametrize("path", ["/early", "/stream"])
async def test_what_has_an_answer_gets_no_second(ours: Connection, lines: Lines, path: str) -> None:
    await ours.say(request("POST", path, "Transfer-Encoding: chunked"))
    answer = await ours.say(b"nonsense\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert ours.wire.is_closing()
    assert [record.exchange.status for record in lines.records] == [202 if path == "/early" else 200]


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        ([b"\x16\x03\x01\x02"], '127.0.0.1:5 - "- - HTTP/1.1" 400'),
        ([HEAD + b"A: " + b"b" * 300], '127.0.0.1:5 - "GET /a%20b?c=d HTTP/1.1" 431'),
        ([POST, b"nonsense\r\n"], '127.0.0.1:5 - "POST /body HTTP/1.1" 400'),
    ],
)
async def test_in_uvicorns_own_log(
    loop: Loop, http: str, uvicorns: logging.Logger, lines: Lines, pieces: list[bytes], line: str
) -> None:
    connection = Connection(loop, http, Refusals(uvicorns), lambda app: app)
    await connection.say(*pieces)
    assert lines.said == [line]


async def test_nobody_listens(loop: Loop, http: str, lines: Lines) -> None:
    logger = logging.Logger("nobody's")  # noqa: LOG001
    connection = Connection(loop, http, Refusals(logger, Line(Template("%(s)s", Who(1, 0, 2)))), lambda app: app)
    logger.handle = lines.emit  # type: ignore[method-assign, assignment]
    assert (await connection.say(b"\x16")).startswith(b"HTTP/1.1 400")
    assert not lines.records
