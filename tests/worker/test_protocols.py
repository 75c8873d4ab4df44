"""Our HTTP protocols: a connection is given back when it is idle, and never when it is not."""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from clusterserve.channel.board import IDLE, READING
from clusterserve.core.records import Kind
from clusterserve.worker import protocols as ours
from clusterserve.worker.lazy import CONTINUE
from clusterserve.worker.protocols import Borrowing, http_protocol
from clusterserve.worker.transport import HandedTransport
from tests.helpers.loops import turns, until
from tests.helpers.raw import request
from tests.worker.harness import Handed, Master, reaches, was_real
from tests.worker.test_http_protocols import LARGE, Application, response, split

Loop = asyncio.AbstractEventLoop


class Served(Application):
    """What the other tests ask for, and some things that are awkward for whoever gives connections back."""

    async def early(self, receive: Any, send: Any) -> None:
        """Answers before it has read anything."""
        await self.respond(send, b"early")

    async def after(self, receive: Any, send: Any) -> None:
        """Works on when the response is out."""
        await self.respond(send, b"first this")
        await self.go.wait()
        self.received.append((await receive())["type"])

    async def sized(self, receive: Any, send: Any) -> None:
        """`LARGE`, with its length, in one piece."""
        await self.respond(send, LARGE)

    async def raises(self, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"10")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("midway")

    async def last(self, receive: Any, send: Any) -> None:
        await self.slowly(receive, send, (b"connection", b"close"))

    async def slowly(self, receive: Any, send: Any, *more: tuple[bytes, bytes]) -> None:
        """In two pieces."""
        headers = [(b"content-length", b"8"), *more]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        await self.go.wait()
        await send({"type": "http.response.body", "body": b"half"})

    async def nothing(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


@pytest.fixture
def application() -> Served:
    return Served()


@pytest.fixture
def borrowing() -> Borrowing:
    return Borrowing(after_response=True)


@pytest.fixture
def state() -> ServerState:
    return ServerState()


@pytest.fixture
def made() -> list[Any]:
    return []


@pytest.fixture(params=["h11", "httptools"])
def http(
    request: pytest.FixtureRequest,
    loop: Loop,
    master: Master,
    application: Served,
    borrowing: Borrowing,
    state: ServerState,
    made: list[Any],
) -> Iterator[uvicorn.Config]:
    """Our protocol in place of uvicorn's."""
    kind: Any = http_protocol(request.param, borrowing)
    config = uvicorn.Config(
        application, http=kind, ws="wsproto", lifespan="off", log_config=None, timeout_keep_alive=60
    )
    config.load()

    def factory() -> Any:
        made.append(config.http_protocol_class(config=config, server_state=state, app_state={}, _loop=loop))  # type: ignore[call-arg]
        return made[-1]

    master.serve(factory, sockname=("127.0.0.1", 8000))
    yield config
    # A connection that is gone or given back has left no timer behind, and is no connection of uvicorn's any more.
    for protocol in made:
        if protocol not in state.connections:
            assert protocol.timeout_keep_alive_task is None


async def returned(handed: Handed) -> None:
    await until(lambda: handed.returned, f"connection {handed.id} is given back")


async def stays(handed: Handed) -> None:
    """It is not given back, however often the loop turns."""
    await turns(10)
    assert not handed.returned
    assert not handed.closed


GET = request("GET", "/hello")


class TestAfterAResponse:
    async def test_in_its_first_turn(self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]) -> None:
        handed = master.hand(GET)
        assert (await response(handed))[1] == b"hello"
        await returned(handed)
        assert handed.answers == [Kind.ACK | Kind.RETURNED]
        assert not was_real(made[0].transport)
        # It is open, and its client may go on; nothing of what it says now is read.
        handed.arrive(GET)
        await turns(5)
        assert handed.unread() == len(GET)

    async def test_again_and_again(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Served, state: ServerState
    ) -> None:
        handed = master.hand(GET)
        for _ in range(5):
            assert (await response(handed))[1] == b"hello"
            await returned(handed)
            handed = master.again(handed, GET)
        await response(handed)
        await returned(handed)
        assert state.total_requests == 6
        assert state.connections == set()
        assert len({scope["client"] for scope in application.scopes}) == 1

    async def test_of_a_later_turn(self, loop: Loop, master: Master, http: uvicorn.Config, application: Served) -> None:
        handed = master.hand(request("GET", "/wait"))
        await master.answered(handed)
        await stays(handed)
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        await returned(handed)
        assert handed.answers == [Kind.ACK, Kind.RETURNED]

    async def test_without_a_body(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        for path, method in (("/nothing", "GET"), ("/hello", "HEAD")):
            handed = master.hand(request(method, path))
            await returned(handed)
            head, body = split(handed.has())
            assert head.startswith(b"HTTP/1.1 20")
            assert body == b""

    async def test_what_runs_on_is_told_of_the_end(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Served, state: ServerState
    ) -> None:
        handed = master.hand(request("GET", "/after"))
        assert (await response(handed))[1] == b"first this"
        await returned(handed)
        assert len(state.tasks) == 1
        application.go.set()
        await until(lambda: application.received == ["http.disconnect"], "the task ends")

    async def test_a_large_response_is_flushed_first(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.connection(sndbuf=8192)
        handed.arrive(request("GET", "/sized"))
        master.offer(handed)
        await master.answered(handed)
        await stays(handed)
        assert (await response(handed))[1] == LARGE
        await returned(handed)
        # On the same connection, by whoever has it now.
        again = master.again(handed, GET)
        assert (await response(again))[1] == b"hello"
        await returned(again)

    async def test_a_large_response_that_is_cut_is_not_given_back(
        self, loop: Loop, master: Master, http: uvicorn.Config
    ) -> None:
        handed = master.connection(sndbuf=8192)
        handed.arrive(request("GET", "/sized"))
        master.offer(handed)
        await master.answered(handed)
        await stays(handed)
        master.receiver.cut()
        await until(lambda: handed.closed, "it is over")
        assert not handed.returned

    async def test_who_leaves_while_a_response_is_flushed(
        self, loop: Loop, master: Master, http: uvicorn.Config
    ) -> None:
        handed = master.connection(sndbuf=8192)
        handed.arrive(request("GET", "/sized"))
        master.offer(handed)
        await master.answered(handed)
        await stays(handed)
        handed.reset()
        await until(lambda: handed.closed or handed.returned, "it is over")

    @pytest.mark.parametrize(
        "data",
        [request("GET", "/hello", "Connection: close"), request("GET", "/hello", version="1.0")],
        ids=["close", "1.0"],
    )
    async def test_not_what_the_client_wants_closed(
        self, loop: Loop, master: Master, http: uvicorn.Config, data: bytes
    ) -> None:
        handed = master.hand(data)
        assert split(await handed.rest())[1] == b"hello"
        assert not handed.returned

    async def test_not_what_is_malformed(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(b"no request\r\n\r\n")
        assert (await handed.rest()).startswith(b"HTTP/1.1 400 ")
        assert not handed.returned

    async def test_not_a_response_that_broke_off(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(request("GET", "/raises"))
        assert split(await handed.rest())[1] == b"half"
        assert not handed.returned


class TestRequestsThatWait:
    async def test_pipelined(self, loop: Loop, master: Master, http: uvicorn.Config, application: Served) -> None:
        handed = master.hand(GET + request("GET", "/wait") + GET)
        assert (await response(handed))[1] == b"hello"
        await stays(handed)
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        assert (await response(handed))[1] == b"hello"
        await returned(handed)
        assert [scope["path"] for scope in application.scopes] == ["/hello", "/wait", "/hello"]

    @pytest.mark.parametrize("cut", [1, 3, 20, len(GET) - 1])
    async def test_partly_read(self, loop: Loop, master: Master, http: uvicorn.Config, cut: int) -> None:
        handed = master.hand(GET + GET[:cut])
        assert (await response(handed))[1] == b"hello"
        await stays(handed)
        await handed.sends(GET[cut:])
        assert (await response(handed))[1] == b"hello"
        await returned(handed)

    async def test_two_in_one_and_the_rest_of_the_second_while_the_first_runs(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Served
    ) -> None:
        handed = master.hand(request("GET", "/wait") + GET[:10])
        await master.answered(handed)
        await handed.sends(GET[10:])
        await stays(handed)
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        assert (await response(handed))[1] == b"hello"
        await returned(handed)

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_a_response_that_is_first_waits_for_the_body(
        self, loop: Loop, master: Master, http: uvicorn.Config, chunked: bool
    ) -> None:
        if chunked:
            head, body = request("POST", "/early", "Transfer-Encoding: chunked"), b"4\r\nbody\r\n0\r\n\r\n"
        else:
            head, body = request("POST", "/early", "Content-Length: 4"), b"body"
        handed = master.hand(head)
        assert (await response(handed))[1] == b"early"
        await stays(handed)
        await handed.sends(body[:2])
        await stays(handed)
        await handed.sends(body[2:])
        await returned(handed)
        again = master.again(handed, GET)
        assert (await response(again))[1] == b"hello"
        await returned(again)

    async def test_the_bodys_end_and_the_next_request_in_one_segment(
        self, loop: Loop, master: Master, http: uvicorn.Config
    ) -> None:
        handed = master.hand(request("POST", "/early", "Content-Length: 4"))
        assert (await response(handed))[1] == b"early"
        await handed.sends(b"body" + GET)
        assert (await response(handed))[1] == b"hello"
        await returned(handed)

    @pytest.mark.parametrize("size", [10, 300_000])
    async def test_a_body_in_a_second_segment(
        self, loop: Loop, master: Master, http: uvicorn.Config, size: int
    ) -> None:
        body = LARGE[:size]
        data = request("POST", "/digest", body=body)
        handed = master.hand(data[: len(data) - size])
        await master.answered(handed)
        await handed.sends(body)
        assert (await response(handed))[1] == hashlib.sha256(body).hexdigest().encode()
        await returned(handed)

    async def test_expect_100_continue(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(request("POST", "/digest", "Expect: 100-continue", "Content-Length: 4"))
        assert (await handed.reads(25)).startswith(b"HTTP/1.1 100 Continue\r\n")
        await stays(handed)
        await handed.sends(b"body")
        assert (await response(handed))[1] == hashlib.sha256(b"body").hexdigest().encode()
        await returned(handed)


UPGRADE = request(
    "GET", "/ws", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip


class TestUpgrade:
    async def test_never(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(UPGRADE)
        assert (await handed.reads(12)) == b"HTTP/1.1 101"
        await stays(handed)

    async def test_not_after_a_request_either(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        """The request's end came with the upgrade's beginning, so one protocol has seen both."""
        handed = master.hand(GET + UPGRADE[:20])
        assert (await response(handed))[1] == b"hello"
        await handed.sends(UPGRADE[20:])
        assert (await handed.reads(12)) == b"HTTP/1.1 101"
        await stays(handed)


@pytest.fixture
def for_good(master: Master, borrowing: Borrowing) -> None:
    """`--dispatch connection`: connections wait in the worker's own watch, until it leaves."""
    borrowing.after_response = False
    master.receiver.borrow(None, keep=True, head_timeout=0.0)


def drain(master: Master, borrowing: Borrowing, protocol: Any) -> None:
    """The worker leaves, others go on."""
    borrowing.after_response = True
    master.receiver.stop_keeping()
    protocol.shutdown()


@pytest.mark.usefixtures("for_good")
class TestShutdown:
    async def test_never_used(self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]) -> None:
        handed = master.hand()
        await until(lambda: handed.answers, "it is back")
        assert handed.answers == [Kind.ACK | Kind.SILENT]
        assert made == []

    async def test_idle(
        self, loop: Loop, master: Master, http: uvicorn.Config, borrowing: Borrowing, made: list[Any]
    ) -> None:
        handed = master.hand(GET)
        for _ in range(2):
            assert (await response(handed))[1] == b"hello"
            await handed.sends(GET)
        await response(handed)
        await stays(handed)
        drain(master, borrowing, made[0])
        await returned(handed)
        assert not was_real(made[0].transport)

    async def test_busy(
        self,
        loop: Loop,
        master: Master,
        http: uvicorn.Config,
        application: Served,
        borrowing: Borrowing,
        made: list[Any],
    ) -> None:
        handed = master.hand(request("GET", "/wait"))
        await master.answered(handed)
        drain(master, borrowing, made[0])
        await stays(handed)
        application.go.set()
        assert (await response(handed))[1] == b"waited"
        await returned(handed)

    async def test_for_good(self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]) -> None:
        handed = master.hand(GET)
        await response(handed)
        made[0].shutdown()
        assert await handed.rest() == b""
        assert not handed.returned

    async def test_what_was_asked_before_it_is_answered(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]
    ) -> None:
        """1. A worker held its loop; the next request and the order to stop have come meanwhile.
        Result: one more response, which says that it is the last.
        """
        handed = master.hand(GET)
        await response(handed)
        await turns(5)
        handed.arrive(GET)
        made[0].shutdown()
        head, body = split(await handed.rest())
        assert (b"\r\nconnection: close" in head.lower(), body) == (True, b"hello")

    async def test_what_is_in_progress_says_that_it_is_the_last(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Served, made: list[Any]
    ) -> None:
        handed = master.hand(request("GET", "/wait"))
        await master.answered(handed)
        made[0].shutdown()
        application.go.set()
        head, body = split(await handed.rest())
        assert (b"\r\nconnection: close" in head.lower(), body) == (True, b"waited")

    async def test_what_says_no_more_than_a_part_is_ended_all_the_same(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ours, "FIRST_WORD", 0.01)
        handed = master.hand(GET)
        await response(handed)
        await turns(5)
        handed.arrive(GET[:10])
        made[0].shutdown()
        assert await handed.rest() == b""

    async def test_what_is_kept_is_closed_at_keep_alive(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]
    ) -> None:
        handed = master.hand(GET)
        await response(handed)
        await until(lambda: made[0].timeout_keep_alive_task is not None, "its time runs")
        made[0].timeout_keep_alive_handler()
        assert await handed.rest() == b""
        assert not handed.returned


class TestLastWords:
    async def test_what_comes_behind_them_is_nobodys(
        self, loop: Loop, master: Master, http: uvicorn.Config, application: Served
    ) -> None:
        """h11 calls it an error, which must not cost the response that it comes in the midst of."""
        handed = master.hand(request("GET", "/last"))
        data = b""
        while not data.endswith(b"half"):
            data += await handed.reads(1)
        await handed.sends(GET)
        await until(lambda: not handed.unread(), "it is read")
        await turns(5)
        application.go.set()
        assert await handed.rest() == b"half"


class TestTls:
    """The protocol's part of it: who hears that a response is the last when the worker leaves."""

    @pytest.fixture(autouse=True)
    def encrypted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A connection of its own, as far as the protocol can tell; what is said is in the clear.
        monkeypatch.setattr(HandedTransport, "serves", lambda self, protocol: False)

    async def begun(self, master: Master, made: list[Any]) -> Handed:
        """A response of which the client has the first half."""
        handed = master.hand(request("GET", "/slowly"))
        await until(lambda: made, "there is a protocol")
        made[0].scheme = "https"
        data = b""
        while not data.endswith(b"half"):
            data += await handed.reads(1)
        assert b"\r\nconnection:" not in data.lower()
        return handed

    async def test_a_response_that_has_begun_is_not_the_last(
        self,
        loop: Loop,
        master: Master,
        http: uvicorn.Config,
        application: Served,
        borrowing: Borrowing,
        made: list[Any],
    ) -> None:
        """Who was not told asks again, and may have done so before the end could reach it."""
        handed = await self.begun(master, made)
        drain(master, borrowing, made[0])
        application.go.set()
        assert await handed.reads(4) == b"half"
        await stays(handed)
        await handed.sends(GET)
        head, body = split(await handed.rest())
        assert (b"\r\nconnection: close" in head.lower(), body) == (True, b"hello")

    async def test_nor_is_it_when_the_next_request_has_come_already(
        self,
        loop: Loop,
        master: Master,
        http: uvicorn.Config,
        application: Served,
        borrowing: Borrowing,
        made: list[Any],
    ) -> None:
        handed = await self.begun(master, made)
        await handed.sends(GET)
        await until(lambda: not handed.unread(), "it is read")
        drain(master, borrowing, made[0])
        application.go.set()
        assert await handed.reads(4) == b"half"
        head, body = split(await handed.rest())
        assert (b"\r\nconnection: close" in head.lower(), body) == (True, b"hello")

    async def test_who_asks_nothing_more_is_ended(
        self,
        loop: Loop,
        master: Master,
        http: uvicorn.Config,
        application: Served,
        borrowing: Borrowing,
        made: list[Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(ours, "LAST_CALL", 0.01)
        handed = await self.begun(master, made)
        drain(master, borrowing, made[0])
        await asyncio.sleep(0.03)
        # Its time begins with the end of the response.
        application.go.set()
        assert await handed.rest() == b"half"

    async def test_when_the_cluster_stops_it_is(
        self,
        loop: Loop,
        master: Master,
        http: uvicorn.Config,
        application: Served,
        borrowing: Borrowing,
        made: list[Any],
    ) -> None:
        handed = await self.begun(master, made)
        borrowing.after_response = False
        made[0].shutdown()
        application.go.set()
        assert await handed.rest() == b"half"


def mark(master: Master, handed: Handed) -> int:
    return master.receiver.marks[handed.copy.fileno()]


async def reads_all(handed: Handed) -> None:
    await until(lambda: not handed.unread(), "it is read")


@pytest.fixture
def shared(master: Master) -> Iterator[None]:
    """`--dispatch auto`: the master could take back what is between two requests."""
    theirs = select.epoll()
    master.receiver.borrow(select.epoll.fromfd(os.dup(theirs.fileno())), keep=True, head_timeout=0.0)
    yield
    theirs.close()


@pytest.mark.parametrize("http", ["httptools"], indirect=True)
class TestEmptyLine:
    """It begins no request (RFC 9112, 2.2), so its connection is as idle as it was.  (h11 answers 400.)"""

    async def test_of_who_has_said_nothing_else(self, loop: Loop, master: Master, http: uvicorn.Config) -> None:
        handed = master.hand(b"\r\n")
        await returned(handed)
        handed = master.again(handed, b"\r\n" + GET)
        assert (await response(handed))[1] == b"hello"
        await returned(handed)

    async def test_between_two_requests(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any], shared: None
    ) -> None:
        handed = master.hand(GET)
        for _ in range(2):
            assert (await response(handed))[1] == b"hello"
            await reaches(made[0].transport, "KEPT")
            handed.arrive(b"\r\n")
            await reads_all(handed)
            await reaches(made[0].transport, "KEPT")
            assert (mark(master, handed), master.receiver.running) == (IDLE, 0)
            await handed.sends(GET)
        await response(handed)
        master.receiver.stop_keeping()
        await returned(handed)

    @pytest.mark.usefixtures("for_good")
    async def test_where_nobody_else_would_end_it(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]
    ) -> None:
        handed = master.hand(b"\r\n")
        await until(lambda: made and made[0].timeout_keep_alive_task is not None, "its time runs")
        await handed.sends(GET)
        await response(handed)
        await handed.sends(b"\r\n")
        await reads_all(handed)
        await until(lambda: made[0].timeout_keep_alive_task is not None, "its time runs again")
        made[0].timeout_keep_alive_handler()
        assert await handed.rest() == b""


@pytest.mark.parametrize("mode", ["for_good", "shared"])
async def test_who_goes_on_with_a_body_that_was_answered_has_its_time_too(
    loop: Loop, master: Master, http: uvicorn.Config, made: list[Any], mode: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(mode)
    handed = master.hand(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12")
    assert (await response(handed))[1] == b"early"
    await until(lambda: made[0].timeout_keep_alive_task is not None, "its time runs")
    before = made[0].timeout_keep_alive_task
    await handed.sends(b"34")
    await until(lambda: made[0].timeout_keep_alive_task is not before, "it has said something")
    await until(lambda: made[0].timeout_keep_alive_task is not None, "its time runs again")
    made[0].timeout_keep_alive_handler()
    assert await handed.rest() == b""


@pytest.mark.parametrize("mode", ["for_good", "shared"])
async def test_leave_to_send_the_body_is_no_answer(
    loop: Loop, master: Master, http: uvicorn.Config, mode: str, request: pytest.FixtureRequest
) -> None:
    """Should the worker die meanwhile, its client is still to be answered."""
    request.getfixturevalue(mode)
    head = b"POST /digest HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    handed = master.hand(head)
    assert await handed.reads(len(CONTINUE)) == CONTINUE
    await until(lambda: mark(master, handed) == READING, "it says so")
    await handed.sends(b"12")
    await reads_all(handed)
    assert mark(master, handed) == READING
    await handed.sends(b"34")
    assert (await response(handed))[1] == hashlib.sha256(b"1234").hexdigest().encode()
    await until(lambda: mark(master, handed) == IDLE, "it is idle")
    master.receiver.stop_keeping()


async def test_a_large_response_is_in_progress_until_it_is_over(
    loop: Loop, master: Master, http: uvicorn.Config, made: list[Any], shared: None
) -> None:
    """Whichever transport it has: `least` counts it."""
    handed = master.hand(GET, sndbuf=8192)
    await response(handed)
    await reaches(made[0].transport, "KEPT")
    await handed.sends(request("GET", "/sized"))
    await reaches(made[0].transport, "REAL")
    board = master.receiver.counters
    await until(lambda: board[1] == 1, "it is in progress")
    await turns(5)
    assert (master.receiver.running, board[1]) == (1, 1)
    assert len((await response(handed))[1]) == len(LARGE)
    await returned(handed)
    assert (master.receiver.running, board[1]) == (0, 0)


class TestWhoCannot:
    async def test_a_transport_that_is_not_the_masters(
        self, loop: Loop, master: Master, http: uvicorn.Config, made: list[Any]
    ) -> None:
        """Policy `none`: everything is uvicorn's."""
        master.hand(GET)
        await until(lambda: made, "there is a class to take")
        protocol = made[0].__class__(config=http, server_state=ServerState(), app_state={}, _loop=loop)
        handed = master.connection()
        await loop.connect_accepted_socket(lambda: protocol, handed.copy.dup())
        for _ in range(2):
            await handed.sends(GET)
            assert (await response(handed))[1] == b"hello"
        assert not protocol.give_back()
        protocol.shutdown()
        await until(lambda: protocol not in protocol.connections, "it is closed")

    def test_a_protocol_that_is_not_ours(self) -> None:
        assert http_protocol("package.module:Class", Borrowing()) == "package.module:Class"

    def test_the_names(self) -> None:
        borrowing = Borrowing()
        for name, kind in (("h11", ours.BorrowingH11), ("httptools", ours.BorrowingHttpTools)):
            found: Any = http_protocol(name, borrowing)
            assert issubclass(found, kind)
            assert found.borrowing is borrowing
        auto: Any = http_protocol("auto", borrowing)
        assert issubclass(auto, ours.BorrowingHttpTools)
