"""Workers that serve requests in threads: one queue for all threads of all of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.connection import Connection, State
from clusterserve.core.distributor import Distributor
from clusterserve.core.policies import RoundRobin
from clusterserve.core.records import FREE, FULL, Kind
from clusterserve.core.worker import EXPENSIVE


def rig(threads: int, workers: int = 2) -> Distributor:
    distributor = Distributor(narrows=True)
    distributor.add_handle(1, RoundRobin(), client_speaks_first=True)
    for number in range(workers):
        record = distributor.add_worker(number + 1, number)
        distributor.attach(number + 1, 1)
        distributor.occupied(record, 0, threads)
    return distributor


def accept(distributor: Distributor, *ids: int) -> None:
    for id in ids:
        distributor.accepted(Connection(id, 100 + id, 1), waiting=True)


def distribute(distributor: Distributor) -> list[tuple[int, int]]:
    return [(worker.id, connection.id) for worker, connection in distributor.distribute(0.0)]


def waiting(distributor: Distributor) -> list[int]:
    return [connection.id for lane in distributor.handles[1].lanes.values() for connection in lane]


def test_a_worker_gets_as_many_as_it_has_threads_and_no_more() -> None:
    distributor = rig(threads=2)
    accept(distributor, 1, 2, 3, 4, 5)
    assert distribute(distributor) == [(1, 1), (2, 2), (1, 3), (2, 4)]
    assert waiting(distributor) == [5]
    # Acknowledged, so begun, and its board says so.
    worker = distributor.workers[1]
    distributor.answer(worker, Kind.ACK, 1, 0, 0.0)
    distributor.occupied(worker, 1, 2)
    assert distribute(distributor) == []
    distributor.answer(worker, Kind.RETURNED, 1, 0, 0.0)
    # Its response is complete, its thread is not done.
    assert distribute(distributor) == []
    distributor.occupied(worker, 0, 2)
    assert distribute(distributor) == [(1, 5)]


def test_one_whose_connections_are_expensive_still_has_all_its_threads() -> None:
    distributor = rig(threads=3, workers=1)
    accept(distributor, 1, 2, 3)
    assert distribute(distributor) == [(1, 1), (1, 2), (1, 3)]
    worker = distributor.workers[1]
    distributor.answer(worker, Kind.ACK | Kind.CLOSED, 1, EXPENSIVE + 1, 0.0)
    accept(distributor, 4, 5)
    assert distribute(distributor) == [(1, 4)]


def test_what_found_no_thread_goes_to_whoever_has_one_and_nobody_rests() -> None:
    distributor = rig(threads=1)
    accept(distributor, 1, 2, 3)
    assert distribute(distributor) == [(1, 1), (2, 2)]
    # A request that it kept, or read in pieces, was first.
    busy, free = distributor.workers[1], distributor.workers[2]
    distributor.occupied(busy, 1, 1)
    assert distributor.answer(busy, FULL, 1, 0, 0.0) is None
    assert waiting(distributor) == [1, 3]
    assert busy.resting == 0.0
    distributor.answer(free, Kind.ACK | Kind.CLOSED, 2, 0, 0.0)
    assert distribute(distributor) == [(2, 1)]


def test_what_found_no_thread_and_has_no_listener_any_more_is_for_the_shell_to_close() -> None:
    distributor = rig(threads=1)
    accept(distributor, 1)
    distribute(distributor)
    distributor.remove_handle(1)
    connection = distributor.answer(distributor.workers[1], FULL, 1, 0, 0.0)
    assert connection is not None
    assert connection.state is State.GONE


@pytest.mark.parametrize("stalled", [True, False])
def test_a_thread_that_is_free_again_is_a_sign_of_life(stalled: bool) -> None:
    distributor = rig(threads=1)
    worker = distributor.workers[1]
    worker.stalled = stalled
    assert distributor.answer(worker, FREE, 0, 0, 7.0) is None
    assert not worker.stalled
    assert worker.progress == 7.0


@dataclass
class Pool:
    """A worker: what lies in its channel, what runs, and requests of connections that it has kept."""

    threads: int
    unread: deque[int] = field(default_factory=deque)
    running: list[int] = field(default_factory=list)
    own: int = 0

    @property
    def busy(self) -> int:
        return len(self.running) + self.own


STEPS = st.lists(st.tuples(st.sampled_from(["accept", "read", "end", "own", "own ends"]), st.integers(0, 2)))


@given(STEPS, st.integers(1, 3))
def test_no_request_waits_while_a_thread_is_free(steps: list[tuple[str, int]], threads: int) -> None:
    """Workers read, begin and end whenever they like; now and then one serves a request of its own first."""
    distributor = rig(threads, workers=3)
    pools = {id: Pool(threads) for id in distributor.workers}
    accepted = 0
    for what, number in steps:
        id = number + 1
        worker, pool = distributor.workers[id], pools[id]
        if what == "accept":
            accepted += 1
            accept(distributor, accepted)
        elif what == "read" and pool.unread:
            one = pool.unread.popleft()
            if pool.busy < threads:
                pool.running.append(one)
                distributor.answer(worker, Kind.ACK, one, 0, 0.0)
            else:
                distributor.answer(worker, FULL, one, 0, 0.0)
        elif what == "own" and pool.busy < threads:
            pool.own += 1
        elif what in ("end", "own ends"):
            was = pool.busy
            if what == "end" and pool.running:
                distributor.answer(worker, Kind.CLOSED, pool.running.pop(), 0, 0.0)
            elif what == "own ends" and pool.own:
                pool.own -= 1
            if was == threads > pool.busy:
                distributor.answer(worker, FREE, 0, 0, 0.0)
            elif was > pool.busy and not pool.unread:
                # Nobody is told, and nobody need be: it was not full.
                assert distributor.queued == 0
        for each, record in distributor.workers.items():
            distributor.occupied(record, pools[each].busy, threads)
        before = waiting(distributor)
        offers = distribute(distributor)
        assert [connection for _, connection in offers] == before[: len(offers)]
        for to, connection in offers:
            pools[to].unread.append(connection)
        for record in distributor.workers.values():
            assert len(record.unacked) <= threads
            assert not (distributor.queued and len(record.unacked) + record.busy < threads)
