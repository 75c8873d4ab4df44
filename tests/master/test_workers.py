"""The books of `cluster.workers`, and a worker's state in the handlers of each event."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest

from clusterserve.core.address import Address
from clusterserve.core.events import (
    CameOnline,
    Disconnected,
    Exited,
    Forked,
    StartedDraining,
    StartedListening,
    WentWrong,
    WorkerName,
)
from clusterserve.master.worker import Orders, Worker, signal_number
from clusterserve.master.workers import Workers

NAME = WorkerName(3, 1, 4711)


class Ordered:
    """Notes what is ordered."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def streams_of(self, worker: int) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.all.append((name, *arguments))


@pytest.fixture
def ordered() -> Ordered:
    return Ordered()


@pytest.fixture
def workers(ordered: Ordered) -> Iterator[Workers]:
    books = Workers(cast("Orders", ordered))
    books.home = asyncio.new_event_loop()
    yield books
    books.home.close()


def test_one_life(workers: Workers, ordered: Ordered) -> None:
    forked = Forked(NAME)
    worker = workers.about(forked, False)
    assert dict(workers) == {}
    workers.tell(worker, forked)
    assert dict(workers) == {3: worker}
    assert repr(worker) == "<Worker 3 slot 1 pid 4711 none>"
    states = []
    for event in (
        CameOnline(NAME), StartedListening(NAME, Address("/x")), StartedDraining(NAME), Disconnected(NAME),
        Exited(NAME, 0, None),
    ):  # fmt: skip
        assert workers.about(event, False) is worker
        workers.tell(worker, event)
        states.append((worker.state, worker.is_connected(), worker.is_dead(), worker.exited_after_disconnect))
    assert states == [
        ("online", True, False, None), ("listening", True, False, None), ("draining", True, False, True),
        ("disconnected", False, False, True), ("dead", False, True, True),
    ]  # fmt: skip
    assert dict(workers) == {}
    assert worker.process is not None
    assert (worker.process.returncode, worker.process.signal) == (0, None)
    # Nothing is ordered of the dead.
    worker.disconnect()
    worker.kill()
    worker.destroy()
    assert ordered.all == []


def test_one_that_was_told_to_go_while_it_booted_stays_on_its_way(workers: Workers) -> None:
    worker = workers.about(Forked(NAME), False)
    for event in (StartedDraining(NAME), CameOnline(NAME)):
        workers.tell(worker, event)
    assert worker.state == "draining"


def test_a_signal_is_no_order_to_disconnect(workers: Workers, ordered: Ordered) -> None:
    worker = workers.about(Forked(NAME), False)
    worker.kill("TERM")
    # An application takes it for one, and asks.
    for event in (StartedDraining(NAME), Disconnected(NAME), Exited(NAME, 0, None)):
        workers.tell(worker, event)
    assert worker.exited_after_disconnect is False
    assert ordered.all == [("signal_worker", 3, 15)]


def test_one_that_never_lived_is_not_among_them(workers: Workers) -> None:
    events: list[WentWrong | Exited] = [WentWrong(NAME, OSError("no")), Exited(NAME, None, None)]
    told: list[Worker] = []

    def fork() -> int:
        told.extend(workers.about(event, False) for event in events)
        return NAME.id

    worker = workers.forked(fork)
    assert told == [worker, worker]
    # Another thread has told of its end before `fork` came to enter it.
    for event in events:
        workers.tell(worker, event)
    workers.enter(worker)
    assert dict(workers) == {}
    assert worker.process is None


def test_walking_through_them_while_they_change(workers: Workers) -> None:
    seen = []
    for id in (2, 1):
        worker = workers.about(Forked(WorkerName(id, id, id)), False)
        workers.enter(worker)
    for id, worker in workers.items():
        seen.append(id)
        workers.tell(worker, Exited(WorkerName(id, id, id), 0, None))
    assert seen == [1, 2]
    assert len(workers) == 0


def test_signals_by_name_and_number() -> None:
    assert [signal_number(each) for each in ("SIGKILL", "KILL", 9)] == [9, 9, 9]
    for nonsense in ("SIG", "kill", 4711):
        with pytest.raises(ValueError, match="there is no signal"):
            signal_number(nonsense)
