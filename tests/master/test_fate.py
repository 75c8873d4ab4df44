"""What the kernel says a dead worker had done, on real connections; and the answer for a request it had begun."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from clusterserve.binds import Bind
from clusterserve.channel.board import UNKNOWN
from clusterserve.master.answers import BAD_GATEWAY, LINGER, answer
from clusterserve.master.fate import Fate, fate_of
from clusterserve.master.listeners import open_listener
from tests.helpers.waiting import DEADLINE, eventually

from .rig import SkewedLoop, connect, no_more_descriptors, readable, reset

REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


@dataclass
class Pair:
    """A client, and the accepted descriptor that the master and its worker share."""

    client: socket.socket
    server: socket.socket

    def send(self, data: bytes) -> None:
        """The client says this, and the kernel has delivered it."""
        self.client.sendall(data)
        # What is unread is not asked here: it is what the code under test does.
        assert select.select([self.server], [], [], DEADLINE)[0]

    def half_close(self) -> None:
        self.client.shutdown(socket.SHUT_WR)
        poll = select.poll()
        poll.register(self.server, select.POLLRDHUP)
        assert poll.poll(DEADLINE * 1000)

    def answer(self, data: bytes) -> None:
        self.server.sendall(data)
        eventually(lambda: readable(self.client), "the client has the answer")

    @property
    def fate(self) -> Fate:
        return fate_of(self.server.fileno(), UNKNOWN)


@contextlib.contextmanager
def pair(bind: str, *, defer: bool, first: bytes) -> Iterator[Pair]:
    listener = open_listener(1, Bind.parse(bind), 16, pinned=True)
    listener.defer(defer)
    try:
        with connect(listener) as client:
            if first:
                client.sendall(first)
            assert select.select([listener.sock], [], [], DEADLINE)[0]
            server = listener.sock.accept()[0]
            with server:
                server.settimeout(DEADLINE)
                yield Pair(client, server)
    finally:
        listener.close()


@pytest.fixture(params=["127.0.0.1:0", "[::1]:0"])
def silent(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connection whose client has said nothing yet."""
    with pair(request.param, defer=False, first=b"") as made:
        yield made


