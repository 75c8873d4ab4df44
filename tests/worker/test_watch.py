"""Connections that wait in the worker's own epolls: for one worker's use, and where the master may take them back."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Iterator
from typing import Any

import pytest

from clusterserve.channel.board import IDLE, READING, RESPONDING, UNTOUCHED
from clusterserve.core.records import Flag, Kind
from clusterserve.worker.watch import Watch
from tests.helpers.loops import turns, until
from tests.worker.harness import Handed, Master, Recorder, Recorders, phase, reaches, was_real

Loop = asyncio.AbstractEventLoop


def answer(protocol: Recorder, data: bytes) -> None:
    """Answer at once; half a request, one without a full stop, is not answered."""
    if data.endswith(b"."):
        protocol.transport.write(data.upper())
        protocol.transport.rest()


def mark(master: Master, handed: Handed) -> int:
    return master.receiver.marks[handed.copy.fileno()]


@pytest.fixture
def echo(master: Master, recorders: Recorders) -> Recorders:
    master.serve(recorders.on(data=answer))
    return recorders


@pytest.fixture
def private(master: Master) -> None:
    """`--dispatch connection`."""
    master.receiver.borrow(None, keep=True, head_timeout=0.0)


@pytest.fixture
def shared(master: Master) -> Iterator[select.epoll]:
    """`--dispatch auto`: the master's copy of the epoll that both share."""
    theirs = select.epoll()
    ours = select.epoll.fromfd(os.dup(theirs.fileno()))
    master.receiver.borrow(ours, keep=True, head_timeout=0.0)
    yield theirs
    theirs.close()


