"""The receiver of a worker that serves requests in threads: what finds none free is left, unread, to others."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clusterserve.core.records import FULL, Kind
from clusterserve.worker.threads import Threads
from tests.helpers.loops import turns, until
from tests.worker.harness import Handed, Master, Recorder, Recorders

Loop = asyncio.AbstractEventLoop


class Gate:
    """Jobs that run until they are let go, one after another."""

    def __init__(self, loop: Loop, threads: Threads) -> None:
        self._loop = loop
        self._threads = threads
        self._running: list[threading.Event] = []

    def begin(self) -> None:
        event = threading.Event()
        self._running.append(event)
        self._threads.begin(self._loop, lambda: event.wait() and None)

    async def end(self) -> None:
        before = self._threads.busy
        self._running.pop(0).set()
        await until(lambda: self._threads.busy < before, "a thread is free")


@pytest.fixture
def threads() -> Threads:
    return Threads(1)


@pytest.fixture
def gate(loop: Loop, threads: Threads) -> Gate:
    return Gate(loop, threads)


def respond(protocol: Recorder, data: bytes) -> None:
    protocol.transport.write(data.upper())
    protocol.transport.rest()


@pytest.fixture
def echo(master: Master, recorders: Recorders) -> Recorders:
    master.serve(recorders.on(data=respond))
    return recorders


@pytest.fixture
def private(master: Master, threads: Threads) -> None:
    """`--dispatch connection`."""
    master.receiver.borrow(None, keep=True, head_timeout=0.0)
    master.receiver.keeping.employ(threads)


@pytest.fixture
def shared(master: Master, threads: Threads) -> Iterator[select.epoll]:
    """`--dispatch auto`."""
    theirs = select.epoll()
    master.receiver.borrow(select.epoll.fromfd(os.dup(theirs.fileno())), keep=True, head_timeout=0.0)
    master.receiver.keeping.employ(threads)
    yield theirs
    theirs.close()


def board(master: Master) -> list[int]:
    return list(master.receiver.counters[2:4])


@pytest.mark.usefixtures("private")
async def test_the_board_says_how_many_are_occupied(master: Master, gate: Gate) -> None:
    assert board(master) == [0, 1]
    gate.begin()
    assert board(master) == [1, 1]
    gate.begin()
    assert board(master) == [2, 1]
    await gate.end()
    assert board(master) == [1, 1]
    # Somebody waited for it: it is not free.
    await turns(5)
    assert master.vacancies == 0
    await gate.end()
    assert board(master) == [0, 1]
    await until(lambda: master.vacancies == 1, "the master is told")


@pytest.mark.usefixtures("shared")
async def test_an_offer_that_finds_no_thread_goes_back_unread(master: Master, gate: Gate, echo: Recorders) -> None:
    gate.begin()
    handed = master.hand(b"one")
    await master.answered(handed)
    assert handed.answers == [Kind(FULL)]
    assert handed.unread() == 3
    assert echo.all == []
    await gate.end()


@pytest.mark.usefixtures("shared")
async def test_but_not_when_nobody_else_is_left(master: Master, gate: Gate, echo: Recorders) -> None:
    gate.begin()
    master.receiver.keeping.take_all()
    handed = master.hand(b"one")
    assert await handed.reads(3) == b"ONE"
    await gate.end()


@pytest.mark.usefixtures("shared")
async def test_two_of_one_turn_are_not_promised_the_same_thread(master: Master, echo: Recorders) -> None:
    both = [master.connection(), master.connection()]
    for handed in both:
        handed.arrive(b"one")
    master.offer(*both)
    await master.answered(*both)
    assert await both[0].reads(3) == b"ONE"
    assert both[1].answers == [Kind(FULL)]


async def kept(master: Master) -> Handed:
    """A connection between two requests."""
    handed = master.hand(b"one")
    assert await handed.reads(3) == b"ONE"
    await until(lambda: handed.answers, "it is answered")
    assert not handed.over
    return handed


@pytest.mark.usefixtures("shared")
async def test_the_next_request_of_one_that_was_kept_goes_back_unread(
    master: Master, gate: Gate, echo: Recorders
) -> None:
    handed = await kept(master)
    gate.begin()
    handed.arrive(b"two")
    await until(lambda: handed.returned, "it is given back")
    assert handed.unread() == 3
    await gate.end()


@pytest.mark.usefixtures("private")
async def test_and_so_it_does_where_connections_are_for_one_worker(master: Master, gate: Gate, echo: Recorders) -> None:
    handed = await kept(master)
    handed.arrive(b"two")
    assert await handed.reads(3) == b"TWO"
    gate.begin()
    handed.arrive(b"three")
    await until(lambda: handed.returned, "it is given back")
    assert handed.unread() == 5
    await gate.end()


@pytest.mark.usefixtures("shared")
async def test_one_whose_threads_are_all_occupied_keeps_nothing(master: Master, gate: Gate, echo: Recorders) -> None:
    held: list[Any] = []

    def hold(protocol: Recorder, data: bytes) -> None:
        held.append(protocol)
        gate.begin()

    echo.on(data=hold)
    handed = master.hand(b"one")
    await until(lambda: held, "it is being served")
    assert not master.receiver.keeping.keeps
    respond(held[0], b"one")
    await until(lambda: handed.returned, "it is given back")
    await gate.end()
    assert master.receiver.keeping.keeps


@pytest.mark.usefixtures("private")
async def test_one_that_has_become_the_loops_goes_back_after_its_response(master: Master, echo: Recorders) -> None:
    """The loop would read its next request, whether there is a thread for it or not."""
    echo.on(data=lambda protocol, data: respond(protocol, data * 1_000_000))
    handed = master.hand(b"one", sndbuf=4096)
    assert len(await handed.reads(3_000_000)) == 3_000_000
    await until(lambda: handed.returned, "it is given back")


@pytest.mark.usefixtures("shared")
async def test_what_counts_is_the_time_in_the_thread(master: Master, gate: Gate, loop: Loop) -> None:
    for _ in range(30):
        gate.begin()
        # Longer than what is worth keeping, as a request of an expensive application.
        await asyncio.sleep(0.002)
        await gate.end()
    assert not master.receiver.keeping.keeps


@pytest.mark.usefixtures("shared")
async def test_one_that_leaves_keeps_nothing_more(master: Master, gate: Gate) -> None:
    master.receiver.stop_keeping()
    gate.begin()
    await gate.end()
    assert not master.receiver.keeping.keeps