@pytest.fixture(params=[False, True], ids=["plain", "deferred"])
def asked(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A connection whose client has sent a request, of which nothing is read."""
    with pair("127.0.0.1:0", defer=request.param, first=REQUEST) as made:
        assert select.select([made.server], [], [], DEADLINE)[0]
        yield made


# ── nothing read ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_was_said(silent: Pair) -> None:
    assert silent.fate is Fate.UNTOUCHED


def test_nothing_was_read(asked: Pair) -> None:
    assert asked.fate is Fate.UNTOUCHED


def test_nothing_was_read_though_more_came(asked: Pair) -> None:
    asked.send(REQUEST * 100)
    assert asked.fate is Fate.UNTOUCHED


def test_looking_is_not_reading(asked: Pair) -> None:
    assert asked.server.recv(10, socket.MSG_PEEK)
    assert asked.fate is Fate.UNTOUCHED


def test_a_client_that_half_closed_in_silence(silent: Pair) -> None:
    silent.half_close()
    assert silent.fate is Fate.UNTOUCHED


def test_a_client_that_half_closed_behind_its_request(asked: Pair) -> None:
    asked.half_close()
    assert asked.fate is Fate.UNTOUCHED


def test_asking_changes_nothing(asked: Pair) -> None:
    flags = asked.server.gettimeout(), os.get_inheritable(asked.server.fileno())
    assert asked.fate is asked.fate is Fate.UNTOUCHED
    assert asked.server.recv(65536) == REQUEST
    assert (asked.server.gettimeout(), os.get_inheritable(asked.server.fileno())) == flags


# ── something read ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, len(REQUEST) - 1, len(REQUEST)])
def test_something_was_read(asked: Pair, size: int) -> None:
    asked.server.recv(size)
    assert asked.fate is Fate.READ


def test_all_was_read_and_more_came(asked: Pair) -> None:
    asked.server.recv(65536)
    asked.send(REQUEST * 100)
    assert asked.fate is Fate.READ


def test_all_was_read_and_the_client_half_closed(asked: Pair) -> None:
    asked.server.recv(65536)
    asked.half_close()
    assert asked.fate is Fate.READ
    assert asked.server.recv(1) == b""
    assert asked.fate is Fate.READ


def test_the_client_half_closed_and_some_was_read(asked: Pair) -> None:
    asked.half_close()
    asked.server.recv(1)
    assert asked.fate is Fate.READ


def test_much_was_read(silent: Pair) -> None:
    # More than any buffer holds: the sums are not about what lies in them.
    sent = 3_000_000
    sender = threading.Thread(target=silent.client.sendall, args=(bytes(sent),))
    sender.start()
    got = 0
    while got < sent:
        got += len(silent.server.recv(65536))
        assert silent.fate is Fate.READ
    sender.join()
    silent.send(b"x")
    assert silent.fate is Fate.READ


def test_bytes_that_arrive_while_it_asks_are_not_taken_for_read() -> None:
    with pair("127.0.0.1:0", defer=False, first=b"x") as made:
        made.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        done = threading.Event()

        def send() -> None:
            for _ in range(20_000):
                made.client.send(b"x")
            done.set()

        sender = threading.Thread(target=send)
        sender.start()
        fates = set()
        while not done.is_set():
            fates.add(made.fate)
        sender.join()
        assert fates == {Fate.UNTOUCHED}


# ── answered ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_response_was_begun(asked: Pair) -> None:
    asked.server.recv(65536)
    asked.answer(b"H")
    assert asked.fate is Fate.BEGUN


def test_a_response_was_begun_and_read(asked: Pair) -> None:
    asked.server.recv(65536)
    asked.answer(b"HTTP/1.1 200 OK\r\n\r\n")
    asked.client.recv(65536)
    assert asked.fate is Fate.BEGUN


def test_a_response_of_which_nothing_has_arrived(asked: Pair) -> None:
    asked.server.recv(65536)
    # The client's window is full: there are bytes of which the kernel has had no word back.
    asked.server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while asked.server.send(bytes(1 << 20)):
            pass
    assert asked.fate is Fate.BEGUN


def test_a_response_before_anything_was_read(asked: Pair) -> None:
    # Whoever gets it next would say it again.
    asked.answer(b"220 ready\r\n")
    assert asked.fate is Fate.BEGUN


def test_a_greeting_to_a_silent_client(silent: Pair) -> None:
    silent.answer(b"220 ready\r\n")
    assert silent.fate is Fate.BEGUN


def test_the_end_was_said(asked: Pair) -> None:
    asked.server.recv(65536)
    asked.server.shutdown(socket.SHUT_WR)
    eventually(lambda: readable(asked.client), "the client sees the end")
    assert asked.fate is Fate.BEGUN


# ── odd ends ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_was_reset(asked: Pair) -> None:
    reset(asked.client)
    poll = select.poll()
    poll.register(asked.server, 0)
    assert poll.poll(DEADLINE * 1000)
    # Nobody is there to be answered: whoever takes it finds that out.
    assert asked.fate in (Fate.UNTOUCHED, Fate.READ)


def test_the_kernel_cannot_tell_of_unix_sockets() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(REQUEST)
        assert fate_of(left.fileno(), UNKNOWN) is Fate.BEGUN


def test_the_kernel_cannot_tell_of_datagrams() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as odd:
        assert fate_of(odd.fileno(), UNKNOWN) is Fate.BEGUN


def test_it_needs_no_descriptor(asked: Pair) -> None:
    with no_more_descriptors():
        assert asked.fate is Fate.UNTOUCHED


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────────────


def say(loop: SkewedLoop, made: Pair) -> set[Callable[[], None]]:
    """Answer 502 as the master does: on a descriptor of its own, which is closed in the end."""
    lingering: set[Callable[[], None]] = set()
    made.server.setblocking(False)
    answer(loop, made.server.detach(), BAD_GATEWAY, lingering)
    return lingering


def received(client: socket.socket) -> bytes:
    """Everything until the server's end."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def test_the_answer_is_a_whole_response() -> None:
    head, _, body = BAD_GATEWAY.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 502 Bad Gateway"
    assert f"content-length: {len(body)}" in lines
    assert "connection: close" in lines


def test_the_answer_and_the_end_of_it(loop: SkewedLoop, asked: Pair) -> None:
    asked.server.recv(65536)
    lingering = say(loop, asked)
    assert received(asked.client) == BAD_GATEWAY
    assert lingering
    asked.client.close()
    loop.until(lambda: not lingering, "it is over when the client has closed")


def test_a_client_that_is_still_uploading_is_not_reset(loop: SkewedLoop, asked: Pair) -> None:
    asked.server.recv(65536)
    lingering = say(loop, asked)
    faults: list[BaseException] = []
    answers: list[bytes] = []

    def upload() -> None:
        try:
            # More than the buffers hold: it cannot end before the server has taken it.
            asked.client.sendall(bytes(20_000_000))
            asked.client.shutdown(socket.SHUT_WR)
            answers.append(received(asked.client))
        except OSError as exc:
            faults.append(exc)

    uploading = threading.Thread(target=upload)
    uploading.start()
    loop.until(lambda: not lingering, "the whole upload was discarded")
    uploading.join(DEADLINE)
    assert faults == []
    assert answers == [BAD_GATEWAY]


def test_it_waits_two_seconds_and_no_longer(loop: SkewedLoop, asked: Pair) -> None:
    loop.freeze()
    asked.server.recv(65536)
    lingering = say(loop, asked)
    asked.client.sendall(b"more")
    loop.forward(LINGER - 0.5)
    loop.turn()
    assert lingering
    loop.forward(0.5)
    loop.until(lambda: not lingering, "it has waited long enough")
    assert LINGER == 2.0
    assert received(asked.client) == BAD_GATEWAY


def test_a_client_that_resets_meanwhile(loop: SkewedLoop, asked: Pair) -> None:
    asked.server.recv(65536)
    lingering = say(loop, asked)
    reset(asked.client)
    loop.until(lambda: not lingering, "it is over")


def test_a_client_that_is_gone_already(loop: SkewedLoop, asked: Pair) -> None:
    asked.server.recv(65536)
    reset(asked.client)
    poll = select.poll()
    poll.register(asked.server, 0)
    assert poll.poll(DEADLINE * 1000)
    assert not say(loop, asked)


def test_it_can_be_cut_short(loop: SkewedLoop, asked: Pair) -> None:
    asked.server.recv(65536)
    lingering = say(loop, asked)
    for end in tuple(lingering):
        end()
    assert not lingering
    assert received(asked.client) == BAD_GATEWAY
    # Neither its reader nor its timer is left.
    loop.forward(LINGER)
    loop.turn()
