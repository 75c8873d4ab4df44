"""The socket between two masters."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from clusterserve.channel.handover import HandoverChannel, first
from clusterserve.core.handover import HandedConnection, Hello, Left, Message, Passed, Waits
from clusterserve.errors import ProtocolError
from tests.helpers.waiting import DEADLINE

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


class Ear:
    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.fds: list[int] = []
        self.ended: list[ProtocolError | None] = []
        self.over = asyncio.Event()

    def on_message(self, message: Message, fds: list[int]) -> None:
        self.heard.append(message)
        self.fds += fds

    def on_closed(self, error: ProtocolError | None) -> None:
        self.ended.append(error)
        self.over.set()


def test_descriptors_ride_along_in_their_order(pair: Pair) -> None:
    async def main() -> None:
        loop, ear = asyncio.get_running_loop(), Ear()
        sender = HandoverChannel(loop, pair[0], lambda message, fds: None, lambda error: None)
        receiver = HandoverChannel(loop, pair[1], ear.on_message, ear.on_closed)
        files = [os.memfd_create(f"file {number}") for number in range(3)]
        known = [os.fstat(fd).st_ino for fd in files]
        messages: list[Message] = [Passed((HandedConnection(1, Waits.WORD, 0.5),) * 3), Left()]
        sender.send(messages[0], files)
        sender.send(messages[1])
        # They are under way, and nobody's here.
        for fd in files:
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
        await asyncio.wait_for(sender.flush(), DEADLINE)
        sender.close()
        await asyncio.wait_for(ear.over.wait(), DEADLINE)
        assert (ear.heard, ear.ended) == (messages, [None])
        assert [os.fstat(fd).st_ino for fd in ear.fds] == known
        assert not any(os.get_inheritable(fd) for fd in ear.fds)
        for fd in ear.fds:
            os.close(fd)
        assert not receiver.is_open
        # Nobody hears it, and nothing is left open.
        read, write = os.pipe()
        receiver.send(Left(), [write])
        assert os.read(read, 1) == b""
        os.close(read)

    asyncio.run(main())


def test_what_does_not_fit_waits(pair: Pair) -> None:
    async def main() -> None:
        loop, ear = asyncio.get_running_loop(), Ear()
        sender = HandoverChannel(loop, pair[0], lambda message, fds: None, lambda error: None)
        messages = [Hello(float(number)) for number in range(5000)]
        for message in messages:
            sender.send(message)
        flushed = asyncio.ensure_future(sender.flush())
        await asyncio.sleep(0)
        assert not flushed.done()
        receiver = HandoverChannel(loop, pair[1], ear.on_message, ear.on_closed)
        await asyncio.wait_for(flushed, DEADLINE)
        sender.close()
        await asyncio.wait_for(ear.over.wait(), DEADLINE)
        assert ear.heard == messages
        receiver.close()

    asyncio.run(main())


def test_what_cannot_be_ends_it(pair: Pair) -> None:
    async def main() -> None:
        loop, ear = asyncio.get_running_loop(), Ear()
        HandoverChannel(loop, pair[1], ear.on_message, ear.on_closed)
        read, write = os.pipe()
        socket.send_fds(pair[0], [b"nonsense"], [write])
        os.close(write)
        await asyncio.wait_for(ear.over.wait(), DEADLINE)
        assert ear.heard == []
        assert "not JSON" in str(ear.ended[0])
        # What came with it is closed.
        assert os.read(read, 1) == b""
        os.close(read)

    asyncio.run(main())


class TestTheFirst:
    def test_it_is_read_without_a_loop(self, pair: Pair) -> None:
        read, write = os.pipe()
        body = b'{"message": "Left", "protocol": 1}'
        socket.send_fds(pair[0], [body], [read])
        message, (fd,) = first(pair[1])
        assert (message, os.fstat(fd).st_ino) == (Left(), os.fstat(read).st_ino)
        for each in (read, write, fd):
            os.close(each)

    def test_nobody_is_there(self, pair: Pair) -> None:
        pair[0].close()
        with pytest.raises(ProtocolError, match="nothing came"):
            first(pair[1])

    def test_it_speaks_another_protocol(self, pair: Pair) -> None:
        read, write = os.pipe()
        socket.send_fds(pair[0], [b'{"message": "Left", "protocol": 2}'], [write])
        os.close(write)
        with pytest.raises(ProtocolError, match="it speaks protocol 2"):
            first(pair[1])
        assert os.read(read, 1) == b""
        os.close(read)
