"""The connection channel, both ends over a real socketpair: what is sent, what arrives, what is taken back."""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from clusterserve.channel.connection import MAX_ANSWERS, MAX_BATCH, MasterEnd, WorkerEnd, connection_channel
from clusterserve.core.records import (
    ANSWER_SIZE,
    IPV4,
    NO_ADDRESS,
    OFFER_SIZE,
    VERSION,
    Kind,
    pack_answer,
    pack_offer,
    unpack_answers,
    unpack_offers,
)
from clusterserve.errors import ProtocolError
from tests.helpers.descriptors import room_for
from tests.helpers.waiting import DEADLINE

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Channel:
    """Both sides, and the bare sockets underneath, for what neither side would do."""

    master: MasterEnd
    worker: WorkerEnd
    master_socket: socket.socket
    worker_socket: socket.socket


@pytest.fixture
def channel() -> Iterator[Channel]:
    master, theirs = connection_channel()
    with theirs, theirs.dup() as worker_socket, socket.socket(fileno=os.dup(master.fileno())) as master_socket:
        # In a worker it is a copy too: the master keeps the original.
        worker = WorkerEnd(worker_socket)
        yield Channel(master, worker, master_socket, worker_socket)
        master.close()


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Descriptors that tell themselves apart: reading number N gives the text N."""
    numbers = []
    for number in range(MAX_BATCH):
        reader, writer = os.pipe()
        os.write(writer, str(number).encode())
        os.close(writer)
        numbers.append(reader)
    yield numbers
    for number in numbers:
        os.close(number)


def offers(*ids: int) -> list[bytes]:
    return [pack_offer(id, 1, 0, IPV4, b"\x7f\0\0\1", 4711) for id in ids]


def ids_of(message: bytes) -> list[int]:
    return [record[4] for record in unpack_offers(message)]


def fds(*numbers: int) -> array.array[int]:
    return array.array("i", numbers)


def send(channel: Channel, ids: Sequence[int], numbers: Sequence[int]) -> bool:
    return channel.master.offer(offers(*ids), fds(*numbers))


def receive(channel: Channel) -> tuple[bytes, array.array[int]]:
    message = channel.worker.offers()
    assert message is not None, "no message"
    return message


def inodes(numbers: Sequence[int]) -> list[int]:
    """Which pipes these descriptors are; closes them."""
    found = [os.fstat(number).st_ino for number in numbers]
    for number in numbers:
        os.close(number)
    return found


def fill(channel: Channel, fd: int) -> list[int]:
    """Offer until the channel takes no more; returns the ids that it took."""
    for id in itertools.count(1):
        if not send(channel, [id], [fd]):
            return list(range(1, id))
    raise AssertionError


def raw_send(sock: socket.socket, data: bytes, numbers: Sequence[int] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds(*numbers))] if numbers else []
    sock.sendmsg([data], ancillary)


# ── offers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestOffers:
    def test_an_offer_arrives_with_its_descriptor(self, channel: Channel, files: list[int]) -> None:
        assert channel.master.offer([pack_offer(7, 3, 250, IPV4, b"\x7f\0\0\1", 4711)], fds(files[5]))
        data, (fd,) = receive(channel)
        ((version, family, flags, listener, id, queued, port, local_port, client, local, _),) = unpack_offers(data)
        assert (version, family, flags, listener, id, queued, port, local_port) == (
            VERSION,
            IPV4,
            0,
            3,
            7,
            250,
            4711,
            0,
        )
        assert (client, local) == (b"\x7f\0\0\1" + bytes(12), bytes(16))
        with open(fd, "rb") as file:
            assert file.read() == b"5"

    @pytest.mark.parametrize("count", [1, 2, MAX_BATCH])
    def test_a_batch_keeps_the_order_of_its_descriptors(self, channel: Channel, files: list[int], count: int) -> None:
        # Neither sorted nor the order in which they were opened.
        chosen = [files[number * 11 % MAX_BATCH] for number in range(count)]
        assert send(channel, range(100, 100 + count), chosen)
        data, received = receive(channel)
        assert ids_of(data) == list(range(100, 100 + count))
        assert inodes(received) == [os.fstat(number).st_ino for number in chosen]

    def test_messages_are_not_merged(self, channel: Channel, files: list[int]) -> None:
        sent = [[1], [2, 3], [4, 5, 6]]
        for message in sent:
            assert send(channel, message, files[: len(message)])
        for message in sent:
            data, received = receive(channel)
            assert ids_of(data) == message
            assert inodes(received) == [os.fstat(number).st_ino for number in files[: len(message)]]
        assert channel.worker.offers() is None

    def test_the_master_keeps_its_own(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1], [files[0]])
        _, (fd,) = receive(channel)
        assert fd != files[0]
        assert os.get_inheritable(fd) is False
        os.close(fd)
        assert os.read(files[0], 10) == b"0"

    def test_what_arrives_is_closed_on_exec(self, channel: Channel, files: list[int]) -> None:
        for number in files:
            os.set_inheritable(number, True)
        assert send(channel, range(MAX_BATCH), files)
        _, received = receive(channel)
        assert [fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for number in received] == [1] * MAX_BATCH
        inodes(received)

    def test_nothing_is_not_the_end(self, channel: Channel) -> None:
        assert channel.worker.offers() is None
        assert channel.worker.offers() is None

    def test_both_ends_say_when_there_is_something(self, channel: Channel, files: list[int]) -> None:
        assert channel.master.fileno() != channel.worker.fileno()
        for end in (channel.master, channel.worker):
            assert fcntl.fcntl(end.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestAnswers:
    def test_a_message_of_answers_arrives(self, channel: Channel) -> None:
        kinds = [Kind.ACK, Kind.ACK | Kind.CLOSED, Kind.REFUSED, Kind.RETURNED, Kind.TAKEN]
        assert channel.worker.answer(b"".join(pack_answer(kind, id, held=9) for id, kind in enumerate(kinds)))
        assert [(kind, held, id) for _, kind, _, held, _, id in unpack_answers(channel.master.answers())] == [
            (kind, 9, id) for id, kind in enumerate(kinds)
        ]

    def test_one_message_at_a_time(self, channel: Channel) -> None:
        assert channel.worker.answer(pack_answer(Kind.ACK, 1))
        assert channel.worker.answer(pack_answer(Kind.ACK, 2) + pack_answer(Kind.ACK, 3))
        assert [answer[5] for answer in unpack_answers(channel.master.answers())] == [1]
        assert [answer[5] for answer in unpack_answers(channel.master.answers())] == [2, 3]
        assert channel.master.answers() == b""

    def test_the_most_that_comes_at_once(self, channel: Channel) -> None:
        assert channel.worker.answer(b"".join(pack_answer(Kind.ACK, id) for id in range(MAX_ANSWERS)))
        assert [answer[5] for answer in unpack_answers(channel.master.answers())] == list(range(MAX_ANSWERS))

    def test_none_yet_and_none_ever_again(self, channel: Channel) -> None:
        assert channel.master.answers() == b""
        channel.worker.close()
        assert channel.master.answers() == b""


# ── taking back ─────────────────────────────────────────────────────────────────────────────────────────────────────


class TestRecall:
    def test_nothing_to_take_back(self, channel: Channel) -> None:
        assert channel.master.recall() == []

    def test_everything_that_is_unread(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1, 2], files[:2])
        assert send(channel, [3], files[2:3])
        assert channel.master.recall() == [1, 2, 3]
        assert channel.worker.offers() is None

    def test_only_what_is_unread(self, channel: Channel, files: list[int]) -> None:
        for id in (1, 2, 3):
            assert send(channel, [id], files[:1])
        data, received = receive(channel)
        inodes(received)
        assert ids_of(data) == [1]
        assert channel.master.recall() == [2, 3]
        assert channel.master.recall() == []

    def test_it_can_be_offered_again(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1], files[:1])
        assert channel.master.recall() == [1]
        assert send(channel, [1], files[:1])
        data, (fd,) = receive(channel)
        assert ids_of(data) == [1]
        with open(fd, "rb") as file:
            assert file.read() == b"0"

    def test_answers_are_left_alone(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1], files[:1])
        assert channel.worker.answer(pack_answer(Kind.ACK, 9))
        assert channel.master.recall() == [1]
        assert channel.master.answers() == pack_answer(Kind.ACK, 9)

    def test_from_a_worker_that_is_gone(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1], files[:1])
        channel.worker.close()
        # The master's copy keeps the end open: what was not read is still there, and stays to be had.
        assert send(channel, [2], files[:1])
        assert channel.master.recall() == [1, 2]

    def test_at_the_masters_descriptor_limit(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1, 2, 3], files[:3])
        with room_for(1):
            assert channel.master.recall() == [1, 2, 3]

    def test_with_a_reader_at_work_nothing_is_lost_and_nothing_comes_twice(
        self, channel: Channel, files: list[int]
    ) -> None:
        read: list[int] = []
        done = threading.Event()

        def worker() -> None:
            while True:
                finished = done.is_set()
                message = channel.worker.offers()
                if message is None:
                    if finished:
                        return
                    time.sleep(0)
                    continue
                read.extend(ids_of(message[0]))
                for number in message[1]:
                    os.close(number)

        reader = threading.Thread(target=worker)
        reader.start()
        recalled: list[int] = []
        id = 0
        deadline = time.monotonic() + DEADLINE
        try:
            # Until both have had their share, whichever processor is how busy.
            while id < 3000 or not read or not recalled:
                assert time.monotonic() < deadline, f"only one of them gets anything: {len(read)}, {len(recalled)}"
                for size in (1, 3, 2):
                    if send(channel, range(id, id + size), files[:size]):
                        id += size
                recalled += channel.master.recall()
        finally:
            done.set()
            reader.join()
        assert sorted(read + recalled) == list(range(id))
        assert read == sorted(read)

    def test_with_another_process_at_work_nothing_is_lost_and_nothing_comes_twice(
        self, channel: Channel, files: list[int]
    ) -> None:
        # What it has read it answers for, until it gets an offer with id 0, which nobody takes back.
        code = """if True:
            import os, select, socket, sys
            from clusterserve.channel.connection import WorkerEnd
            from clusterserve.core.records import pack_answer, unpack_offers
            end = WorkerEnd(socket.socket(fileno=int(sys.argv[1])))
            while True:
                select.select([end.fileno()], [], [])
                message = end.offers()
                if message is None:
                    continue
                for fd in message[1]:
                    os.close(fd)
                ids = [record[4] for record in unpack_offers(message[0])]
                while not end.answer(b"".join(pack_answer(1, id) for id in ids)):
                    select.select([], [end.fileno()], [])
                if 0 in ids:
                    break
        """
        number = channel.worker_socket.fileno()
        with subprocess.Popen([sys.executable, "-c", code, str(number)], pass_fds=[number], cwd=ROOT) as process:
            answered: list[int] = []

            def collect() -> None:
                while data := channel.master.answers():
                    answered.extend(answer[5] for answer in unpack_answers(data))

            recalled: list[int] = []
            id = 1
            deadline = time.monotonic() + DEADLINE
            while id < 2000 or not answered or not recalled:
                assert time.monotonic() < deadline, f"only one gets anything: {len(answered)}, {len(recalled)}"
                for size in (1, 2):
                    if send(channel, range(id, id + size), files[:size]):
                        id += size
                collect()
                recalled += channel.master.recall()
            while not send(channel, [0], files[:1]):
                collect()
            while 0 not in answered:
                assert time.monotonic() < deadline
                collect()
            assert process.wait(DEADLINE) == 0
        answered.remove(0)
        assert sorted(answered + recalled) == list(range(1, id))
        assert answered == sorted(answered)


# ── what does not fit ───────────────────────────────────────────────────────────────────────────────────────────────


class TestFull:
    def test_the_offer_is_not_sent(self, channel: Channel, files: list[int]) -> None:
        taken = fill(channel, files[0])
        assert len(taken) >= 8, "the kernel's buffer holds less than a window of offers"
        assert send(channel, [0, 0], files[:2]) is False
        assert channel.master.recall() == taken

    def test_there_is_room_again_when_the_worker_has_read(self, channel: Channel, files: list[int]) -> None:
        taken = fill(channel, files[0])
        for _ in taken:
            _, received = receive(channel)
            inodes(received)
        assert send(channel, [1], files[:1])
        assert channel.master.recall() == [1]

    def test_an_answer_waits_for_the_master(self, channel: Channel) -> None:
        message = b"".join(pack_answer(Kind.ACK, id) for id in range(64))
        sent = 0
        while channel.worker.answer(message):
            sent += 1
        assert sent >= 8
        assert channel.master.answers() == message
        assert channel.worker.answer(message)
        for _ in range(sent):
            assert channel.master.answers() == message
        assert channel.master.answers() == b""

    def test_too_many_descriptors_on_their_way(self) -> None:
        """The kernel counts what a user without privileges has in flight against the limit of its open files."""
        code = """if True:
            import array, os, resource, sys
            from clusterserve.channel.connection import connection_channel
            from clusterserve.core.records import pack_offer
            master, theirs = connection_channel()
            reader, writer = os.pipe()
            resource.setrlimit(resource.RLIMIT_NOFILE, (16, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            if os.getuid() == 0:
                os.setuid(65534)
            batch = array.array("i", [reader] * 4)
            for number in range(100):
                if not master.offer([pack_offer(id, 1, 0, 0, b"", 0) for id in range(4)], batch):
                    break
            else:
                sys.exit("never refused")
            assert number >= 2
            assert len(master.recall()) == 4 * number
            assert master.offer([pack_offer(1, 1, 0, 0, b"", 0)], batch[:1])
            master.close()
        """
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=DEADLINE)


class TestTheDescriptorLimit:
    @pytest.mark.parametrize("room", [0, 1, 3])
    def test_what_was_lost_is_at_the_end(self, channel: Channel, files: list[int], room: int) -> None:
        assert send(channel, [1, 2, 3, 4], files[:4])
        with room_for(room):
            data, received = receive(channel)
        assert ids_of(data) == [1, 2, 3, 4]
        assert inodes(received) == [os.fstat(number).st_ino for number in files[:room]]

    def test_the_next_message_is_whole_again(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1, 2], files[:2])
        assert send(channel, [3, 4], files[2:4])
        with room_for(1):
            _, received = receive(channel)
        assert inodes(received) == [os.fstat(files[0]).st_ino]
        data, received = receive(channel)
        assert ids_of(data) == [3, 4]
        assert inodes(received) == [os.fstat(number).st_ino for number in files[2:4]]


# ── the other side is gone ──────────────────────────────────────────────────────────────────────────────────────────


class TestGone:
    def test_the_master_is_gone(self, channel: Channel, files: list[int]) -> None:
        assert send(channel, [1], files[:1])
        channel.master_socket.close()
        channel.master.close()
        # What it had said counts first.
        data, received = receive(channel)
        assert ids_of(data) == [1]
        inodes(received)
        for _ in range(2):
            data, received = receive(channel)
            assert (data, list(received)) == (b"", [])

    def test_the_master_is_gone_and_had_not_read_everything(self, channel: Channel) -> None:
        assert channel.worker.answer(pack_answer(Kind.ACK, 1))
        channel.master_socket.close()
        channel.master.close()
        # ECONNRESET is the same event as the end.
        assert receive(channel) == (b"", fds())
        assert receive(channel) == (b"", fds())

    def test_answers_to_a_master_that_is_gone_count_as_sent(self, channel: Channel) -> None:
        channel.master_socket.close()
        channel.master.close()
        assert channel.worker.answer(pack_answer(Kind.ACK, 1))

    def test_offers_to_an_end_that_is_closed_count_as_sent(self, files: list[int]) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        master = MasterEnd(own, theirs)
        theirs.close()
        assert master.offer(offers(1), fds(files[0]))
        master.close()

    def test_nothing_comes_from_an_end_that_is_reset(self, files: list[int]) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        master = MasterEnd(own, theirs)
        assert master.offer(offers(1), fds(files[0]))
        theirs.close()
        assert master.answers() == b""
        master.close()

    @pytest.mark.parametrize("unread", [False, True], ids=["the end", "a reset"])
    def test_recall_ends_where_the_masters_own_socket_has_ended(self, files: list[int], unread: bool) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        master = MasterEnd(own, theirs)
        assert master.offer(offers(1, 2), fds(*files[:2]))
        if unread:
            theirs.send(pack_answer(Kind.ACK, 1))
        own.close()
        # Here the kernel tells of a reset before it hands out what had arrived.
        assert master.recall() + master.recall() == [1, 2]
        assert master.recall() == []
        master.close()

    def test_both_sockets_are_closed(self) -> None:
        master, theirs = connection_channel()
        master.close()
        assert theirs.fileno() == -1
        assert master.fileno() == -1

    def test_an_error_that_is_neither_full_nor_gone_is_raised(self, channel: Channel, files: list[int]) -> None:
        closed = os.dup(files[0])
        os.close(closed)
        with pytest.raises(OSError, match="Bad file descriptor"):
            channel.master.offer(offers(1), fds(closed))
        with pytest.raises(OSError, match="Message too long") as caught:
            channel.worker.answer(bytes(1 << 24))
        assert caught.value.errno == errno.EMSGSIZE


# ── what no honest side sends ───────────────────────────────────────────────────────────────────────────────────────


class TestHostile:
    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(b"x", id="a byte"),
            pytest.param(pack_answer(Kind.ACK, 1)[:-1], id="cut"),
            pytest.param(pack_answer(Kind.ACK, 1) + b"\0", id="a byte more"),
            pytest.param(b"\1" + pack_answer(Kind.ACK, 1)[1:], id="another version"),
            pytest.param(bytes(ANSWER_SIZE), id="zeros"),
        ],
    )
    def test_what_is_no_list_of_answers(self, channel: Channel, message: bytes) -> None:
        channel.worker_socket.send(message)
        with pytest.raises(ProtocolError, match="is no list of answers"):
            unpack_answers(channel.master.answers())

    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(b"x", id="a byte"),
            pytest.param(offers(1)[0][:-1], id="cut"),
            pytest.param(offers(1)[0] + b"\0", id="a byte more"),
            pytest.param(b"\1" + offers(1)[0][1:], id="another version"),
        ],
    )
    def test_what_is_no_list_of_offers(self, channel: Channel, files: list[int], message: bytes) -> None:
        raw_send(channel.master_socket, message, files[:1])
        data, received = receive(channel)
        inodes(received)
        with pytest.raises(ProtocolError, match="is no list of offers"):
            unpack_offers(data)

    def test_a_message_longer_than_any_is_cut_and_refused(self, channel: Channel) -> None:
        channel.worker_socket.send(bytes([1]) * (ANSWER_SIZE * MAX_ANSWERS + 5))
        data = channel.master.answers()
        assert len(data) == ANSWER_SIZE * MAX_ANSWERS
        assert channel.master.answers() == b""

    def test_more_offers_than_a_message_may_hold_are_cut(self, channel: Channel, files: list[int]) -> None:
        raw_send(channel.master_socket, b"".join(offers(*range(MAX_BATCH + 3))), [*files, *files[:3]])
        data, received = receive(channel)
        assert len(data) == OFFER_SIZE * MAX_BATCH
        assert inodes(received) == [os.fstat(number).st_ino for number in files]

    def test_an_empty_message_is_no_answer(self, channel: Channel) -> None:
        channel.worker_socket.send(b"")
        channel.worker_socket.send(pack_answer(Kind.ACK, 1))
        assert channel.master.answers() == b""
        assert channel.master.answers() == pack_answer(Kind.ACK, 1)

    def test_descriptors_that_come_with_answers_are_not_taken(self, channel: Channel, files: list[int]) -> None:
        # The fixture finds them if they were.
        raw_send(channel.worker_socket, pack_answer(Kind.ACK, 1), files)
        assert channel.master.answers() == pack_answer(Kind.ACK, 1)

    def test_descriptors_without_an_offer_are_the_callers_to_close(self, channel: Channel, files: list[int]) -> None:
        raw_send(channel.master_socket, offers(1)[0], files[:3])
        data, received = receive(channel)
        assert ids_of(data) == [1]
        assert inodes(received) == [os.fstat(number).st_ino for number in files[:3]]

    def test_an_offer_without_a_descriptor(self, channel: Channel) -> None:
        raw_send(channel.master_socket, pack_offer(1, 1, 0, NO_ADDRESS, b"", 0))
        data, received = receive(channel)
        assert ids_of(data) == [1]
        assert list(received) == []

    def test_ancillary_data_of_another_kind_is_no_descriptor(self, channel: Channel, files: list[int]) -> None:
        channel.worker_socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        assert send(channel, [1], files[:1])
        # Sender and rights in one message.
        data, received = receive(channel)
        assert ids_of(data) == [1]
        assert inodes(received) == [os.fstat(files[0]).st_ino]

    def test_credentials_alone_are_no_descriptor(self, channel: Channel) -> None:
        channel.worker_socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        credentials = struct.pack("iii", os.getpid(), os.getuid(), os.getgid())
        channel.master_socket.sendmsg(offers(1), [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
        data, received = receive(channel)
        assert ids_of(data) == [1]
        assert list(received) == []

    def test_an_empty_message_with_descriptors_is_taken_back_without_a_trace(
        self, channel: Channel, files: list[int]
    ) -> None:
        raw_send(channel.master_socket, b"", files[:2])
        assert channel.master.recall() == []
