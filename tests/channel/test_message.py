"""The message channel over real socketpairs, on both loops: what arrives, what waits, and how it ends."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from clusterserve.channel.descriptors import MAX_DESCRIPTORS
from clusterserve.channel.message import RETRY, MessageChannel
from clusterserve.core.messages import (
    HEADER_SIZE,
    MAX_BODY,
    Boot,
    Closed,
    Decoder,
    Drain,
    Failed,
    Listening,
    Message,
    Online,
    decode,
    encode,
)
from clusterserve.errors import ProtocolError
from tests.helpers.descriptors import is_open, room_for
from tests.helpers.loops import turns, until

LARGE = Failed("large", "x" * 700_000)


@dataclass
class End:
    """One end, and what it was told."""

    channel: MessageChannel = field(init=False)
    messages: list[Message] = field(default_factory=list)
    descriptors: list[list[int]] = field(default_factory=list)
    ends: list[ProtocolError | None] = field(default_factory=list)

    def open(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> End:
        self.channel = MessageChannel(loop, sock, self.on_message, self.on_closed)
        return self

    def on_message(self, message: Message, descriptors: list[int]) -> None:
        self.messages.append(message)
        self.descriptors.append(descriptors)

    def on_closed(self, error: ProtocolError | None) -> None:
        self.ends.append(error)

    async def got(self, count: int) -> None:
        await until(lambda: len(self.messages) >= count, f"{count} messages have arrived")
        assert len(self.messages) == count

    async def ended(self) -> ProtocolError | None:
        await until(lambda: self.ends, "the end is reported")
        return self.ends[0]


@dataclass
class Peer:
    """The other side by hand: a bare socket."""

    sock: socket.socket
    decoder: Decoder = field(default_factory=Decoder)
    descriptors: list[int] = field(default_factory=list)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        assert self.sock.sendmsg([data], [rights] if descriptors else []) == len(data)

    def read(self, size: int = 65536) -> bytes:
        data, ancillary, _, _ = self.sock.recvmsg(size, socket.CMSG_SPACE(64))
        for _, _, content in ancillary:
            numbers = array.array("i")
            numbers.frombytes(content)
            self.descriptors.extend(numbers)
        return data

    async def receive(self, count: int, size: int = 65536) -> list[tuple[Message, list[int]]]:
        """The next messages with their descriptors, read in pieces of at most `size` bytes, a turn for each."""
        got: list[tuple[Message, list[int]]] = []
        while len(got) < count:
            await asyncio.sleep(0)
            try:
                data = self.read(size)
            except BlockingIOError:
                continue
            assert data, "the channel was closed"
            for body, number in self.decoder.feed(data):
                got.append((decode(body), [self.descriptors.pop(0) for _ in range(number)]))
        assert len(got) == count
        return got


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture
def end(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, socket.socket]) -> Iterator[End]:
    end = End().open(loop, pair[0])
    yield end
    end.channel.close()
    for number in itertools.chain(*end.descriptors):
        os.close(number)


@pytest.fixture
def peer(pair: tuple[socket.socket, socket.socket]) -> Iterator[Peer]:
    peer = Peer(pair[1])
    yield peer
    for number in peer.descriptors:
        os.close(number)


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """The reading ends of pipes whose writing ends are closed: descriptors that are all different."""
    readers = []
    for _ in range(MAX_DESCRIPTORS):
        reader, writer = os.pipe()
        os.close(writer)
        readers.append(reader)
    yield readers
    for reader in readers:
        if is_open(reader):
            os.close(reader)


def inode(number: int) -> int:
    return os.fstat(number).st_ino


def closing_inodes(numbers: Sequence[int]) -> list[int]:
    found = [inode(number) for number in numbers]
    for number in numbers:
        os.close(number)
    return found


def flood(end: End) -> int:
    """Send until something must wait; returns how many messages that took."""
    for count in itertools.count(1):
        assert end.channel.send(LARGE)
        if end.channel._waiting:
            return count
    raise AssertionError


# ── messages in ─────────────────────────────────────────────────────────────────────────────────────────────────────


class TestArriving:
    async def test_whole(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        peer.send(encode(Online(4711)))
        await end.got(1)
        assert end.messages == [Online(4711)]
        assert end.descriptors == [[]]
        assert end.ends == []

    async def test_byte_by_byte(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        for byte in encode(Online(1)) + encode(Listening(2)):
            peer.send(bytes([byte]))
            await turns(2)
        await end.got(2)
        assert end.messages == [Online(1), Listening(2)]

    async def test_merged(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        sent = [Online(1), Listening(2), Closed(3), Drain(4.5, True, False)]
        frames = b"".join(map(encode, sent))
        # Three and a half at once, then the rest.
        peer.send(frames[:-7])
        await end.got(3)
        peer.send(frames[-7:])
        await end.got(4)
        assert end.messages == sent

    async def test_larger_than_one_read(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        frame = encode(LARGE)
        for start in range(0, len(frame), 50_000):
            peer.send(frame[start : start + 50_000])
            await until(lambda: not _unread(end), "it has been read")
        await end.got(1)
        assert end.messages == [LARGE]

    async def test_a_sender_that_goes_on_does_not_hold_the_loop(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Small reads instead of a sender that is faster than we are.
        monkeypatch.setattr("clusterserve.channel.message._CHUNK", 16)
        sent = [Online(number) for number in range(1000)]
        peer.send(b"".join(map(encode, sent)))
        end.channel._read()
        assert 0 < len(end.messages) < 200
        await end.got(1000)
        assert end.messages == sent

    async def test_the_next_is_delivered_when_the_last_has_been_handled(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        peer.send(encode(Online(1)) + encode(Online(2)) + encode(Online(3)))
        handle = end.channel._on_message

        def closing(message: Message, descriptors: list[int]) -> None:
            handle(message, descriptors)
            if message == Online(2):
                end.channel.close()

        end.channel._on_message = closing
        await until(lambda: not end.channel.is_open, "it is closed")
        await turns(3)
        assert end.messages == [Online(1), Online(2)]
        assert end.ends == []


class TestDescriptorsArriving:
    async def test_they_ride_with_their_message(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1)))
        peer.send(encode(Online(2), 2), pipes[:2])
        peer.send(encode(Online(3)))
        peer.send(encode(Online(4), 1), pipes[2:3])
        await end.got(4)
        got = [[inode(number) for number in numbers] for numbers in end.descriptors]
        assert got == [[], [inode(pipes[0]), inode(pipes[1])], [], [inode(pipes[2])]]

    async def test_they_wait_for_the_rest_of_their_message(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        frame = encode(Online(1), 2)
        peer.send(frame[:1], pipes[:2])
        for byte in frame[1:]:
            assert end.messages == []
            peer.send(bytes([byte]))
            await turns(2)
        await end.got(1)
        assert [inode(number) for number in end.descriptors[0]] == [inode(pipes[0]), inode(pipes[1])]

    async def test_they_are_closed_on_exec(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        for pipe in pipes:
            os.set_inheritable(pipe, True)
        peer.send(encode(Online(1), MAX_DESCRIPTORS), pipes)
        await end.got(1)
        assert [os.get_inheritable(number) for number in end.descriptors[0]] == [False] * MAX_DESCRIPTORS

    async def test_at_the_descriptor_limit_there_are_fewer(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1), 2), pipes[:2])
        peer.send(encode(Online(2), 2), pipes[2:4])
        with room_for(1):
            end.channel._read()
        peer.send(encode(Online(3), 2), pipes[4:6])
        await end.got(3)
        got = [[inode(number) for number in numbers] for numbers in end.descriptors]
        assert got == [[inode(pipes[0])], [], [inode(pipes[4]), inode(pipes[5])]]

    @pytest.mark.parametrize("room", [0, 1])
    async def test_what_one_message_has_lost_the_next_does_not_pay_for(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int], room: int
    ) -> None:
        """The first is still incomplete when its descriptors are cut, and the second one's come with its end."""
        frame = encode(Online(1), 2)
        peer.send(frame[:3], pipes[:2])
        with room_for(room):
            end.channel._read()
        peer.send(frame[3:])
        peer.send(encode(Online(2), 1), pipes[2:3])
        await end.got(2)
        got = [[inode(number) for number in numbers] for numbers in end.descriptors]
        assert got == [[inode(pipe) for pipe in pipes[:room]], [inode(pipes[2])]]

    async def test_the_rest_of_a_message_that_lost_descriptors_may_never_come(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1), 2)[:3], pipes[:2])
        with room_for(1):
            end.channel._read()
        peer.sock.close()
        assert await end.ended() is None

    async def test_what_has_no_message_yet_is_let_go_at_the_end(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1), 3)[:-1], pipes[:3])
        await until(lambda: not _unread(end), "it has been read")
        peer.sock.close()
        assert await end.ended() is None
        assert end.messages == []

    async def test_what_is_behind_a_close_is_let_go(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1)) + encode(Online(2), 1), pipes[:1])
        end.channel._on_message = lambda message, descriptors: end.channel.close()
        await until(lambda: not end.channel.is_open, "it is closed")

    async def test_ancillary_data_of_another_kind_is_no_descriptor(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        end.channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        peer.send(encode(Online(1), 1), pipes[:1])
        await end.got(1)
        assert [inode(number) for number in end.descriptors[0]] == [inode(pipes[0])]


# ── messages out ────────────────────────────────────────────────────────────────────────────────────────────────────


class TestSending:
    async def test_it_is_sent_at_once(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        assert end.channel.send(Boot(1, 0, {"app": "a:b"}, []))
        # No turn of the loop between.
        assert peer.read() == encode(Boot(1, 0, {"app": "a:b"}, []))

    async def test_between_two_ends(
        self, loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, socket.socket], end: End, pipes: list[int]
    ) -> None:
        other = End().open(loop, pair[1])
        for number in range(20):
            assert end.channel.send(Online(number), pipes[: number % 3])
            assert other.channel.send(Listening(number))
        await other.got(20)
        await end.got(20)
        assert other.messages == [Online(number) for number in range(20)]
        assert end.messages == [Listening(number) for number in range(20)]
        for number, descriptors in enumerate(other.descriptors):
            assert closing_inodes(descriptors) == [inode(pipe) for pipe in pipes[: number % 3]]
        other.channel.close()

    async def test_the_caller_keeps_its_descriptors(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        assert end.channel.send(Online(1), pipes)
        ((message, numbers),) = await peer.receive(1)
        assert message == Online(1)
        assert closing_inodes(numbers) == [inode(pipe) for pipe in pipes]

    async def test_a_message_over_the_limit_is_the_senders_mistake(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        with pytest.raises(ProtocolError, match="over the limit"):
            end.channel.send(Failed("", "x" * MAX_BODY))
        assert end.channel.send(Online(1))
        assert await peer.receive(1) == [(Online(1), [])]


class TestBackPressure:
    @pytest.mark.parametrize("size", [1 << 20, 65536, 4099])
    async def test_what_does_not_fit_follows(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, size: int
    ) -> None:
        count = flood(end)
        assert end.channel.send(Online(1))
        got = await peer.receive(count + 1, size)
        assert got == [(LARGE, [])] * count + [(Online(1), [])]
        assert not end.channel._waiting

    async def test_descriptors_ride_with_exactly_their_message(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        """Large messages with descriptors, of which some are sent in part and some have to wait."""
        for number in range(8):
            assert end.channel.send(LARGE, pipes[number : number + 1])
            assert end.channel.send(Online(number))
        assert end.channel._waiting
        got = await peer.receive(16, 50_000)
        assert [message for message, _ in got] == [m for number in range(8) for m in (LARGE, Online(number))]
        # Not twice, though most frames took many writes.
        assert [closing_inodes(numbers) for _, numbers in got] == [
            inodes for number in range(8) for inodes in ([inode(pipes[number])], [])
        ]
        assert peer.descriptors == []

    async def test_what_waits_is_a_copy(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        count = flood(end)
        assert end.channel.send(Online(1), pipes[:2])
        wanted = [inode(pipe) for pipe in pipes[:2]]
        os.close(pipes[0])
        os.close(pipes[1])
        *_, (message, numbers) = await peer.receive(count + 1)
        assert message == Online(1)
        assert closing_inodes(numbers) == wanted

    async def test_nothing_at_all_fits(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        filled = _fill(end.channel._sock)
        assert end.channel.send(Online(1), pipes[:1])
        while filled:
            filled -= len(peer.read(filled))
        ((message, numbers),) = await peer.receive(1)
        assert message == Online(1)
        assert closing_inodes(numbers) == [inode(pipes[0])]

    async def test_the_loop_may_be_wrong_about_the_room(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        count = flood(end)
        end.channel._flush()
        assert await peer.receive(count) == [(LARGE, [])] * count

    async def test_close_drops_what_waits(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        flood(end)
        assert end.channel.send(Online(1), pipes[:2])
        end.channel.close()
        await turns(3)
        assert end.ends == []

    async def test_the_loop_is_not_bothered_when_nothing_waits(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        flush, flushed = end.channel._flush, []

        def counting() -> None:
            flushed.append(len(end.channel._waiting))
            flush()

        end.channel._flush = counting
        await peer.receive(flood(end))
        count = len(flushed)
        assert count
        await turns(5)
        assert len(flushed) == count

    async def test_the_other_side_goes_while_something_waits(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        flood(end)
        assert end.channel.send(Online(1), pipes[:2])
        peer.send(encode(Online(2)))
        peer.sock.close()
        assert await end.ended() is None
        assert end.messages == [Online(2)]
        assert not end.channel.send(Online(3))


class ScarceSocket(socket.socket):
    """A socket whose next writes fail as `failures` says."""

    failures: list[int]
    tries = 0

    def sendmsg(self, *args: object) -> int:  # type: ignore[override]
        self.tries += 1
        if self.failures:
            number = self.failures.pop(0)
            raise OSError(number, os.strerror(number))
        return super().sendmsg(*args)  # type: ignore[arg-type]


class TestScarcity:
    """The kernel says no for another reason than a full buffer."""

    @pytest.fixture
    def sock(self, pair: tuple[socket.socket, socket.socket]) -> Iterator[ScarceSocket]:
        with ScarceSocket(fileno=os.dup(pair[0].fileno())) as sock:
            sock.failures = []
            yield sock

    @pytest.fixture
    def end(self, loop: asyncio.AbstractEventLoop, sock: ScarceSocket) -> Iterator[End]:
        end = End().open(loop, sock)
        yield end
        end.channel.close()

    @pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
    async def test_it_waits_and_does_not_spin(
        self, end: End, peer: Peer, sock: ScarceSocket, pipes: list[int], number: int
    ) -> None:
        sock.failures += [number] * 3
        assert end.channel.send(Online(1), pipes[:1])
        assert end.channel.send(Online(2))
        got = await peer.receive(2)
        assert [message for message, _ in got] == [Online(1), Online(2)]
        assert closing_inodes(got[0][1]) == [inode(pipes[0])]
        # The socket was writable all the time; three were in vain.
        assert sock.tries == 5

    async def test_close_gives_up(self, end: End, sock: ScarceSocket, pipes: list[int]) -> None:
        sock.failures += [errno.ENOBUFS]
        assert end.channel.send(Online(1), pipes[:1])
        end.channel.close()
        await asyncio.sleep(2 * RETRY)
        assert sock.tries == 1

    async def test_any_other_failure_is_the_senders(self, end: End, sock: ScarceSocket) -> None:
        sock.failures += [errno.EBADF]
        with pytest.raises(OSError, match="Bad file descriptor"):
            end.channel.send(Online(1))

    async def test_no_copy_can_be_kept(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        """Its receiver finds none, and the next message's are the next message's."""
        count = flood(end)
        with room_for(1):
            assert end.channel.send(Online(1), pipes[:2])
        assert end.channel.send(Online(2), pipes[2:3])
        got = await peer.receive(count + 2)
        assert got[-2] == (Online(1), [])
        assert got[-1][0] == Online(2)
        assert closing_inodes(got[-1][1]) == [inode(pipes[2])]

    async def test_no_copy_of_what_is_no_descriptor(self, end: End, peer: Peer) -> None:
        flood(end)
        with pytest.raises(OSError, match="Bad file descriptor"):
            end.channel.send(Online(1), [-1])


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestTheEnd:
    @pytest.mark.parametrize("unread", [False, True], ids=["the end", "a reset"])
    async def test_it_is_told_once_after_everything_that_had_arrived(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, unread: bool
    ) -> None:
        # More than one read takes.
        sent = [Failed("", "x" * 1000)] * 100
        peer.send(b"".join(map(encode, sent)))
        if unread:
            # A socket that is closed with something unread in it resets its peer: ECONNRESET instead of the end.
            assert end.channel.send(Online(1))
        peer.sock.close()
        assert await end.ended() is None
        assert end.messages == sent
        assert not end.channel.is_open
        await turns(3)
        assert end.ends == [None]

    async def test_half_a_message_is_none(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        peer.send(encode(Online(1)) + encode(Online(2))[:-1])
        peer.sock.close()
        assert await end.ended() is None
        assert end.messages == [Online(1)]

    async def test_the_writer_leaves_it_to_the_reader_to_find_out(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        peer.send(encode(Online(1)))
        peer.sock.close()
        # EPIPE, but what the other side said last is still to be read.
        assert end.channel.send(Online(2))
        assert end.ends == []
        assert await end.ended() is None
        assert end.messages == [Online(1)]

    async def test_nothing_can_be_sent_afterwards(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.sock.close()
        await end.ended()
        assert not end.channel.send(Online(1), pipes)

    async def test_close(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        peer.send(encode(Online(1)))
        end.channel.close()
        end.channel.close()
        assert not end.channel.is_open
        assert not end.channel.send(Online(2))
        await turns(3)
        # Nobody is told, and nothing is delivered.
        assert end.messages == []
        assert end.ends == []
        with pytest.raises(ConnectionResetError):
            peer.read()
        assert peer.read() == b""

    async def test_it_can_be_closed_by_the_one_who_hears_of_the_end(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        told = end.channel._on_closed

        def closing(error: ProtocolError | None) -> None:
            told(error)
            end.channel.close()

        end.channel._on_closed = closing
        peer.sock.close()
        await end.ended()
        assert end.ends == [None]


class TestDrain:
    async def test_everything_that_has_arrived_is_delivered_at_once(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        sent = [Failed("", "x" * 1000)] * 100
        peer.send(b"".join(map(encode, sent)))
        end.channel.drain()
        assert end.messages == sent
        assert end.channel.is_open
        assert end.ends == []

    @pytest.mark.parametrize("unread", [False, True], ids=["the end", "a reset"])
    async def test_the_end_too(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int], unread: bool
    ) -> None:
        peer.send(encode(Online(1), 1), pipes[:1])
        if unread:
            assert end.channel.send(Online(1))
        peer.sock.close()
        end.channel.drain()
        assert end.messages == [Online(1)]
        assert end.ends == [None]
        end.channel.drain()
        assert end.ends == [None]

    async def test_not_beyond_a_close(self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer) -> None:
        peer.send(encode(Online(1)) + encode(Online(2)))
        end.channel._on_message = lambda message, descriptors: end.channel.close()
        end.channel.drain()
        assert not end.channel.is_open
        end.channel.drain()
        assert end.ends == []


# ── what no honest side sends ───────────────────────────────────────────────────────────────────────────────────────


class TestHostile:
    @pytest.mark.parametrize(
        "frame",
        [
            pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="not ours"),
            pytest.param(struct.pack("<IBB", MAX_BODY + 1, 0, 0), id="too long"),
            pytest.param(struct.pack("<IBB", 2, 1, 0) + b"[]", id="another kind"),
            pytest.param(struct.pack("<IBB", 2, 0, 0) + b"[]", id="no message"),
            pytest.param(struct.pack("<IBB", 0, 0, 0), id="empty"),
            pytest.param(struct.pack("<IBB", 3, 0, 0) + b"\xff\xff\xff", id="not JSON"),
            pytest.param(encode(Online(1)).replace(b"Online", b"Offline"[:6]), id="unknown"),
            pytest.param(encode(Online(1)).replace(b",1]", b',"]'), id="cut JSON"),
        ],
    )
    async def test_it_ends_the_channel_once_with_the_error(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, frame: bytes
    ) -> None:
        peer.send(encode(Online(7)) + frame + encode(Online(8)) + frame)
        assert isinstance(await end.ended(), ProtocolError)
        # What came before it counts, what comes behind it does not.
        assert end.messages == [Online(7)]
        assert not end.channel.is_open
        peer.sock.close()
        await turns(3)
        assert len(end.ends) == 1

    async def test_a_message_that_its_receiver_does_not_expect(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        def refuse(message: Message, descriptors: list[int]) -> None:
            raise ProtocolError("not that")

        end.channel._on_message = refuse
        peer.send(encode(Online(1)))
        assert str(await end.ended()) == "not that"
        assert not end.channel.is_open

    async def test_refused_by_a_receiver_that_has_closed(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer
    ) -> None:
        def refuse(message: Message, descriptors: list[int]) -> None:
            end.channel.close()
            raise ProtocolError("not that")

        end.channel._on_message = refuse
        peer.send(encode(Online(1)))
        await until(lambda: not end.channel.is_open, "it is closed")
        # Nobody is told after a close.
        assert end.ends == []

    @pytest.mark.parametrize(
        "body", [b"[]", b"{", encode(Online(1))[HEADER_SIZE:].replace(b"1", b"[]")], ids=["empty", "cut", "wrong"]
    )
    async def test_descriptors_of_a_message_that_is_none_are_closed(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int], body: bytes
    ) -> None:
        # The fixture finds them if they are not.
        peer.send(struct.pack("<IBB", len(body), 0, 3) + body, pipes[:3])
        assert isinstance(await end.ended(), ProtocolError)

    async def test_descriptors_that_no_message_announces_do_not_pile_up(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        for number in range(3):
            peer.send(encode(Online(number)), pipes)
        error = await end.ended()
        assert "descriptors" in str(error)

    async def test_more_descriptors_than_may_ride_are_cut(
        self, loop: asyncio.AbstractEventLoop, end: End, peer: Peer, pipes: list[int]
    ) -> None:
        peer.send(encode(Online(1), MAX_DESCRIPTORS + 4), [*pipes, *pipes[:4]])
        await end.got(1)
        assert [inode(number) for number in end.descriptors[0]] == [inode(pipe) for pipe in pipes]


def _unread(end: End) -> bool:
    try:
        return bool(end.channel._sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _fill(sock: socket.socket) -> int:
    """Fill the kernel's buffer to the last byte; returns how many there are."""
    size = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            size += sock.send(bytes(65536))
    with contextlib.suppress(BlockingIOError):
        while True:
            size += sock.send(b"x")
    return size
