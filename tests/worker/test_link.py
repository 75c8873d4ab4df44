"""The worker's link to its master, driven from the master's ends of both channels."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
from typing import Any

import pytest

from clusterserve.channel.board import Board
from clusterserve.channel.connection import connection_channel
from clusterserve.core.messages import Boot, Closed, Drain, Leave, Listen, Listened, Listening, Message, Online
from clusterserve.core.records import Kind
from clusterserve.worker.link import MASTER_GONE, Link
from clusterserve.worker.receiver import Receiver
from clusterserve.worker.server import Entrance, FauxServer
from tests.helpers.loops import turns, until
from tests.worker.clustered import FakeMaster
from tests.worker.harness import Recorder, Recorders

Loop = asyncio.AbstractEventLoop


@pytest.fixture
def loop(fake: FakeMaster) -> Loop:
    """The cluster loop."""
    return fake.loop


def echo(protocol: Recorder, data: bytes) -> None:
    protocol.transport.write(data)
    protocol.transport.close()


async def listen(fake: FakeMaster, bind: str = "127.0.0.1:0") -> tuple[Listened, list[int]]:
    return await fake.link.listen(Listen(0, bind, 100, False, False))


async def serve(fake: FakeMaster, recorders: Recorders, bind: str = "127.0.0.1:0") -> Any:
    answer, _ = await listen(fake, bind)
    server = FauxServer(
        fake.loop, [Entrance(answer, recorders, {}, True)], fake.link.serve, lambda server: fake.link.leave(1)
    )
    await server.start_serving()
    return server


# ── listening ───────────────────────────────────────────────────────────────────────────────────────────────────────


class TestListen:
    async def test_the_request_and_its_answer(self, loop: Loop, fake: FakeMaster) -> None:
        answer, descriptors = await fake.link.listen(Listen(0, "[::1]:80", 7, True, False))
        assert fake.messages == [Listen(1, "[::1]:80", 7, True, False)]
        assert answer == Listened(1, 1, 0, "", socket.AF_INET, ["127.0.0.1", 8001], False)
        assert descriptors == []

    async def test_requests_are_told_apart(self, loop: Loop, fake: FakeMaster) -> None:
        requests: list[Listen] = []
        fake.answers = requests.append
        tasks = [loop.create_task(listen(fake, bind)) for bind in ("one:1", "two:2", "three:3")]
        await fake.said(Listen, 3)
        for request in reversed(requests):
            fake.grant(request)
        answers = [await task for task in tasks]
        assert [answer.listener for answer, _ in answers] == [3, 2, 1]
        assert [answer.request for answer, _ in answers] == [1, 2, 3]

    async def test_an_error_is_the_kernels(self, loop: Loop, fake: FakeMaster) -> None:
        fake.answers = fake.refuse(errno.EADDRINUSE, "cannot listen on 127.0.0.1:0: address already in use")
        with pytest.raises(OSError, match=r"^\[Errno 98\] cannot listen on 127.0.0.1:0: address") as caught:
            await listen(fake)
        assert caught.value.errno == errno.EADDRINUSE

    async def test_the_socket_comes_with_the_answer(self, loop: Loop, fake: FakeMaster) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            fake.answers = fake.share(listener)
            answer, descriptors = await listen(fake)
            assert answer.shared
            with socket.socket(fileno=descriptors[0]) as ours:
                assert ours.getsockname() == listener.getsockname()


class TestGivenUp:
    """Whoever asked is cancelled before the answer comes."""

    async def given_up(self, loop: Loop, fake: FakeMaster) -> Listen:
        requests: list[Listen] = []
        fake.answers = requests.append
        task = loop.create_task(listen(fake))
        await fake.said(Listen)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return requests[0]

    async def test_the_listener_is_let_go(self, loop: Loop, fake: FakeMaster) -> None:
        fake.grant(await self.given_up(loop, fake))
        assert await fake.said(Closed) == [Closed(1)]

    async def test_the_socket_is_closed(self, loop: Loop, fake: FakeMaster) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            fake.share(listener)(await self.given_up(loop, fake))
            assert await fake.said(Closed) == [Closed(1)]

    async def test_who_asks_for_the_same_meanwhile_waits_until_it_is_given_back(
        self, loop: Loop, fake: FakeMaster
    ) -> None:
        """The master would take it for a second server there."""
        request = await self.given_up(loop, fake)
        impatient, again = loop.create_task(listen(fake)), loop.create_task(listen(fake))
        await turns(5)
        impatient.cancel()
        await turns(5)
        assert len(fake.of(Listen)) == 1
        fake.answers = fake.grant
        fake.grant(request)
        await again
        assert [type(message) for message in fake.messages] == [Listen, Closed, Listen]

    async def test_an_error_is_nobodys(self, loop: Loop, fake: FakeMaster) -> None:
        fake.refuse(errno.EACCES, "no")(await self.given_up(loop, fake))
        fake.answers = fake.grant
        await listen(fake)
        assert fake.of(Closed) == []

    @pytest.mark.parametrize("fails", [False, True])
    async def test_in_the_turn_in_which_it_is_answered(self, loop: Loop, fake: FakeMaster, fails: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = loop.create_task(listen(fake))
            answered = fake.link._listened

            def cancelling(message: Listened, descriptors: list[int]) -> None:
                answered(message, descriptors)
                task.cancel()

            fake.link._listened = cancelling  # type: ignore[method-assign]
            fake.answers = fake.refuse(errno.EACCES, "no") if fails else fake.share(listener)
            with pytest.raises(asyncio.CancelledError):
                await task
            await turns(3)
            assert fake.of(Closed) == ([] if fails else [Closed(1)])


# ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestServe:
    async def test_connections_come(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        told: list[list[Message]] = []
        fake.link.on_listening = lambda address: told.append(fake.of(Listening))
        await serve(fake, recorders.on(data=echo))
        assert await fake.said(Listening) == [Listening(1)]
        # Before the master is told, so that what is prepared then is in place for the first connection.
        assert told == [[]]
        (client,) = fake.hand(1, b"hello")
        assert await fake.rest(client) == b"hello"
        await fake.answered(1, Kind.CLOSED)

    async def test_to_the_right_server(self, loop: Loop, fake: FakeMaster) -> None:
        one, two = Recorders().on(data=echo), Recorders().on(data=echo)
        await serve(fake, one)
        await serve(fake, two)
        first, second = fake.hand(2, b"for two", b"for two as well")
        (third,) = fake.hand(1, b"for one")
        for client in (first, second, third):
            assert await fake.rest(client)
        assert [bytes(protocol.data) for protocol in one.all] == [b"for one"]
        assert [bytes(protocol.data) for protocol in two.all] == [b"for two", b"for two as well"]

    async def test_close(self, loop: Loop, fake: FakeMaster, recorders: Recorders) -> None:
        server = await serve(fake, recorders)
        server.close()
        server.close()
        assert await fake.said(Closed) == [Closed(1)]
        fake.hand(1, b"too late")
        await fake.answered(1, Kind.REFUSED)
        assert recorders.all == []


# ── the order to finish ─────────────────────────────────────────────────────────────────────────────────────────────


class TestDrain:
    async def test_what_was_offered_before_is_taken_first(
        self, loop: Loop, fake: FakeMaster, recorders: Recorders
    ) -> None:
        server = await serve(fake, recorders.on(data=echo))
        orders: list[tuple[float, bool, bool, int, list[int]]] = []

        def drain(grace: float, quick: bool, keep: bool) -> None:
            server.close()
            orders.append((grace, quick, keep, len(recorders.all), fake.end.recall()))

        fake.link.on_drain = drain
        clients = fake.hand(1, b"one", b"two", b"three")
        fake.channel.send(Drain(4.5, True, True))
        assert [await fake.rest(client) for client in clients] == [b"one", b"two", b"three"]
        assert orders == [(4.5, True, True, 3, [])]

    async def test_nobody_wants_to_know(self, loop: Loop, fake: FakeMaster) -> None:
        fake.channel.send(Drain(1.0, False, False))
        fake.channel.send(Drain(1.0, True, False))
        await listen(fake)

    async def test_descriptors_that_come_with_it_are_closed(self, loop: Loop, fake: FakeMaster) -> None:
        reader, writer = os.pipe()
        fake.channel.send(Drain(1.0, False, False), [reader, writer])
        os.close(reader)
        os.close(writer)
        await listen(fake)

    async def test_asking_for_it_from_a_signal_handler(self, loop: Loop, fake: FakeMaster) -> None:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: fake.link.ask_to_leave())
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await fake.said(Leave) == [Leave()]
        finally:
            signal.signal(signal.SIGUSR1, before)


# ── the end of the master ───────────────────────────────────────────────────────────────────────────────────────────


class Exited(BaseException):
    """Instead of the end of this process."""


class TestTheEndOfTheMaster:
    @pytest.fixture
    def exits(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        exits: list[int] = []
        monkeypatch.setattr(os, "_exit", exits.append)
        return exits

    async def test_its_message_channel_is_closed(self, loop: Loop, fake: FakeMaster, exits: list[int]) -> None:
        fake.channel.close()
        await until(lambda: exits, "the worker ends")
        await turns(3)
        assert exits == [MASTER_GONE]

    async def test_its_connection_channel_is_closed(self, loop: Loop, fake: FakeMaster, exits: list[int]) -> None:
        loop.remove_reader(fake.end.fileno())
        loop.add_reader(fake.channel._sock, lambda: None)
        own, theirs = fake.end._own, fake.end._theirs
        theirs.close()
        own.shutdown(socket.SHUT_RDWR)
        await until(lambda: exits, "the worker ends")
        assert exits == [MASTER_GONE]

    @pytest.mark.parametrize(
        "message",
        [Boot(1, 0, {}, []), Online(1), Listening(1), Closed(1), Leave(), Listened(9, 1, 0, "", 2, "", False)],
    )
    async def test_it_says_what_no_master_says(
        self, loop: Loop, fake: FakeMaster, exits: list[int], message: Message
    ) -> None:
        fake.channel.send(message)
        await until(lambda: exits, "the worker ends")
        assert exits == [MASTER_GONE]

    async def test_nothing_can_be_said_then(self, loop: Loop, fake: FakeMaster, exits: list[int]) -> None:
        fake.channel.close()
        await until(lambda: exits, "the worker ends")
        fake.link.send(Online(1))


# ── without a loop ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_before_it_is_attached() -> None:
    ours, theirs = socket.socketpair()
    end, connections = connection_channel()
    board = Board.create()
    link = Link(theirs, connections, board, select.epoll())
    link.send(Online(1))
    link.ask_to_leave()
    with pytest.raises(AssertionError, match="not attached"):
        _ = link.receiver
    board.close()
    link.kept.close()
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(1)
    for sock in (ours, theirs):
        sock.close()
    end.close()


async def test_it_has_a_receiver(loop: Loop, fake: FakeMaster) -> None:
    assert isinstance(fake.link.receiver, Receiver)
