"""The program's messages on the channel: in pieces, with their descriptors, behind ours, and from any thread."""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from clusterserve.channel.descriptors import MAX_DESCRIPTORS, Riders
from clusterserve.channel.message import MessageChannel
from clusterserve.core.envelope import CHUNK, MAX_USER_BODY, Envelope, Kind, cut
from clusterserve.core.messages import HEADER_SIZE, Drain, Message, Online, encode
from clusterserve.errors import ProtocolError
from tests.helpers.descriptors import room_for
from tests.helpers.loops import turns, until

LARGE = 8 << 20


def message(number: int, size: int = 10) -> Envelope:
    return Envelope(Kind.SEND, number, False, bytes([number % 256]) * size)


@dataclass
class End:
    """One end, and what it was told, in order: ours, and the program's with the inodes that rode along."""

    channel: MessageChannel = field(init=False)
    got: list[Message | Envelope] = field(default_factory=list)
    inodes: list[list[int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    ends: list[ProtocolError | None] = field(default_factory=list)
    sent: list[bool] = field(default_factory=list)

    def open(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> End:
        self.channel = MessageChannel(loop, sock, self.on_message, self.ends.append, self.on_envelope)
        return self

    def on_message(self, message: Message, descriptors: list[int]) -> None:
        self.got.append(message)

    def on_envelope(self, envelope: Envelope, riders: Riders) -> None:
        self.got.append(envelope)
        self.lost.append(riders.lost)
        fds = riders.take()
        self.inodes.append([os.fstat(fd).st_ino for fd in fds])
        for fd in fds:
            os.close(fd)

    def post(self, envelope: Envelope, descriptors: list[int] | None = None) -> None:
        self.channel.post(envelope, descriptors or [], self.sent.append)


@pytest.fixture
def ends(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[End, End]]:
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = End().open(loop, sockets[0]), End().open(loop, sockets[1])
    yield ends
    for end in ends:
        end.channel.close()


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[int]]:
    """So many descriptors that are all different; those that are sent away are others' to close."""
    readers = []
    for _ in range(count):
        reader, writer = os.pipe()
        os.close(writer)
        readers.append(reader)
    try:
        yield readers
    finally:
        for reader in readers:
            os.close(reader)


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


async def test_there_and_back(loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
    one, other = ends
    one.post(message(1))
    other.post(message(2))
    # It is sent at once.
    assert one.sent == [True]
    await until(lambda: one.got and other.got, "both have got one")
    assert (one.got, other.got) == ([message(2)], [message(1)])


@pytest.mark.parametrize("size", [0, CHUNK, CHUNK + 1, 10 * 65521])
async def test_whatever_its_size(loop: asyncio.AbstractEventLoop, ends: tuple[End, End], size: int) -> None:
    one, other = ends
    for number in range(10):
        one.post(message(number, size))
    await until(lambda: len(other.got) == 10, "all have arrived")
    assert other.got == [message(number, size) for number in range(10)]
    assert one.sent == [True] * 10


async def test_large_ones_from_both_sides_at_once(loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
    one, other = ends
    with pipes(4) as fds:
        for number, end in itertools.product(range(4), ends):
            end.post(message(number, LARGE), [os.dup(fds[number])])
        await until(lambda: len(one.got) == len(other.got) == 4, "all have arrived")
        for end in ends:
            assert end.got == [message(number, LARGE) for number in range(4)]
            assert end.inodes == [[inode(fd)] for fd in fds]
            assert end.sent == [True] * 4


async def test_ours_overtake_them(loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
    one, other = ends
    one.post(message(1, LARGE))
    assert one.sent == []
    one.channel.send(Online(1))
    await until(lambda: len(other.got) == 2, "both have arrived")
    assert other.got == [Online(1), message(1, LARGE)]


async def test_but_not_one_that_stands_in_line(loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
    one, other = ends
    last = Drain(1.0, False, True)
    one.post(message(1, LARGE))
    assert one.channel.send_in_line(last)
    one.channel.send(Online(1))
    await until(lambda: len(other.got) == 3, "all have arrived")
    assert other.got == [Online(1), message(1, LARGE), last]
    one.channel.close()
    assert not one.channel.send_in_line(last)


async def test_one_turn_of_the_loop_carries_so_much_and_no_more(
    loop: asyncio.AbstractEventLoop, ends: tuple[End, End]
) -> None:
    """A reader that is faster than the writer, and the other way round: nobody holds the loop for a whole message."""
    one, other = ends
    reads = 0
    receive = other.channel._receive

    def faster() -> int:
        # As on another processor: what was read makes room at once.
        nonlocal reads
        reads += 1
        size = receive()
        one.channel._flush()
        return size

    other.channel._receive = faster  # type: ignore[method-assign]
    one.post(message(1, LARGE))
    other.channel._read()
    assert 0 < reads <= 64
    assert other.got == []
    await until(lambda: other.got, "it has arrived")


async def test_descriptors_come_with_exactly_their_message(
    loop: asyncio.AbstractEventLoop, ends: tuple[End, End]
) -> None:
    """Of ours and theirs, large and small, sent in part and waiting."""
    one, other = ends
    with pipes(6) as fds:
        wanted = []
        for number, fd in enumerate(fds):
            one.post(message(number, 800_004 if number % 2 else 5), [os.dup(fd)])
            one.post(message(100 + number))
            wanted += [[inode(fd)], []]
        await until(lambda: len(other.got) == 12, "all have arrived")
        assert other.inodes == wanted
        assert [each.number for each in other.got if isinstance(each, Envelope)] == [
            number for pair in ((n, 100 + n) for n in range(6)) for number in pair
        ]


async def test_from_many_threads(loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
    one, other = ends

    def send(first: int) -> None:
        for number in range(first, first + 50):
            one.post(message(number, 3000 * (number % 50)))

    threads = [threading.Thread(target=send, args=(first,)) for first in (0, 50, 100, 150)]
    for thread in threads:
        thread.start()
    await until(lambda: len(other.got) == 200, "all have arrived")
    for thread in threads:
        thread.join()
    numbers = [each.number for each in other.got if isinstance(each, Envelope)]
    for first in (0, 50, 100, 150):
        assert [number for number in numbers if first <= number < first + 50] == list(range(first, first + 50))
    assert other.got == [message(number, 3000 * (number % 50)) for number in numbers]


class TestTheEnd:
    async def test_what_waits_is_told(self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
        one, _ = ends
        with pipes(1) as fds:
            one.post(message(1, LARGE), [os.dup(fds[0])])
            one.post(message(2), [os.dup(fds[0])])
            one.channel.close()
            assert one.sent == [False, False]
            one.post(message(3), [os.dup(fds[0])])
            assert one.sent == [False, False, False]

    async def test_nobody_reads(self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
        one, other = ends
        other.channel.close()
        with pipes(1) as fds:
            one.post(message(1, LARGE), [os.dup(fds[0])])
            one.post(message(2), [os.dup(fds[0])])
        await until(lambda: len(one.sent) == 2, "both are told")
        assert one.sent == [False, False]
        await until(lambda: one.ends, "the end is told")

    async def test_half_a_message_and_its_descriptors_are_let_go(
        self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]
    ) -> None:
        one, other = ends
        with pipes(1) as fds:
            one.post(message(1, LARGE), [os.dup(fds[0])])
        await until(lambda: not other.channel._assembler.between, "a part has arrived")
        one.channel.close()
        await until(lambda: other.ends, "the end is told")
        assert (other.got, other.ends) == ([], [None])

    async def test_who_hears_that_one_is_sent_may_send_the_next(
        self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]
    ) -> None:
        one, other = ends
        one.channel.post(message(1), [], lambda sent: one.post(message(2)))
        await until(lambda: len(other.got) == 2, "both have arrived")

    async def test_finish_sends_what_waits(self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
        """As a worker does that has no loop any more."""
        one, other = ends
        one.post(message(1, LARGE))
        thread = threading.Thread(target=one.channel.finish, args=(20.0,))
        thread.start()
        await until(lambda: other.got, "it has arrived")
        thread.join()
        assert one.sent == [True]

    async def test_but_not_for_ever(self, loop: asyncio.AbstractEventLoop, ends: tuple[End, End]) -> None:
        one, _ = ends
        one.post(message(1, LARGE))
        one.channel.finish(0.05)
        assert one.sent == []


class TestHostile:
    @pytest.fixture
    def peer(self, loop: asyncio.AbstractEventLoop) -> Iterator[tuple[socket.socket, End]]:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        end = End().open(loop, ours)
        with theirs:
            yield theirs, end
        end.channel.close()

    @pytest.mark.parametrize(
        "frames",
        [
            pytest.param(b"\xff\xff\xff\xff", id="only a length"),
            pytest.param(b"\xff\xff\xff\xff\x01\x00", id="a length that cannot be"),
            pytest.param(b"\x02\x00\x00\x00\x01\x00xx", id="no number"),
            pytest.param(b"\x09\x00\x00\x00\x0f\x00" + b"x" * 9, id="no such kind"),
            pytest.param(b"\x09\x00\x00\x00\x41\x00" + b"x" * 9, id="a piece of nothing"),
            pytest.param(b"\x09\x00\x00\x00\x81\x00" + b"x" * 9 + b"\x01\x00\x00\x00\x41\x01x", id="late descriptors"),
        ],
    )
    async def test_it_costs_the_channel(self, peer: tuple[socket.socket, End], frames: bytes) -> None:
        theirs, end = peer
        theirs.send(b"".join(cut(message(7))) + frames)
        if len(frames) < HEADER_SIZE:
            # It may be the beginning of something: nothing is kept ready for it.
            await until(lambda: end.got, "what came before has arrived")
            theirs.close()
            await until(lambda: end.ends, "the end is told")
        else:
            await until(lambda: end.ends, "the end is told")
            assert isinstance(end.ends[0], ProtocolError)
        assert end.got == [message(7)]

    async def test_a_message_without_end(self, peer: tuple[socket.socket, End]) -> None:
        theirs, end = peer
        piece = b"x" * CHUNK
        frames = itertools.chain(
            [(CHUNK + 8).to_bytes(4, "little") + b"\x81\x00" + b"\0" * 8 + piece],
            itertools.repeat(CHUNK.to_bytes(4, "little") + b"\xc1\x00" + piece),
        )
        theirs.setblocking(False)
        frame = memoryview(next(frames))
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while not end.ends:
                with contextlib.suppress(BlockingIOError):
                    size = theirs.send(frame)
                    sent += size
                    frame = frame[size:] or memoryview(next(frames))
                await turns(1)
        await until(lambda: end.ends, "the end is told")
        assert str(end.ends[0]) == f"a message of more than {MAX_USER_BODY} bytes"
        assert sent < MAX_USER_BODY + (4 << 20)

    async def test_more_descriptors_than_there_are(self, peer: tuple[socket.socket, End]) -> None:
        theirs, end = peer
        theirs.send(b"".join(cut(message(1), 3)))
        await until(lambda: end.got, "it has arrived")
        assert (end.inodes, end.lost) == ([[]], [3])

    async def test_at_our_descriptor_limit_some_are_lost(self, peer: tuple[socket.socket, End]) -> None:
        theirs, end = peer
        with pipes(3) as fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:2]))
            theirs.sendmsg([b"".join(cut(message(1), 2))], [rights])
            with room_for(1):
                end.channel._read()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[2:]))
            theirs.sendmsg([b"".join(cut(message(2), 1))], [rights])
            await until(lambda: len(end.got) == 2, "both have arrived")
            assert end.inodes == [[inode(fds[0])], [inode(fds[2])]]
            assert end.lost == [1, 0]

    async def test_where_none_can_be(self, loop: asyncio.AbstractEventLoop) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ends: list[ProtocolError | None] = []
        channel = MessageChannel(loop, ours, lambda message, descriptors: None, ends.append)
        with theirs:
            theirs.send(encode(Online(1)) + b"".join(cut(message(1))))
            await until(lambda: ends, "the end is told")
        assert isinstance(ends[0], ProtocolError)
        channel.close()


def test_riders_that_nobody_takes_are_closed() -> None:
    """The autouse fixture counts."""
    readers = []
    for _ in range(MAX_DESCRIPTORS):
        reader, writer = os.pipe()
        os.close(writer)
        readers.append(reader)
    riders = Riders(readers)
    assert len(riders) == MAX_DESCRIPTORS
    del riders