@pytest.mark.usefixtures("private")
class TestForOneWorker:
    async def test_it_stays_and_says_where_it_is(self, loop: Loop, master: Master, echo: Recorders) -> None:
        handed = master.hand(b"one.")
        assert await handed.reads(4) == b"ONE."
        for _ in range(3):
            await until(lambda: mark(master, handed) == IDLE, "it is idle")
            await handed.sends(b"two ")
            await until(lambda: mark(master, handed) == READING, "it is read")
            await handed.sends(b"three.")
            assert await handed.reads(6) == b"THREE."
            assert mark(master, handed) in (RESPONDING, IDLE)
        transport = echo.only.transport
        assert phase(transport) == "BUSY"
        assert not was_real(transport)
        # The master has heard of it once.
        assert handed.answers == [Kind.ACK]
        handed.client.close()
        await handed.ends()
        assert echo.only.lost == [None]

    async def test_what_holds_the_loop_is_read_one_by_one(self, loop: Loop, master: Master, echo: Recorders) -> None:
        """Who has just come is read once a turn, and must not wait for all those that were here before, each time."""
        echo.on(data=lambda protocol, data: (time.sleep(0.002), answer(protocol, data)))
        all_of_them = [master.hand(b"one.") for _ in range(3)]
        for handed in all_of_them:
            assert await handed.reads(4) == b"ONE."
        watch = master.receiver.watch
        assert watch is not None
        await until(lambda: watch.claims == 1, "it is known what one takes")
        for handed in all_of_them:
            handed.arrive(b"two.")
        watch._look()
        assert [handed.unread() for handed in all_of_them].count(0) == 1
        for handed in all_of_them:
            assert await handed.reads(4) == b"TWO."

    async def test_who_does_not_read_is_not_asked(self, loop: Loop, master: Master, echo: Recorders) -> None:
        handed = master.hand(b"one ")
        protocol = await echo.made()
        await reaches(protocol.transport, "BUSY")
        protocol.transport.pause_reading()
        handed.arrive(b"two.")
        looks: list[int] = []
        readable = protocol.transport.readable
        protocol.transport.readable = lambda: (looks.append(1), readable())
        await turns(20)
        assert len(looks) <= 1
        assert bytes(protocol.data) == b"one "
        protocol.transport.resume_reading()
        assert await handed.reads(4) == b"TWO."

    async def test_who_leaves_unasked_is_not_told_again_and_again(
        self, loop: Loop, master: Master, echo: Recorders
    ) -> None:
        """The protocol wants to go on though its client has closed its side."""
        echo.on(eof=lambda protocol: True)
        handed = master.hand(b"one ")
        protocol = await echo.made()
        await reaches(protocol.transport, "BUSY")
        handed.half_close()
        await until(lambda: "eof" in protocol.calls, "it is told")
        await turns(20)
        assert protocol.calls.count("eof") == 1
        protocol.transport.write(b"all the same")
        assert await handed.reads(12) == b"all the same"
        protocol.transport.close()
        await handed.ends()

    async def test_the_worker_leaves(self, loop: Loop, master: Master, echo: Recorders) -> None:
        """1. One is idle, one has half a request.  2. The worker leaves.  Result: each goes back when it is idle."""
        idle, half = master.hand(b"one."), master.hand(b"two ")
        await idle.reads(4)
        await master.answered(idle, half)
        master.receiver.stop_keeping()
        await turns(3)
        assert not idle.returned
        # As its protocol does in `shutdown`.
        echo.all[0].transport.rest()
        await until(lambda: idle.returned, "it is given back")
        await half.sends(b"three.")
        assert await half.reads(6) == b"THREE."
        await until(lambda: half.returned, "it is given back")

    async def test_a_large_response_makes_it_the_loops_for_good(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        size = 1 << 20

        def large(protocol: Recorder, data: bytes) -> None:
            protocol.transport.write(bytes(size))
            protocol.transport.rest()

        master.serve(recorders.on(data=large))
        handed = master.hand(b"one", sndbuf=4096)
        for _ in range(2):
            await handed.reads(size)
            assert not handed.returned
            await handed.sends(b"again")
        await handed.reads(size)
        assert phase(recorders.only.transport) == "REAL"
        assert handed.answers == [Kind.ACK]

    async def test_no_room_for_its_entry(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """The kernel refuses an entry: the loop's own transport goes on, and the other connections do not notice."""

        def refused(protocol: Any, data: bytes) -> None:
            # What is there already cannot be added.
            master.receiver.watch._busy.register(protocol.transport._fd, 0)  # type: ignore[union-attr]

        master.serve(recorders.on(data=refused))
        handed, other = master.connection(), master.connection()
        for each in (handed, other):
            each.arrive(b"one ")
        master.offer(handed, other)
        await until(lambda: len(recorders.all) == 2, "both are there")
        for protocol in recorders.all:
            await reaches(protocol.transport, "REAL")
        assert handed.answers == other.answers == [Kind.ACK]


class TestShared:
    async def test_it_is_kept_until_it_is_taken_back(
        self, loop: Loop, master: Master, echo: Recorders, shared: select.epoll
    ) -> None:
        handed = master.hand(b"one.")
        assert await handed.reads(4) == b"ONE."
        await until(lambda: handed.answers == [Kind.ACK | Kind.KEPT], "it is kept")
        await reaches(echo.only.transport, "KEPT")
        handed.arrive(b"two.")
        assert await handed.reads(4) == b"TWO."
        await until(lambda: mark(master, handed) == IDLE, "it is idle")
        # The worker is stuck: nothing of it runs between these lines.
        handed.arrive(b"three.")
        assert len(shared.poll(0)) == 1
        master.end.note(Flag.LOST, [handed.id])
        await until(lambda: handed.over, "it is dropped")
        assert handed.answers == [Kind.ACK | Kind.KEPT, Kind.DROPPED]
        assert handed.unread() == 6
        assert bytes(echo.only.data) == b"one.two."

    @pytest.mark.parametrize("last", [False, True])
    async def test_what_was_asked_when_the_worker_leaves(
        self, loop: Loop, master: Master, echo: Recorders, shared: select.epoll, last: bool
    ) -> None:
        """It is for others, unread; if there are none any more, it is answered here before the connection goes back."""
        asks, idle = master.hand(b"one."), master.hand(b"one.")
        for handed in (asks, idle):
            await handed.reads(4)
        for protocol in echo.all:
            await reaches(protocol.transport, "KEPT")
        await turns(3)
        # The worker is stuck: nothing of it runs between these lines.
        asks.arrive(b"two.")
        master.receiver.stop_keeping(last=last)
        if last:
            assert await asks.reads(4) == b"TWO."
        await until(lambda: asks.returned and idle.returned, "both are given back")
        assert asks.unread() == (0 if last else 4)

    async def test_a_claim_by_mistake_is_mended(
        self, loop: Loop, master: Master, echo: Recorders, shared: select.epoll
    ) -> None:
        handed = master.hand(b"one.")
        await handed.reads(4)
        await reaches(echo.only.transport, "KEPT")
        await turns(3)
        handed.arrive(b"two.")
        assert len(shared.poll(0)) == 1
        master.end.note(Flag.REARM, [handed.id])
        assert await handed.reads(4) == b"TWO."

    async def test_what_the_master_has_not_heard_of_it_cannot_claim(
        self, loop: Loop, master: Master, recorders: Recorders, shared: select.epoll, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """1. One waits for its application.  2. In the turn in which another begins and ends, it is answered too.

        Result: it can be claimed once KEPT was said, and not with the answers of that turn, which do not say it.
        """
        early = []
        keep = Watch.keep

        def kept(self: Watch, fd: int, transport: Any, known: bool) -> None:
            while master.read():
                pass
            early.extend([transport] if not any(kind & Kind.KEPT for kind in transport.handed.answers) else [])
            keep(self, fd, transport, known)

        def question(protocol: Recorder, data: bytes) -> None:
            protocol.transport.handed = master.connections[len(recorders.all)]
            answer(protocol, data)
            if data == b"short.":
                recorders.all[0].transport.write(b"LATE.")
                recorders.all[0].transport.rest()

        monkeypatch.setattr(Watch, "keep", kept)
        master.serve(recorders.on(data=question))
        late = master.hand(b"long")
        await master.answered(late)
        short = master.hand(b"short.")
        assert await short.reads(6) == b"SHORT."
        assert await late.reads(5) == b"LATE."
        await until(lambda: late.answers == [Kind.ACK, Kind.KEPT], "it is kept")
        await reaches(recorders.all[0].transport, "KEPT")
        await turns(3)
        assert early == []
        # And both are armed.
        late.arrive(b"x")
        short.arrive(b"x")
        assert len(shared.poll(0)) == 2

    @pytest.mark.parametrize("keeps", [False, True])
    async def test_who_waited_for_its_application_is_told_of_when_its_turn_ends(
        self, loop: Loop, master: Master, echo: Recorders, shared: select.epoll, keeps: bool
    ) -> None:
        """Whatever holds the loop right behind it must not hold its next request."""
        handed = master.hand(b"long")
        await master.answered(handed)
        master.deafen()
        master.receiver.keeping.keeps = keeps
        seen: list[bool] = []
        transport = echo.only.transport
        transport.write(b"LONG.")
        transport.rest()
        # Behind the end of that turn, and in front of whatever it has left for later.
        loop.call_soon(lambda: seen.append(master.read()))
        await until(lambda: seen, "the loop has turned")
        assert seen == [True]
        assert handed.answers == [Kind.ACK, Kind.KEPT if keeps else Kind.RETURNED]
        if keeps:
            handed.arrive(b"x")
            assert len(shared.poll(0)) == 1

    async def test_no_room_for_its_entry(
        self, loop: Loop, master: Master, recorders: Recorders, shared: select.epoll
    ) -> None:
        def refused(protocol: Any, data: bytes) -> None:
            answer(protocol, data)
            master.receiver.watch._kept.register(protocol.transport._fd, 0)  # type: ignore[union-attr]

        master.serve(recorders.on(data=refused))
        handed = master.hand(b"one.")
        await until(lambda: handed.returned, "it is given back")
        # What was there already is the test's to remove, under the number it had.
        number = recorders.only.transport._fd
        os.dup2(handed.copy.fileno(), number)
        shared.unregister(number)
        os.close(number)
        handed.arrive(b"two.")
        await turns(5)
        assert handed.unread() == 4

    async def test_what_was_idle_for_long_goes_back(
        self, loop: Loop, master: Master, echo: Recorders, shared: select.epoll
    ) -> None:
        handed = master.hand(b"one.")
        await handed.reads(4)
        await until(lambda: handed.returned, "it is given back")
        assert handed.answers[0] == Kind.ACK | Kind.KEPT


@pytest.mark.parametrize("leaves", [False, True])
async def test_who_has_asked_nothing_is_owed_no_answer(
    loop: Loop, master: Master, echo: Recorders, shared: select.epoll, leaves: bool
) -> None:
    """Should this worker die before the master is told, the client must not hear a 502 it has not asked for."""
    handed = master.connection()
    place = handed.copy.fileno()
    if leaves:
        handed.half_close()
    master.offer(handed)
    await master.answered(handed)
    assert handed.answers == [Kind.ACK | (Kind.CLOSED if leaves else Kind.SILENT)]
    assert master.receiver.marks[place] == (IDLE if leaves else UNTOUCHED)
    assert echo.all == []


@pytest.mark.parametrize("how", ["private", "shared"])
async def test_another_protocol_takes_it_for_good(
    loop: Loop, master: Master, recorders: Recorders, request: pytest.FixtureRequest, how: str
) -> None:
    """The master closes its copy of a WebSocket, and hears when it ends."""
    request.getfixturevalue(how)
    second = Recorders()

    def upgrade(protocol: Recorder, data: bytes) -> None:
        other = second()
        other.transport = protocol.transport
        protocol.transport.set_protocol(other)
        protocol.transport.write(b"welcome")

    master.serve(recorders.on(data=upgrade))
    handed = master.hand(b"upgrade")
    assert await handed.reads(7) == b"welcome"
    await until(lambda: handed.answers == [Kind.ACK | Kind.TAKEN], "it is taken")
    assert handed.copy.fileno() == -1
    await handed.sends(b"hello")
    await until(lambda: bytes(second.only.data) == b"hello", "it goes on")
    second.only.transport.close()
    assert await handed.rest() == b""
    await handed.ends()
    assert handed.answers == [Kind.ACK | Kind.TAKEN, Kind.CLOSED]


async def test_taken_and_ended_in_one_turn(loop: Loop, master: Master, recorders: Recorders, private: None) -> None:
    def upgrade(protocol: Recorder, data: bytes) -> None:
        protocol.transport.set_protocol(Recorders()())
        protocol.transport.abort()

    master.serve(recorders.on(data=upgrade))
    handed = master.hand(b"upgrade")
    await handed.ends()
    assert handed.answers == [Kind.ACK | Kind.CLOSED]


@pytest.mark.parametrize("how", ["private", "shared"])
async def test_paused_and_everything_taken_by_the_end_of_the_turn(
    loop: Loop, master: Master, recorders: Recorders, request: pytest.FixtureRequest, how: str
) -> None:
    """Too much was written, and the client has made room before the turn was over: it never becomes the loop's."""
    request.getfixturevalue(how)
    size = 1 << 18
    received = bytearray()

    def much(protocol: Recorder, data: bytes) -> None:
        protocol.transport.write(bytes(size))
        assert protocol.flow == ["pause"]
        while protocol.transport.get_write_buffer_size():
            received.extend(handed.has())
            protocol.transport._flush()

    master.serve(recorders.on(data=much))
    handed = master.hand(b"question", sndbuf=16384)
    await until(lambda: recorders.all and recorders.only.flow == ["pause", "resume"], "it may go on")
    assert phase(recorders.only.transport) == "BUSY"
    assert not was_real(recorders.only.transport)
    received += await handed.reads(size - len(received))
    handed.client.close()
    await handed.ends()
