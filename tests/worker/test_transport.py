"""The transport of a handed-over connection: its lazy life, every moment that makes it real, and both ends of it.

What the receiver tells the master is checked by the `master` fixture for every test: ended exactly once on every path.
"""

from __future__ import annotations

import array
import asyncio
import gc
import hashlib
import os
import select
import socket
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
from uvicorn.protocols.utils import get_remote_addr

from clusterserve.core.records import PROXIED, Kind
from clusterserve.worker.transport import HIGH_WATER
from tests.helpers import proc
from tests.helpers.apps.full import pattern
from tests.helpers.descriptors import room_for
from tests.helpers.loops import turns, until
from tests.worker.harness import Master, Recorder, Recorders, phase, reaches, was_real

Loop = asyncio.AbstractEventLoop
Complaints = list[dict[str, Any]]


def respond_and_close(data: bytes) -> Callable[..., None]:
    def respond(protocol: Recorder, _: bytes) -> None:
        protocol.transport.write(data)
        protocol.transport.close()

    return respond


class Calls:
    """The system calls that this process makes by way of `os`, while it looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("read", "write", "writev"):
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            self.names.append(name)
            return call(*arguments)

        return counting


# ── over within one turn ────────────────────────────────────────────────────────────────────────────────────────────


class TestLazy:
    @pytest.mark.parametrize("family", ["tcp", "tcp6", "unix", "socketpair"])
    async def test_one_read_one_write_and_it_is_over(
        self, loop: Loop, master: Master, recorders: Recorders, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        master.serve(recorders.on(data=respond_and_close(b"answer")))
        handed = master.connection(family)
        handed.arrive(b"question")
        calls = Calls(monkeypatch)
        master.offer(handed)
        await handed.ends()
        assert calls.names == ["read", "write"]
        assert await handed.rest() == b"answer"
        protocol = recorders.only
        assert protocol.calls == ["made", "data", "lost"]
        assert protocol.phases == ["LAZY", "LAZY", "CLOSED"]
        assert protocol.data == b"question"
        assert protocol.lost == [None]
        assert not was_real(protocol.transport)
        # The whole life in one answer.
        assert [(answer.id, answer.kind) for answer in master.messages[0]] == [(1, Kind.ACK | Kind.CLOSED)]

    async def test_head_and_body_go_in_one_write(
        self, loop: Loop, master: Master, recorders: Recorders, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def respond(protocol: Recorder, _: bytes) -> None:
            protocol.transport.write(b"head ")
            protocol.transport.write(b"")
            protocol.transport.write(b"body ")
            protocol.transport.writelines([b"and ", b"lines"])
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        calls = Calls(monkeypatch)
        handed = master.hand(b"question")
        await handed.ends()
        assert calls.names == ["read", "write"]
        assert await handed.rest() == b"head body and lines"

    async def test_a_task_that_ends_in_its_first_step_is_in_time(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        async def application(protocol: Recorder) -> None:
            protocol.transport.write(b"answer")
            protocol.transport.close()

        tasks = []
        master.serve(recorders.on(data=lambda protocol, _: tasks.append(loop.create_task(application(protocol)))))
        handed = master.hand(b"question")
        assert await handed.rest() == b"answer"
        assert not was_real(recorders.only.transport)
        assert handed.answers == [Kind.ACK | Kind.CLOSED]

    async def test_a_client_need_not_wait_for_the_others_of_its_turn(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        first, second = master.connection(), master.connection()
        first.arrive(b"1")
        second.arrive(b"2")
        seen = []

        def respond(protocol: Recorder, data: bytes) -> None:
            seen.append(first.has())
            protocol.transport.write(data)
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        master.offer(first, second)
        await first.ends()
        await second.ends()
        assert seen == [b"", b"1"]

    async def test_closing_without_a_word(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=lambda protocol, _: protocol.transport.close()))
        handed = master.hand(b"question")
        assert await handed.rest() == b""
        assert recorders.only.calls == ["made", "data", "lost"]
        assert not was_real(recorders.only.transport)

    async def test_closing_before_the_first_bytes(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(made=lambda protocol: protocol.transport.close()))
        handed = master.hand(b"question")
        await handed.ends()
        # Bytes that nobody wants are not delivered.
        assert recorders.only.calls == ["made", "lost"]
        assert handed.answers == [Kind.ACK | Kind.CLOSED]

    @pytest.mark.parametrize("pieces", [513, 1024, 2500])
    async def test_more_pieces_than_one_write_takes(
        self, loop: Loop, master: Master, recorders: Recorders, pieces: int
    ) -> None:
        data = pattern(pieces)

        def respond(protocol: Recorder, _: bytes) -> None:
            for number in range(pieces):
                protocol.transport.write(data[number : number + 1])
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        assert await master.hand(b"question").rest() == data

    async def test_the_protocol_may_change_within_the_turn(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        other = Recorders().on(data=respond_and_close(b"from the other"))

        def change(protocol: Recorder) -> None:
            second = other()
            second.transport = protocol.transport
            protocol.transport.set_protocol(second)
            assert protocol.transport.get_protocol() is second

        master.serve(recorders.on(made=change))
        handed = master.hand(b"question")
        assert await handed.rest() == b"from the other"
        assert recorders.only.calls == ["made"]
        assert other.only.calls == ["data", "lost"]

    async def test_its_descriptor_is_closed_when_the_protocol_hears_of_it(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        handed = master.connection()
        handed.arrive(b"question")
        wanted = os.readlink(f"/proc/self/fd/{handed.copy.fileno()}")
        found = []

        def count(protocol: Recorder, *_: Any) -> None:
            found.append(list(proc.descriptors(os.getpid()).values()).count(wanted))

        master.serve(recorders.on(data=respond_and_close(b"answer"), made=count, lost=count))
        master.offer(handed)
        await handed.ends()
        # The master has its copy all the time.
        assert found == [2, 1]


# ── becoming real ───────────────────────────────────────────────────────────────────────────────────────────────────


class TestBecomingReal:
    async def test_nothing_to_read_yet(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=respond_and_close(b"answer")))
        handed = master.hand()
        protocol = await recorders.made()
        await master.answered(handed)
        # Acknowledged at once: a silent client must not hold the worker up.
        assert handed.answers == [Kind.ACK]
        assert protocol.phases == ["REAL"]
        await handed.sends(b"question")
        assert await handed.rest() == b"answer"
        assert protocol.calls == ["made", "data", "lost"]
        assert protocol.data == b"question"
        assert protocol.lost == [None]
        assert handed.answers == [Kind.ACK, Kind.CLOSED]

    @pytest.mark.parametrize("data", [b"", b"question"], ids=["silent", "speaking"])
    async def test_a_listener_whose_client_need_not_speak_first(
        self, loop: Loop, master: Master, recorders: Recorders, data: bytes
    ) -> None:
        def greet(protocol: Recorder) -> None:
            protocol.transport.write(b"hello ")

        master.serve(recorders.on(made=greet, data=respond_and_close(b"answer")), first=False)
        handed = master.hand(data)
        assert await handed.reads(6) == b"hello "
        assert recorders.only.phases[0] == "REAL"
        if not data:
            await handed.sends(b"question")
        assert await handed.rest() == b"answer"
        assert recorders.only.data == b"question"

    @pytest.mark.parametrize("cut", [1, 100, 70_000])
    async def test_the_request_is_not_complete(
        self, loop: Loop, master: Master, recorders: Recorders, cut: int
    ) -> None:
        request = pattern(150_000)

        def respond(protocol: Recorder, _: bytes) -> None:
            if len(protocol.data) == len(request):
                respond_and_close(hashlib.sha256(protocol.data).digest())(protocol, b"")

        master.serve(recorders.on(data=respond))
        handed = master.hand(request[:cut])
        await master.answered(handed)
        assert handed.answers == [Kind.ACK]
        await handed.sends(request[cut:])
        assert await handed.rest() == hashlib.sha256(request).digest()
        assert recorders.only.data == request
        assert recorders.only.phases[:2] == ["LAZY", "LAZY"]
        assert set(recorders.only.phases[2:-1]) == {"REAL"}
        assert recorders.only.calls.count("lost") == 1

    async def test_a_first_read_that_was_not_everything(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """More has arrived than is read at once: the rest is the loop's transport's."""
        request = pattern(120_000)

        def respond(protocol: Recorder, _: bytes) -> None:
            if len(protocol.data) == len(request):
                respond_and_close(b"done")(protocol, b"")

        master.serve(recorders.on(data=respond))
        assert await master.hand(request).rest() == b"done"
        assert recorders.only.data == request

    async def test_the_response_is_not_complete(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        go = asyncio.Event()

        async def application(protocol: Recorder) -> None:
            protocol.transport.write(b"first ")
            await go.wait()
            protocol.transport.write(b"second")
            protocol.transport.close()

        tasks = []
        master.serve(recorders.on(data=lambda protocol, _: tasks.append(loop.create_task(application(protocol)))))
        handed = master.hand(b"question")
        # What is there is sent, and the rest can wait.
        assert await handed.reads(6) == b"first "
        await reaches(recorders.only.transport, "REAL")
        assert handed.answers == [Kind.ACK]
        go.set()
        assert await handed.rest() == b"second"
        assert recorders.only.calls == ["made", "data", "lost"]

    async def test_the_connection_stays_open(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        def respond(protocol: Recorder, data: bytes) -> None:
            protocol.transport.write(data.upper())

        master.serve(recorders.on(data=respond))
        handed = master.hand(b"one")
        assert await handed.reads(3) == b"ONE"
        for word in (b"two", b"three"):
            await handed.sends(word)
            assert await handed.reads(len(word)) == word.upper()
        handed.client.close()
        await handed.ends()
        assert recorders.only.calls == ["made", "data", "data", "data", "eof", "lost"]
        assert recorders.only.lost == [None]
        assert handed.answers == [Kind.ACK, Kind.CLOSED]

    @pytest.mark.parametrize("close", [True, False], ids=["closed", "kept"])
    @pytest.mark.parametrize("step", [3_000_000, 10_000])
    async def test_a_write_does_not_fit(
        self, loop: Loop, master: Master, recorders: Recorders, close: bool, step: int
    ) -> None:
        data = pattern(3_000_000)

        def respond(protocol: Recorder, _: bytes) -> None:
            for start in range(0, len(data), step):
                protocol.transport.write(data[start : start + step])
            if close:
                protocol.transport.close()

        master.serve(recorders.on(data=respond))
        handed = master.hand(b"question", sndbuf=8192)
        await reaches((await recorders.made()).transport, "REAL")
        got = bytearray()
        while len(got) < len(data):
            got += await handed.reads(min(7919, len(data) - len(got)))
        assert got == data
        if close:
            assert await handed.rest() == b""
            assert recorders.only.lost == [None]
        else:
            assert recorders.only.lost == []
            assert recorders.only.flow == ["pause", "resume"]

    async def test_it_keeps_its_socket_as_asyncio_would(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """Small answers must not wait for the client's acknowledgement (TCP_NODELAY)."""
        master.serve(recorders)
        handed = master.hand(b"question")
        await reaches((await recorders.made()).transport, "REAL")
        assert handed.copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class TestWhilePending:
    """Between the end of the first turn and the loop's own transport, at each turn in between."""

    @pytest.mark.parametrize("later", range(4))
    async def test_writes_keep_their_order(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        master.serve(recorders.on(data=lambda protocol, _: protocol.transport.write(b"lazy ")))
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        transport.write(b"pending ")
        await reaches(transport, "REAL")
        transport.write(b"real")
        transport.close()
        assert await handed.rest() == b"lazy pending real"

    @pytest.mark.parametrize("later", range(4))
    async def test_close(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        transport.write(b"answer")
        transport.close()
        transport.close()
        assert transport.is_closing()
        transport.write(b"too late")
        assert await handed.rest() == b"answer"
        assert recorders.only.lost == [None]

    @pytest.mark.parametrize("later", range(4))
    async def test_abort(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        if phase(transport) == "PENDING":
            # The loop's transport may write at once; this must not.
            transport.write(b"dropped")
        transport.abort()
        assert transport.is_closing()
        assert await handed.rest() == b""
        assert recorders.only.lost == [None]

    @pytest.mark.parametrize("later", range(4))
    async def test_write_eof(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        master.serve(recorders)
        handed = master.hand(b"question ")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        transport.write(b"answer")
        transport.write_eof()
        assert await handed.rest() == b"answer"
        # Only one direction has ended.
        await handed.sends(b"more")
        await until(lambda: recorders.only.data == b"question more", "the rest of the request has arrived")
        assert recorders.only.lost == []

    @pytest.mark.parametrize("later", range(4))
    async def test_pause_and_resume_reading(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        master.serve(recorders)
        handed = master.hand(b"one ")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        transport.pause_reading()
        assert not transport.is_reading()
        await reaches(transport, "REAL")
        await turns(2)
        handed.arrive(b"two")
        await turns(5)
        assert recorders.only.data == b"one "
        transport.resume_reading()
        assert transport.is_reading()
        await until(lambda: recorders.only.data == b"one two", "the rest has arrived")

    @pytest.mark.parametrize("later", range(4))
    async def test_the_protocol_changes(self, loop: Loop, master: Master, recorders: Recorders, later: int) -> None:
        other = Recorders().on(data=respond_and_close(b"from the other"))
        master.serve(recorders)
        handed = master.hand(b"one")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        second = other()
        second.transport = transport
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        await handed.sends(b"two")
        assert await handed.rest() == b"from the other"
        assert recorders.only.calls == ["made", "data"]
        assert other.only.calls == ["data", "lost"]
        assert other.only.data == b"two"

    async def test_what_is_not_read_yet_is_not_lost(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"one ")
        await reaches((await recorders.made()).transport, "PENDING")
        handed.arrive(b"two ")
        handed.half_close()
        await until(lambda: "eof" in recorders.only.calls, "the client's end has arrived")
        assert recorders.only.data == b"one two "


# ── flow control ────────────────────────────────────────────────────────────────────────────────────────────────────


class TestFlowControl:
    async def test_fifty_megabytes_in_a_loop(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """An application that sends in a loop, and waits when it is told to, is told to from the first turn on."""
        chunk = pattern(65536)
        writable = asyncio.Event()
        writable.set()
        buffered = []

        async def application(protocol: Recorder) -> None:
            for _ in range(800):
                protocol.transport.write(chunk)
                buffered.append(protocol.transport.get_write_buffer_size())
                await writable.wait()
            protocol.transport.close()

        tasks = []
        recorders.on(
            data=lambda protocol, _: tasks.append(loop.create_task(application(protocol))),
            pause=lambda protocol: writable.clear(),
            resume=lambda protocol: writable.set(),
        )
        master.serve(recorders)
        handed = master.hand(b"question", sndbuf=65536)
        digest, size = hashlib.sha256(), 0
        while part := await loop.sock_recv(handed.client, 1 << 20):
            digest.update(part)
            size += len(part)
        assert size == 800 * len(chunk)
        assert digest.digest() == hashlib.sha256(chunk * 800).digest()
        protocol = recorders.only
        # Before it was real.
        assert protocol.phases[protocol.calls.index("pause")] == "LAZY"
        assert protocol.flow[:2] == ["pause", "resume"]
        assert protocol.flow == ["pause", "resume"] * (len(protocol.flow) // 2)
        assert max(buffered) <= HIGH_WATER + len(chunk)

    async def test_what_the_kernel_takes_at_once_pauses_nobody(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        data = pattern(200_000)
        master.serve(recorders.on(data=respond_and_close(data)))
        handed = master.connection("socketpair")
        handed.copy.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        handed.arrive(b"question")
        master.offer(handed)
        assert await handed.rest() == data
        assert recorders.only.flow == []
        assert not was_real(recorders.only.transport)

    async def test_paused_in_the_first_turn_and_everything_taken_by_its_end(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        handed = master.connection("socketpair")
        handed.arrive(b"question")
        sent, got = bytearray(), bytearray()

        def respond(protocol: Recorder, _: bytes) -> None:
            while "pause" not in protocol.calls:
                piece = pattern(10_000)
                sent.extend(piece)
                protocol.transport.write(piece)
            # Within the same turn the client makes room.
            got.extend(handed.has())

        master.serve(recorders.on(data=respond))
        master.offer(handed)
        await until(lambda: recorders.all and recorders.only.flow == ["pause", "resume"], "it may write again")
        # It was all there before the loop's transport was.
        assert got + handed.has() == sent
        assert recorders.only.phases[-1] == "LAZY"

    @pytest.mark.parametrize("over", [False, True])
    async def test_the_same_where_connections_are_borrowed(
        self, loop: Loop, master: Master, recorders: Recorders, over: bool
    ) -> None:
        """There it needs no transport of the loop's, neither for the rest of the response nor for the next request."""
        master.receiver.borrow(select.epoll(), keep=True, head_timeout=0.0)
        handed = master.connection("socketpair")
        handed.arrive(b"question")
        sent, got = bytearray(), bytearray()

        def respond(protocol: Recorder, _: bytes) -> None:
            while "pause" not in protocol.calls:
                piece = pattern(10_000)
                sent.extend(piece)
                protocol.transport.write(piece)
            got.extend(handed.has())
            if over:
                protocol.transport.rest()

        master.serve(recorders.on(data=respond))
        master.offer(handed)
        await until(lambda: recorders.all and recorders.only.flow == ["pause", "resume"], "it may write again")
        assert got + handed.has() == sent
        assert not was_real(recorders.only.transport)
        await reaches(recorders.only.transport, "KEPT" if over else "BUSY")

    async def test_what_is_written_when_it_may_again_goes_behind(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        data = pattern(400_000)

        def more(protocol: Recorder) -> None:
            protocol.transport.write(b"the end")
            protocol.transport.close()

        master.serve(recorders.on(data=lambda protocol, _: protocol.transport.write(data), resume=more))
        handed = master.hand(b"question", sndbuf=8192)
        await reaches((await recorders.made()).transport, "REAL")
        assert await handed.rest() == data + b"the end"
        assert recorders.only.flow == ["pause", "resume"]

    async def test_never_paused_twice(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """It is still too much when the loop's transport takes over, which would say pause again."""
        data = pattern(5_000_000)
        master.serve(recorders.on(data=respond_and_close(data)))
        recorders.on(data=lambda protocol, _: protocol.transport.write(data))
        handed = master.hand(b"question", sndbuf=8192)
        await reaches((await recorders.made()).transport, "REAL")
        await turns(3)
        assert recorders.only.flow == ["pause"]
        assert await handed.reads(len(data)) == data
        await until(lambda: recorders.only.flow == ["pause", "resume"], "it may write again")

    async def test_paused_while_pending(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        data = pattern(3_000_000)
        master.serve(recorders)
        handed = master.hand(b"question", sndbuf=8192)
        protocol = await recorders.made()
        await reaches(protocol.transport, "PENDING")
        protocol.transport.write(data)
        if phase(protocol.transport) == "PENDING":
            assert protocol.flow == ["pause"]
        assert protocol.transport.get_write_buffer_size() == len(data)
        assert await handed.reads(len(data)) == data
        await until(lambda: protocol.flow == ["pause", "resume"], "it may write again")

    async def test_the_size_of_the_buffer(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        sizes = []

        def respond(protocol: Recorder, _: bytes) -> None:
            for size in (10, 20):
                protocol.transport.write(bytes(size))
                sizes.append(protocol.transport.get_write_buffer_size())

        master.serve(recorders.on(data=respond))
        handed = master.hand(b"question")
        await handed.reads(30)
        await reaches(recorders.only.transport, "REAL")
        assert sizes == [10, 30]
        assert recorders.only.transport.get_write_buffer_size() == 0

    async def test_the_limits_of_the_buffer(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        seen = []

        def limit(protocol: Recorder) -> None:
            seen.append(protocol.transport.get_write_buffer_limits())
            protocol.transport.set_write_buffer_limits(high=1000, low=10)

        master.serve(recorders.on(made=limit))
        master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        assert seen == [(HIGH_WATER // 4, HIGH_WATER)]
        # What it asked for in its first turn holds from now on.
        assert transport.get_write_buffer_limits() == (10, 1000)
        transport.set_write_buffer_limits(high=3000, low=20)
        assert transport.get_write_buffer_limits() == (20, 3000)


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestPauseReading:
    @pytest.mark.parametrize("call", ["made", "data"])
    async def test_before_it_is_real(self, loop: Loop, master: Master, recorders: Recorders, call: str) -> None:
        states = []

        def pause(protocol: Recorder, *_: Any) -> None:
            states.append(protocol.transport.is_reading())
            protocol.transport.pause_reading()
            states.append(protocol.transport.is_reading())

        master.serve(recorders.on(**{call: pause}))
        handed = master.hand(b"one ")
        protocol = await recorders.made()
        await reaches(protocol.transport, "REAL")
        await turns(2)
        handed.arrive(b"two")
        await turns(5)
        assert protocol.data == b"one "
        assert not protocol.transport.is_reading()
        recorders.does.clear()
        protocol.transport.resume_reading()
        assert protocol.transport.is_reading()
        await until(lambda: protocol.data == b"one two", "the rest is read")
        assert states == [True, False]

    async def test_within_connection_made_of_a_real_one(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(made=lambda protocol: protocol.transport.pause_reading()), first=False)
        # It closes its copy when it hears that this is taken.
        master.deafen()
        handed = master.hand()
        protocol = await recorders.made()
        await turns(2)
        handed.arrive(b"question")
        await turns(5)
        assert protocol.data == b""
        protocol.transport.resume_reading()
        await until(lambda: protocol.data == b"question", "it is read")

    @pytest.mark.parametrize("end", ["close", "abort"])
    async def test_and_closed_before_the_pause_reaches_the_loop(
        self, loop: Loop, master: Master, recorders: Recorders, end: str
    ) -> None:
        master.serve(recorders.on(data=lambda protocol, _: protocol.transport.pause_reading()))
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        getattr(transport, end)()
        assert not transport.is_reading()
        assert await handed.rest() == b""

    async def test_and_resumed_before_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        def pause(protocol: Recorder, data: bytes) -> None:
            protocol.transport.pause_reading()
            protocol.transport.resume_reading()
            assert protocol.transport.is_reading()

        master.serve(recorders.on(data=pause))
        handed = master.hand(b"one ")
        handed.arrive(b"two")
        await until(lambda: recorders.all and recorders.only.data == b"one two", "everything is read")

    async def test_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"one ")
        protocol = await recorders.made()
        await reaches(protocol.transport, "REAL")
        protocol.transport.pause_reading()
        await turns(2)
        handed.arrive(b"two")
        await turns(5)
        assert protocol.data == b"one "
        protocol.transport.resume_reading()
        await until(lambda: protocol.data == b"one two", "the rest is read")

    async def test_nothing_is_read_while_closing(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        reading = []

        def close(protocol: Recorder, _: bytes) -> None:
            protocol.transport.close()
            reading.append(protocol.transport.is_reading())

        master.serve(recorders.on(data=close))
        await master.hand(b"question").ends()
        assert reading == [False]


# ── closing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestClosing:
    async def test_what_is_written_after_close_is_ignored(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        def respond(protocol: Recorder, data: bytes) -> None:
            respond_and_close(b"answer")(protocol, data)
            assert protocol.transport.is_closing()
            protocol.transport.write(b"too late")
            protocol.transport.writelines([b"too", b"late"])
            protocol.transport.close()

        master.serve(recorders.on(data=respond, lost=lambda protocol, _: protocol.transport.write(b"much too late")))
        assert await master.hand(b"question").rest() == b"answer"
        recorders.only.transport.write(b"and even later")
        recorders.only.transport.close()
        recorders.only.transport.abort()
        await turns(3)
        assert recorders.only.calls == ["made", "data", "lost"]

    async def test_close_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        transport.write(b"answer")
        transport.close()
        transport.close()
        assert transport.is_closing()
        assert await handed.rest() == b"answer"
        assert phase(transport) == "CLOSED"
        assert transport.is_closing()
        assert recorders.only.lost == [None]

    async def test_whether_something_is_unread(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        transport.pause_reading()
        assert not transport.has_unread
        handed.arrive(b"more")
        assert transport.has_unread
        # What the loop has closed without having said so yet.
        fd, transport._fd = transport._fd, 1 << 20
        assert not transport.has_unread
        transport._fd = fd
        transport.close()
        assert not transport.has_unread

    async def test_abort_in_the_first_turn(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        def abort(protocol: Recorder, _: bytes) -> None:
            protocol.transport.write(b"dropped")
            protocol.transport.abort()
            assert protocol.transport.get_write_buffer_size() == 0
            protocol.transport.write(b"too late")

        master.serve(recorders.on(data=abort))
        handed = master.hand(b"question")
        assert await handed.rest() == b""
        assert recorders.only.lost == [None]
        assert not was_real(recorders.only.transport)

    async def test_abort_behind_a_close_that_could_not_write_everything(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        def abort(protocol: Recorder, _: bytes) -> None:
            protocol.transport.write(bytes(3_000_000))
            protocol.transport.close()
            protocol.transport.abort()

        master.serve(recorders.on(data=abort))
        handed = master.hand(b"question", sndbuf=8192)
        assert len(await handed.rest()) < 3_000_000
        assert not was_real(recorders.only.transport)

    async def test_abort_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question", sndbuf=8192)
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        transport.write(bytes(3_000_000))
        transport.abort()
        assert len(await handed.rest()) < 3_000_000
        assert recorders.only.calls.count("lost") == 1
        assert recorders.only.lost == [None]

    @pytest.mark.parametrize("family", ["tcp", "unix"])
    async def test_write_eof_in_the_first_turn(
        self, loop: Loop, master: Master, recorders: Recorders, family: str
    ) -> None:
        def respond(protocol: Recorder, _: bytes) -> None:
            if "eof" not in protocol.calls and len(protocol.calls) == 2:
                assert protocol.transport.can_write_eof()
                protocol.transport.write(b"answer")
                protocol.transport.write_eof()
                protocol.transport.write(b"too late")

        master.serve(recorders.on(data=respond))
        handed = master.hand(b"question ", family=family)
        assert await handed.rest() == b"answer"
        await handed.sends(b"more")
        await until(lambda: recorders.only.data == b"question more", "the rest of the request has arrived")
        assert recorders.only.lost == []
        handed.client.close()
        await handed.ends()
        assert recorders.only.lost == [None]

    async def test_write_eof_and_close_in_the_first_turn(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        def respond(protocol: Recorder, _: bytes) -> None:
            protocol.transport.write(b"answer")
            protocol.transport.write_eof()
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        assert await master.hand(b"question").rest() == b"answer"
        assert not was_real(recorders.only.transport)

    async def test_write_eof_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        assert transport.can_write_eof()
        transport.write(b"answer")
        transport.write_eof()
        assert await handed.rest() == b"answer"
        assert recorders.only.lost == []

    @pytest.mark.parametrize("keep", [False, True])
    async def test_the_client_has_said_everything(
        self, loop: Loop, master: Master, recorders: Recorders, keep: bool
    ) -> None:
        """eof_received decides whether the connection goes on, as in asyncio."""
        master.serve(recorders.on(eof=lambda protocol: keep))
        handed = master.connection()
        handed.arrive(b"question")
        handed.half_close()
        master.offer(handed)
        await until(lambda: recorders.all and "eof" in recorders.only.calls, "the client's end has arrived")
        assert recorders.only.data == b"question"
        if keep:
            recorders.only.transport.write(b"answer")
            assert await handed.reads(6) == b"answer"
            recorders.only.transport.close()
        assert await handed.rest() == b""
        assert recorders.only.lost == [None]


class Frugal(asyncio.Protocol):
    """Refers to its transport, as protocols do."""

    alive: ClassVar[list[weakref.ref[Frugal]]] = []

    def __init__(self) -> None:
        self.alive.append(weakref.ref(self))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        cast("asyncio.Transport", self.transport).write(b"x" * 4_000_000 if data == b"much" else data)
        self.transport.close()


class TestGarbage:
    @pytest.mark.parametrize("question", [b"little", b"much"])
    async def test_what_is_over_does_not_wait_for_the_collector(
        self, loop: Loop, master: Master, question: bytes
    ) -> None:
        Frugal.alive.clear()
        master.serve(Frugal)
        gc.collect()
        gc.disable()
        try:
            handed = master.hand(question)
            await handed.rest()
            await handed.ends()
            await until(lambda: Frugal.alive[0]() is None, "nothing refers to the protocol")
        finally:
            gc.enable()


# ── the protocol ────────────────────────────────────────────────────────────────────────────────────────────────────


class TestSetProtocol:
    async def test_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        data = pattern(3_000_000)
        other = Recorders()
        master.serve(recorders)
        handed = master.hand(b"one", sndbuf=8192)
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        second = other()
        second.transport = transport
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        await handed.sends(b"two")
        await until(lambda: second.data == b"two", "the new one hears the client")
        transport.write(data)
        assert second.flow == ["pause"]
        assert await handed.reads(len(data)) == data
        await until(lambda: second.flow == ["pause", "resume"], "the new one may write again")
        handed.client.close()
        await handed.ends()
        assert recorders.only.calls == ["made", "data"]
        assert second.calls == ["data", "pause", "resume", "eof", "lost"]

    async def test_from_within_data_received(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """An upgrade: the old protocol passes on, the new one gets what follows."""
        other = Recorders().on(data=respond_and_close(b"from the other"))

        def upgrade(protocol: Recorder, _: bytes) -> None:
            second = other()
            second.connection_made(protocol.transport)
            protocol.transport.set_protocol(second)

        master.serve(recorders.on(data=upgrade))
        handed = master.hand(b"upgrade")
        await reaches((await recorders.made()).transport, "REAL")
        await handed.sends(b"frame")
        assert await handed.rest() == b"from the other"
        assert recorders.only.calls == ["made", "data"]
        assert other.only.calls == ["made", "data", "lost"]
        assert other.only.data == b"frame"

    async def test_from_within_connection_made_of_a_real_one(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        other = Recorders().on(data=respond_and_close(b"from the other"))

        def change(protocol: Recorder) -> None:
            second = other()
            second.transport = protocol.transport
            protocol.transport.set_protocol(second)

        master.serve(recorders.on(made=change), first=False)
        handed = master.hand(b"question")
        assert await handed.rest() == b"from the other"
        assert other.only.calls == ["data", "lost"]

    async def test_a_buffered_protocol(self, loop: Loop, master: Master) -> None:
        """asyncio's other kind of protocol, which lends its own buffer."""
        made, lost, got = [], [], bytearray()

        class Buffered(asyncio.BufferedProtocol):
            def __init__(self) -> None:
                self._buffer = bytearray(1000)

            def connection_made(self, transport: Any) -> None:
                made.append(transport)

            def get_buffer(self, sizehint: int) -> bytearray:
                return self._buffer

            def buffer_updated(self, nbytes: int) -> None:
                got.extend(self._buffer[:nbytes])
                if got.endswith(b"."):
                    made[0].write(bytes(got).upper())
                    made[0].close()

            def connection_lost(self, exc: Exception | None) -> None:
                lost.append(exc)

        master.serve(Buffered, first=False)
        handed = master.hand(b"one, ")
        await until(lambda: got == b"one, ", "the first bytes are delivered")
        await handed.sends(b"two.")
        assert await handed.rest() == b"ONE, TWO."
        assert lost == [None]


# ── what is known of the connection ─────────────────────────────────────────────────────────────────────────────────


class TestExtraInfo:
    @pytest.mark.parametrize("first", [True, False], ids=["lazy", "real"])
    @pytest.mark.parametrize("wildcard", [False, True])
    @pytest.mark.parametrize("family", ["tcp", "tcp6", "unix"])
    async def test_addresses(
        self, loop: Loop, master: Master, recorders: Recorders, family: str, wildcard: bool, first: bool
    ) -> None:
        seen: dict[str, Any] = {}

        def ask(protocol: Recorder) -> None:
            seen.update({name: protocol.transport.get_extra_info(name) for name in ("peername", "sockname")})

        handed = master.connection(family)
        handed.arrive(b"question")
        server, client = handed.copy.getsockname(), handed.client.getsockname()
        host = {"tcp": "0.0.0.0", "tcp6": "::"}.get(family)
        master.serve(
            recorders.on(made=ask),
            first=first,
            family=handed.copy.family,
            sockname=(host, server[1], 0, 0)[: len(server)] if wildcard and host else server,
        )
        master.offer(handed)
        await recorders.made()
        # In the shape that uvicorn understands.
        if family == "unix":
            assert seen == {"peername": None, "sockname": server}
        else:
            assert seen == {"peername": client[:2], "sockname": server[:2]}

    async def test_the_local_address_at_the_descriptor_limit(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """The offer has brought the last descriptor that there can be."""
        seen = []
        handed = master.connection()
        handed.arrive(b"question")
        recorders.on(made=lambda protocol: seen.append(protocol.transport.get_extra_info("sockname")))
        master.serve(recorders.on(data=respond_and_close(b"answer")), sockname=("0.0.0.0", 1))
        server = handed.copy.getsockname()
        with room_for(1):
            master.offer(handed)
            await handed.ends()
        assert seen == [server]
        assert handed.has() == b"answer"

    async def test_the_local_address_is_known_after_the_end(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """Its descriptor is somebody else's by then: nothing may be asked of it."""
        seen = []

        def ask(protocol: Recorder, *_: Any) -> None:
            seen.append(protocol.transport.get_extra_info("sockname"))

        master.serve(recorders.on(data=respond_and_close(b"answer"), lost=ask), sockname=("0.0.0.0", 1))
        await master.hand(b"question").ends()
        assert seen == [None]

    async def test_the_socket_is_there_when_the_loop_has_it(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        seen = []
        master.serve(recorders.on(data=lambda p, _: seen.append(p.transport.get_extra_info("socket", "none"))))
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "REAL")
        assert seen == ["none"]
        sock = transport.get_extra_info("socket")
        assert sock.getpeername() == handed.client.getsockname()
        assert transport.get_extra_info("sslcontext", "plain") == "plain"
        assert transport.get_extra_info("no such thing") is None

    async def test_nobody_asks_the_socket_whose_address_a_proxy_has_told(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        master.told = PROXIED
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        assert get_remote_addr(transport) == handed.client.getsockname()
        await reaches(transport, "REAL")
        assert transport.get_extra_info("socket") is None
        assert get_remote_addr(transport) == transport.get_extra_info("peername") == handed.client.getsockname()

    async def test_a_client_that_is_gone_has_an_address_all_the_same(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """The kernel forgets the addresses of a connection that was reset; the record does not."""
        handed = master.connection()
        handed.arrive(b"question")
        address = handed.client.getsockname()
        master.serve(recorders, first=False)
        master.offer(handed)
        handed.reset()
        protocol = await recorders.made()
        assert protocol.transport.get_extra_info("peername") == address


class TestCopies:
    @pytest.mark.parametrize("kind", [bytearray, lambda data: memoryview(bytearray(data))], ids=["array", "view"])
    async def test_what_may_change_is_copied(
        self, loop: Loop, master: Master, recorders: Recorders, kind: Callable[[bytes], Any]
    ) -> None:
        def respond(protocol: Recorder, _: bytes) -> None:
            for text in (b"lazy ", b"again "):
                data = kind(text)
                protocol.transport.write(data)
                data[:] = bytes(len(data))

        master.serve(recorders.on(data=respond))
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        data = kind(b"pending")
        transport.write(data)
        data[:] = bytes(len(data))
        transport.close()
        assert await handed.rest() == b"lazy again pending"

    async def test_a_view_counts_by_its_bytes(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        sizes = []

        def respond(protocol: Recorder, _: bytes) -> None:
            protocol.transport.write(memoryview(array.array("I", range(1000))))
            sizes.append(protocol.transport.get_write_buffer_size())
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        assert len(await master.hand(b"question").rest()) == sizes[0] == 4000


# ── a client that resets ────────────────────────────────────────────────────────────────────────────────────────────


class TestReset:
    @pytest.mark.parametrize("data", [b"", b"question"], ids=["silent", "speaking"])
    @pytest.mark.parametrize("first", [True, False])
    async def test_before_it_was_offered(
        self, loop: Loop, master: Master, recorders: Recorders, first: bool, data: bytes
    ) -> None:
        master.serve(recorders, first=first)
        handed = master.connection()
        if data:
            handed.arrive(data)
        handed.reset()
        master.offer(handed)
        await handed.ends()
        if first and not data:
            # No protocol needs to hear of it.
            assert recorders.all == []
            assert handed.answers == [Kind.ACK | Kind.CLOSED]
        else:
            assert recorders.only.calls[0] == "made"
            assert recorders.only.calls.count("lost") == 1

    async def test_left_without_a_word(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.connection()
        handed.leave()
        master.offer(handed)
        await handed.ends()
        assert recorders.all == []
        assert handed.answers == [Kind.ACK | Kind.CLOSED]

    @pytest.mark.parametrize("size", [10, 10_000_000])
    @pytest.mark.parametrize("close", [True, False], ids=["closed", "kept"])
    async def test_before_the_answer_is_written(
        self, loop: Loop, master: Master, recorders: Recorders, size: int, close: bool
    ) -> None:
        handed = master.connection()
        handed.arrive(b"question")

        def respond(protocol: Recorder, _: bytes) -> None:
            handed.reset()
            for _ in range(3):
                protocol.transport.write(bytes(size))
            if close:
                protocol.transport.close()

        master.serve(recorders.on(data=respond))
        master.offer(handed)
        await handed.ends()
        assert recorders.only.calls == ["made", "data", "lost"]
        assert isinstance(recorders.only.lost[0], ConnectionResetError | BrokenPipeError)
        assert not was_real(recorders.only.transport)

    async def test_a_client_that_left_and_gets_an_answer(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        handed = master.connection("socketpair")
        handed.arrive(b"question")

        def respond(protocol: Recorder, _: bytes) -> None:
            handed.client.close()
            protocol.transport.write(b"answer")
            protocol.transport.close()

        master.serve(recorders.on(data=respond))
        master.offer(handed)
        await handed.ends()
        assert [type(error) for error in recorders.only.lost] == [BrokenPipeError]

    @pytest.mark.parametrize("later", range(3))
    @pytest.mark.parametrize("data", [b"", b"answer"])
    async def test_while_pending(
        self, loop: Loop, master: Master, recorders: Recorders, later: int, data: bytes
    ) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await reaches(transport, "PENDING")
        await turns(later)
        handed.reset()
        transport.write(data)
        await handed.ends()
        assert recorders.only.calls.count("lost") == 1
        assert recorders.only.calls[-1] == "lost"

    async def test_when_it_is_real(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        await reaches((await recorders.made()).transport, "REAL")
        await turns(2)
        handed.reset()
        await handed.ends()
        assert isinstance(recorders.only.lost[0], ConnectionResetError)
        assert recorders.only.calls.count("lost") == 1


# ── protocols at fault ──────────────────────────────────────────────────────────────────────────────────────────────


class Trouble(Exception):  # noqa: N818
    """The user's own."""


def raises(*_: Any) -> None:
    raise Trouble


def clear(complaints: Complaints) -> None:
    assert [type(context["exception"]) for context in complaints] == [Trouble]
    complaints.clear()


class TestProtocolsAtFault:
    """The loop's exception handler hears of it, the client is let go, and nobody else is harmed."""

    @pytest.mark.parametrize("call", ["made", "data"])
    async def test_lazily(
        self, loop: Loop, master: Master, recorders: Recorders, complaints: Complaints, call: str
    ) -> None:
        good = Recorders().on(data=respond_and_close(b"answer"))
        both = iter([recorders.on(**{call: raises}), good])
        master.serve(lambda: next(both)())
        bad, other = master.connection(), master.connection()
        bad.arrive(b"question")
        other.arrive(b"question")
        master.offer(bad, other)
        assert await bad.rest() == b""
        assert await other.rest() == b"answer"
        clear(complaints)
        assert recorders.only.calls == (["made", "lost"] if call == "made" else ["made", "data", "lost"])
        assert bad.answers == other.answers == [Kind.ACK | Kind.CLOSED]

    async def test_at_the_end_lazily(
        self, loop: Loop, master: Master, recorders: Recorders, complaints: Complaints
    ) -> None:
        good = Recorders().on(data=respond_and_close(b"answer"))
        both = iter([recorders.on(data=respond_and_close(b"answer"), lost=raises), good])
        master.serve(lambda: next(both)())
        bad, other = master.connection(), master.connection()
        bad.arrive(b"question")
        other.arrive(b"question")
        master.offer(bad, other)
        assert await bad.rest() == b"answer"
        assert await other.rest() == b"answer"
        clear(complaints)
        assert bad.answers == other.answers == [Kind.ACK | Kind.CLOSED]

    @pytest.mark.parametrize("first", [True, False], ids=["silent", "speaking"])
    async def test_when_its_connection_is_made_late(
        self, loop: Loop, master: Master, recorders: Recorders, complaints: Complaints, first: bool
    ) -> None:
        master.serve(recorders.on(made=raises), first=first)
        handed = master.hand()
        await master.answered(handed)
        assert handed.acked
        await handed.ends()
        clear(complaints)
        assert recorders.only.calls == ["made", "lost"]

    async def test_when_data_comes_late(
        self, loop: Loop, master: Master, recorders: Recorders, complaints: Complaints
    ) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        await reaches((await recorders.made()).transport, "REAL")
        recorders.on(data=raises)
        await handed.sends(b"more")
        await handed.ends()
        clear(complaints)
        assert [type(error) for error in recorders.only.lost] == [Trouble]

    async def test_at_the_end(self, loop: Loop, master: Master, recorders: Recorders, complaints: Complaints) -> None:
        master.serve(recorders.on(lost=raises))
        handed = master.hand(b"question")
        await reaches((await recorders.made()).transport, "REAL")
        handed.client.close()
        await handed.ends()
        await until(lambda: complaints, "somebody hears of it")
        clear(complaints)

    @pytest.mark.parametrize("first", [True, False])
    async def test_the_factory(self, loop: Loop, master: Master, complaints: Complaints, first: bool) -> None:
        good = Recorders().on(data=respond_and_close(b"answer"))
        both = iter([raises, good])
        master.serve(lambda: next(both)(), first=first)
        bad, other = master.connection(), master.connection()
        bad.arrive(b"question")
        other.arrive(b"question")
        master.offer(bad, other)
        await bad.ends()
        assert await other.rest() == b"answer"
        clear(complaints)
        assert bad.answers == [Kind.ACK | Kind.CLOSED]

    async def test_a_protocol_that_is_none(self, loop: Loop, master: Master, complaints: Complaints) -> None:
        """The loop's own transport cannot be made: the connection ends, and its descriptor with it."""
        master.serve(object, first=False)
        handed = master.hand(b"question")
        await handed.ends()
        assert [type(context["exception"]) for context in complaints] == [AttributeError]
        complaints.clear()


class TestRepr:
    async def test_it_tells_the_phase(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        seen = []
        master.serve(recorders.on(data=lambda protocol, _: seen.append(repr(protocol.transport))))
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        for name in ("PENDING", "REAL"):
            await reaches(transport, name)
            seen.append(repr(transport))
        transport.close()
        await handed.ends()
        seen.append(repr(transport))
        assert seen == [f"<HandedTransport connection 1 {name}>" for name in ("LAZY", "PENDING", "REAL", "CLOSED")]
