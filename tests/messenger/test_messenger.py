"""`Messenger`: two of them, on two ends of a real channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterserve.channel.message import MessageChannel
from clusterserve.core.envelope import Envelope, Kind
from clusterserve.core.messages import Message
from clusterserve.errors import ChannelClosed, ClusterError, ProtocolError
from clusterserve.messenger import HIGH_WATER, Messenger, broadcast
from tests.helpers.descriptors import room_for
from tests.helpers.loops import turns, until


class Side(Messenger):
    """One side: its channel, and what it heard."""

    _peer = "worker 7"

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, *, pickled: bool = False, early: bool = False
    ) -> None:
        super().__init__(("message", "error"), pickled=pickled, early=early)
        self.settle(loop)
        self.channel = MessageChannel(loop, sock, self.on_message, self.on_closed, self.received)
        self.heard: list[Any] = []
        self.sockets: list[socket.socket] = []
        self.errors: list[Exception] = []
        self.misdeeds: list[ProtocolError] = []

    def listen(self) -> Side:
        self.on("message", self.hear)
        self.on("error", self.errors.append)
        return self

    def hear(self, message: Any, sockets: list[socket.socket]) -> None:
        self.heard.append(message)
        self.sockets += sockets

    def on_message(self, message: Message, descriptors: list[int]) -> None:
        raise AssertionError

    def on_closed(self, error: ProtocolError | None) -> None:
        self.channel_closed()

    def is_connected(self) -> bool:
        return self.channel.is_open

    def _post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        self.channel.post(envelope, descriptors, done)

    def _misbehaved(self, error: ProtocolError) -> None:
        self.misdeeds.append(error)


@contextlib.contextmanager
def two(loop: asyncio.AbstractEventLoop, pickled: bool = False, early: bool = False) -> Iterator[tuple[Side, Side]]:
    ours, theirs = socket.socketpair()
    sides = Side(loop, ours, pickled=pickled, early=early), Side(loop, theirs, pickled=pickled)
    yield sides
    for side in sides:
        side.channel.close()
        side.channel_closed()
        for sock in side.sockets:
            sock.close()


@pytest.fixture
def sides(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[Side, Side]]:
    with two(loop) as sides:
        yield sides


class TestSending:
    async def test_both_ways(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        one.listen()
        other.listen()
        assert one.send({"cmd": "NODE_internal", "n": [1, None, "ä"]})
        assert other.send("hello")
        await until(lambda: one.heard and other.heard, "both have heard")
        assert (one.heard, other.heard) == (["hello"], [{"cmd": "NODE_internal", "n": [1, None, "ä"]}])

    async def test_it_is_done_when_the_kernel_has_it(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        other.listen()
        assert one.send(1).done()
        large = one.send("x" * (8 << 20))
        assert not large.done()
        await large
        await until(lambda: len(other.heard) == 2, "it has arrived")

    async def test_false_says_that_much_waits(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.listen()
        count = 0
        while one.send("x" * 65536):
            count += 1
        # What the kernel takes, and what may wait.
        assert HIGH_WATER // 65536 <= count <= HIGH_WATER // 65536 + 8
        await one.send("last")
        assert one.send("more")
        await until(lambda: len(other.heard) == count + 3, "all have arrived")

    async def test_to_who_is_gone(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.channel.close()
        await until(lambda: not one.is_connected(), "it is known")
        delivery = one.send(1)
        assert not delivery
        with pytest.raises(ChannelClosed, match=r"^the channel of worker 7 is closed$"):
            await delivery
        with pytest.raises(ChannelClosed):
            await one.request(1, timeout=5)

    async def test_what_waits_when_the_end_comes(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        delivery = one.send("x" * (8 << 20))
        assert delivery
        other.channel.close()
        with pytest.raises(ChannelClosed):
            await delivery

    @pytest.mark.parametrize("content", [object(), b"bytes", {"a": {1}}])
    async def test_what_cannot_be_encoded(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side], content: Any
    ) -> None:
        one, _ = sides
        with pytest.raises(TypeError):
            one.send(content)
        with pytest.raises(TypeError):
            one.request(content)
        assert len(one._requests) == 0

    async def test_from_another_thread(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.on_request(lambda obj: obj * 2)
        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(one.request(21, timeout=20).result(20)))
        thread.start()
        await until(lambda: results, "it is answered")
        thread.join()
        assert results == [42]

    async def test_a_handler_that_raises_stops_nothing(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side], caplog: pytest.LogCaptureFixture
    ) -> None:
        one, other = sides

        @other.on("message")
        def broken(message: Any) -> None:
            other.heard.append(message)
            raise ValueError(message)

        for number in range(10):
            one.send(number)
        await until(lambda: len(other.heard) == 10, "all have arrived")
        assert other.heard == list(range(10))
        assert len(caplog.records) == 10


class TestPickle:
    async def test_what_refers_to_itself(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, pickled=True) as (one, other):
            other.listen()
            ring: list[Any] = []
            ring.append(ring)
            one.send(ring)
            await until(lambda: other.heard, "it has arrived")
            assert other.heard[0][0] is other.heard[0]

    async def test_what_cannot_be_unpickled_costs_itself(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, pickled=True) as (one, other):
            other.listen()
            other.on_request(lambda obj: obj)
            one.channel.post(Envelope(Kind.SEND, 0, True, b"cno.such.module\nx\n."), [])
            one.send(1)
            await until(lambda: other.heard, "the next has arrived")
            (error,) = other.errors
            assert str(error).startswith("a message of worker 7 cannot be read: ModuleNotFoundError")
            assert other.misdeeds == []

    async def test_it_is_never_unpickled_where_json_was_chosen(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        other.listen()
        one.channel.post(Envelope(Kind.SEND, 0, True, b"cos\nabort\n(tR."), [])
        await until(lambda: other.misdeeds, "it is noticed")
        assert str(other.misdeeds[0]) == "a message in pickle, where JSON was agreed upon"


class TestSockets:
    async def test_a_connection_is_handed_over(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.listen()
        near, far = socket.socketpair()
        with far:
            delivery = one.send("take it", near)
            await delivery
            assert near.fileno() == -1
            await until(lambda: other.heard, "it has arrived")
            (sock,) = other.sockets
            assert (sock.family, sock.type, sock.getblocking()) == (socket.AF_UNIX, socket.SOCK_STREAM, True)
            sock.sendall(b"hello")
            assert far.recv(9) == b"hello"

    async def test_keep_open(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.listen()
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            await one.send(1, near, keep_open=True)
            await until(lambda: other.heard, "it has arrived")
            near.send(b"a")
            other.sockets[0].send(b"b")
            assert far.recv(9) == b"ab"
            # It blocks no more than its sender's did.
            assert not other.sockets[0].getblocking()

    async def test_what_listens_and_what_is_udp_stays(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        other.listen()
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as udp:
            await one.send(1, server, udp)
            await until(lambda: other.heard, "it has arrived")
            assert server.fileno() >= 0
            assert udp.fileno() >= 0
            there = other.sockets[0]
            assert there.getsockname() == server.getsockname()
            assert there.proto == socket.IPPROTO_TCP
            with socket.create_connection(server.getsockname()):
                there.accept()[0].close()
            assert other.sockets[1].type == socket.SOCK_DGRAM
            await one.send(2, server, udp, keep_open=False)
            assert (server.fileno(), udp.fileno()) == (-1, -1)
            await until(lambda: len(other.heard) == 2, "it has arrived")

    async def test_the_copy_is_made_at_once(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.listen()
        one.send("x" * (8 << 20))
        near, far = socket.socketpair()
        with far:
            one.send("behind it", near)
            near.close()
            await until(lambda: len(other.heard) == 2, "both have arrived")
            other.sockets[0].send(b"!")
            assert far.recv(9) == b"!"

    async def test_who_is_gone_gets_none_and_ours_stays(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, _ = sides
        one.channel.close()
        near, far = socket.socketpair()
        with near, far:
            assert not one.send(1, near)
            assert near.fileno() >= 0

    async def test_nobody_listens(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        near, far = socket.socketpair()
        with far:
            one.send(1, near)
            far.setblocking(True)
            await asyncio.to_thread(far.recv, 1)
        assert other.heard == []

    async def test_some_that_do_not_arrive_are_an_error(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        other.listen()
        pairs = [socket.socketpair() for _ in range(3)]
        assert one.send("three", *(near for near, _ in pairs)).done()
        with room_for(1):
            other.channel._read()
        await until(lambda: other.heard, "it has arrived")
        assert other.heard == ["three"]
        assert len(other.sockets) == 1
        (error,) = other.errors
        assert str(error) == "2 of 3 sockets of a message have not arrived: at the limit of open files?"
        for _, far in pairs:
            far.close()

    async def test_our_own_limit_is_the_deliverys_failure(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, _ = sides
        near, far = socket.socketpair()
        with near, far:
            with room_for(0):
                delivery = one.send(1, near)
            assert not delivery
            with pytest.raises(OSError, match="Too many open files"):
                await delivery
            assert near.fileno() >= 0

    async def test_what_is_no_socket(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.listen()
        with pytest.raises(TypeError, match="is a socket, not 7"):
            one.send(1, 7)
        near, far = socket.socketpair()
        with near, far:
            with pytest.raises(ValueError, match="at most 16 sockets"):
                one.send(1, *[near] * 17)
            with (
                ssl.create_default_context().wrap_socket(
                    near, do_handshake_on_connect=False, server_hostname="a"
                ) as tls,
                pytest.raises(TypeError, match="TLS"),
            ):
                one.send(1, tls)
        with pytest.raises(ValueError, match="closed"):
            one.send(1, near)
        # Nor from the other side.
        reader, writer = os.pipe()
        os.close(writer)
        one.channel.post(Envelope(Kind.SEND, 0, False, b"1"), [reader])
        await until(lambda: other.errors, "it is noticed")


class TestRequests:
    async def test_a_function_answers(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides

        @other.on_request
        def double(obj: Any) -> Any:
            return {"twice": obj * 2}

        assert await one.request(21) == {"twice": 42}
        assert len(one._requests) == 0

    async def test_a_coroutine_answers_in_its_time(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        gates = [asyncio.Event() for _ in range(3)]

        @other.on_request
        async def slow(obj: int) -> int:
            await gates[obj].wait()
            return obj

        pending = [one.request(number) for number in range(3)]
        for number in (2, 0, 1):
            gates[number].set()
            assert await pending[number] == number

    async def test_both_sides_at_once(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        one.on_request(lambda obj: ["one", obj])
        other.on_request(lambda obj: ["other", obj])
        answers = await asyncio.gather(
            *(asyncio.wrap_future(side.request(number)) for number in range(50) for side in sides)
        )
        assert answers == [[name, number] for number in range(50) for name in ("other", "one")]

    async def test_it_may_bring_sockets(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides

        @other.on_request
        def port(obj: Any, sockets: list[socket.socket]) -> int:
            with sockets[0] as sock:
                return int(sock.getsockname()[1])

        with socket.create_server(("127.0.0.1", 0)) as server:
            assert await one.request("port?", server) == server.getsockname()[1]

    @pytest.mark.parametrize("coroutine", [False, True])
    async def test_what_it_raises_is_told(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side], caplog: pytest.LogCaptureFixture,
        coroutine: bool,
    ) -> None:  # fmt: skip
        one, other = sides

        def broken(obj: Any) -> None:
            raise LookupError(f"no {obj}")

        async def broken_later(obj: Any) -> None:
            broken(obj)

        other.on_request(broken_later if coroutine else broken)
        with pytest.raises(ClusterError, match=r"^LookupError: no luck$"):
            await one.request("luck")
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert record.exc_info[2] is not None
        assert "broken" in str(record.exc_info[2].tb_frame.f_code.co_name)

    async def test_an_answer_that_cannot_be_sent(
        self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]
    ) -> None:
        one, other = sides
        other.on_request(lambda obj: object())
        with pytest.raises(ClusterError, match="not JSON serializable"):
            await one.request(1)

    async def test_nobody_answers(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, _ = sides
        with pytest.raises(ClusterError, match="nobody answers requests there"):
            await one.request(1)

    async def test_too_late(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        gate = asyncio.Event()

        @other.on_request
        async def slow(obj: Any) -> Any:
            await gate.wait()
            return obj

        with pytest.raises(TimeoutError, match=r"^worker 7 has not answered within 0\.01 s$"):
            await one.request(1, timeout=0.01)
        gate.set()
        # The answer to the first comes now, and is nobody's.
        assert await one.request(2) == 2
        assert one.misdeeds == []

    async def test_the_other_side_goes(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides

        @other.on_request
        async def never(obj: Any) -> None:
            await asyncio.Event().wait()

        pending = [one.request(1), one.request(2, timeout=60)]
        await turns(3)
        other.channel.close()
        for each in pending:
            with pytest.raises(ChannelClosed, match=r"^worker 7 is gone and has not answered$"):
                await each

    async def test_a_bogus_answer(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.channel.post(Envelope(Kind.REPLY, 99, False, b"1"), [])
        await until(lambda: one.misdeeds, "it is noticed")
        assert str(one.misdeeds[0]) == "an answer to request 99, which was never sent"

    async def test_an_answer_that_is_no_json(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        one, other = sides
        other.on("message", lambda message: None)
        pending = one.request(1)
        other.channel.post(Envelope(Kind.REPLY, 1, False, b"{"), [])
        with pytest.raises(ProtocolError):
            await pending
        assert len(one.misdeeds) == 1

    async def test_a_handler_is_a_function(self, loop: asyncio.AbstractEventLoop, sides: tuple[Side, Side]) -> None:
        with pytest.raises(TypeError, match="is a function"):
            sides[0].on_request(7)  # type: ignore[type-var]


class TestEarly:
    """What comes before anybody listens."""

    async def test_it_waits_for_a_listener(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, early=True) as (one, other):
            near, far = socket.socketpair()
            for number in range(3):
                other.send(number, *([near] if number == 1 else []))
            await until(lambda: one._early and len(one._early) == 3, "all have arrived")
            one.listen()
            assert one.heard == []
            other.send(3)
            await until(lambda: len(one.heard) == 4, "all are heard")
            assert one.heard == [0, 1, 2, 3]
            one.sockets[0].send(b"!")
            assert far.recv(9) == b"!"
            far.close()

    async def test_a_request_and_a_message_keep_their_order(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, early=True) as (one, other):
            heard: list[Any] = []
            other.send("first")
            answer = other.request("second")
            one.on_request(lambda obj: heard.append(obj))
            await turns(5)
            assert heard == []
            one.on("message", lambda message: heard.append(message))
            await answer
            assert heard == ["first", "second"]

    async def test_waiting_for_one_is_listening(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, early=True) as (one, other):
            other.send(1)
            other.send(2)
            await until(lambda: one._early and len(one._early) == 2, "both have arrived")
            assert await one.wait_for("message") == (1, [])
            assert await one.wait_for("message") == (2, [])

    async def test_when_start_up_ends_nobody_will_listen(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, early=True) as (one, other):
            near, far = socket.socketpair()
            other.send(1, near)
            answer = other.request(2)
            await until(lambda: one._early and len(one._early) == 2, "both have arrived")
            one.started_up()
            with pytest.raises(ClusterError, match="nobody answers"):
                await answer
            assert far.recv(1) == b""
            far.close()
            one.listen()
            other.send(3)
            await until(lambda: one.heard, "the next is heard")
            assert one.heard == [3]

    async def test_answers_do_not_wait(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop, early=True) as (one, other):
            other.on_request(lambda obj: obj)
            other.send(1)
            assert await one.request(2) == 2


class TestBroadcast:
    async def test_to_all_that_are_connected(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop) as (one, far), two(loop, pickled=True) as (another, farther), two(loop) as (gone, _):
            gone.channel.close()
            for side in (far, farther):
                side.listen()
            near, peer = socket.socketpair()
            assert await broadcast([one, another, gone], {"all": True}, [near]) == 2
            assert near.fileno() == -1
            await until(lambda: far.heard and farther.heard, "both have heard")
            assert far.heard == farther.heard == [{"all": True}]
            for side in (far, farther):
                side.sockets[0].send(b"!")
            assert peer.recv(9) == b"!!"
            peer.close()

    async def test_to_one_that_goes_meanwhile(self, loop: asyncio.AbstractEventLoop) -> None:
        with two(loop) as (one, far), two(loop) as (gone, farther):
            far.listen()
            reached = broadcast([one, gone], "x" * (8 << 20))
            farther.channel.close()
            assert await reached == 1

    async def test_to_nobody(self, loop: asyncio.AbstractEventLoop) -> None:
        near, far = socket.socketpair()
        with far:
            assert await broadcast([], 1, [near]) == 0
            assert near.fileno() == -1
        with pytest.raises(TypeError):
            broadcast([], object())
