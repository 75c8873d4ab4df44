"""The distributor and connections that were given back; the machine of test_distributor.py has them as well."""

from __future__ import annotations

import time

import pytest

from clusterserve.core.connection import Connection, State
from clusterserve.core.distributor import Distributor
from clusterserve.core.parking import KEEP_ALIVE, Parking
from clusterserve.core.policies import Hash, RoundRobin
from clusterserve.core.records import Kind


@pytest.fixture
def distributor() -> Distributor:
    distributor = Distributor()
    distributor.add_handle(1, RoundRobin(), client_speaks_first=True)
    distributor.add_worker(1, 0)
    distributor.attach(1, 1)
    return distributor


def give_back(distributor: Distributor, id: int, now: float, kind: int = Kind.ACK | Kind.RETURNED) -> Connection:
    connection = Connection(id, 100 + id, 1)
    distributor.accepted(connection, waiting=True)
    ((worker, offered),) = distributor.distribute(now)
    assert offered is connection
    assert distributor.answer(worker, kind, id, 0, now) is connection
    return connection


def test_given_back_is_parked_and_nobodys(distributor: Distributor) -> None:
    connection = give_back(distributor, 1, 10.0)
    assert (connection.state, connection.worker) == (State.PARKED, 0)
    assert distributor.statistics().parked == 1
    distributor.readable(1)
    assert [offered for _, offered in distributor.distribute(10.0)] == [connection]


def test_the_ones_that_expire_are_named_once_and_in_time(distributor: Distributor) -> None:
    first, second = give_back(distributor, 1, 10.0), give_back(distributor, 2, 12.0)
    assert distributor.wake_at(12.0) == 10.0 + KEEP_ALIVE
    assert distributor.parking.expired(9.9 + KEEP_ALIVE) == []
    assert distributor.parking.expired(10.0 + KEEP_ALIVE) == [first]
    assert distributor.parking.expired(10.0 + KEEP_ALIVE) == []
    assert distributor.wake_at(15.0) == 12.0 + KEEP_ALIVE
    assert distributor.parking.expired(99.0) == [second]
    assert distributor.wake_at(99.0) is None
    # Both are still parked: what has arrived meanwhile decides.
    distributor.readable(1)
    assert distributor.hung_up(2) is second
    assert second.state is State.GONE


def test_who_never_spoke_does_not_expire(distributor: Distributor) -> None:
    distributor.accepted(Connection(1, 101, 1), waiting=False)
    assert distributor.parking.expired(1e9) == []
    assert distributor.wake_at(0.0) is None


def test_who_speaks_begins_anew(distributor: Distributor) -> None:
    give_back(distributor, 1, 10.0)
    distributor.readable(1)
    assert distributor.wake_at(10.0) is None
    ((worker, connection),) = distributor.distribute(14.0)
    distributor.answer(worker, Kind.ACK, 1, 0, 14.0)
    assert distributor.parking.expired(99.0) == []
    distributor.answer(worker, Kind.RETURNED, 1, 0, 100.0)
    assert distributor.parking.expired(100.0) == []
    assert distributor.parking.expired(100.0 + KEEP_ALIVE) == [connection]


def test_who_hangs_up_and_whose_listener_goes_is_forgotten(distributor: Distributor) -> None:
    give_back(distributor, 1, 10.0)
    other = give_back(distributor, 2, 10.0)
    distributor.hung_up(1)
    assert distributor.remove_handle(1) == [other]
    assert distributor.parking.expired(99.0) == []


def test_resize_is_for_the_policies_that_care() -> None:
    distributor = Distributor()
    policy = Hash(2)
    distributor.add_handle(1, policy, client_speaks_first=True)
    distributor.add_handle(2, RoundRobin(), client_speaks_first=True)
    distributor.add_worker(1, 0)
    distributor.attach(1, 1)
    lanes = set()
    for slots in (2, 5):
        distributor.resize(slots)
        connections = [Connection(n, n, 1, bytes(15) + bytes([n])) for n in range(60)]
        lanes.add(len({policy.lane(connection) for connection in connections}))
    assert lanes == {2, 5}


def test_who_waits_for_a_slot_that_goes_waits_for_another_then() -> None:
    """1. Clients of two slots wait for workers that do not listen yet.  2. There is one slot.  Result: all wait for it,
    in the order of their arrival."""
    distributor = Distributor()
    distributor.add_handle(1, Hash(2), client_speaks_first=True)
    for n in range(1, 21):
        distributor.accepted(Connection(n, n, 1, bytes(15) + bytes([n])), waiting=True)
    assert {len(lane) > 0 for lane in distributor.handles[1].lanes.values()} == {True}
    assert len(distributor.handles[1].lanes) == 2
    distributor.resize(1)
    distributor.add_worker(1, 0)
    distributor.attach(1, 1)
    assert [connection.id for _, connection in distributor.distribute(0.0)] == list(range(1, 21))
    assert distributor.queued == 0


def test_a_listener_that_is_opened_later_knows_the_new_size() -> None:
    distributor = Distributor()
    distributor.resize(4)
    policy = Hash(2)
    distributor.add_handle(1, policy, client_speaks_first=True)
    assert len({policy.lane(Connection(n, n, 1, bytes(15) + bytes([n]))) for n in range(60)}) == 4


# ── what becomes of those that wait ─────────────────────────────────────────────────────────────────────────────────


def test_who_waits_too_long_for_a_worker_is_taken_out_of_the_queue() -> None:
    distributor = Distributor(queue=30.0)
    distributor.add_handle(1, RoundRobin(), client_speaks_first=True)
    old, young = Connection(1, 101, 1, since=10.0), Connection(2, 102, 1, since=15.0)
    for connection in (old, young):
        distributor.accepted(connection, waiting=True)
    assert distributor.wake_at(15.0) == 40.0
    assert distributor.waited_too_long(39.9) == []
    assert distributor.waited_too_long(40.0) == [old]
    assert (old.state, young.state, distributor.queued) == (State.GONE, State.QUEUED, 1)
    assert distributor.wake_at(40.0) == 45.0


def test_without_a_limit_they_wait_for_ever(distributor: Distributor) -> None:
    distributor.drain_worker(1)
    distributor.accepted(Connection(1, 101, 1), waiting=True)
    assert distributor.waited_too_long(1e9) == []
    assert distributor.queued == 1


def test_who_must_speak_first_has_so_long_for_it() -> None:
    distributor = Distributor(head=10.0)
    distributor.add_handle(1, RoundRobin(), client_speaks_first=True)
    silent = Connection(1, 101, 1, since=5.0)
    distributor.accepted(silent, waiting=False)
    assert distributor.wake_at(5.0) == 15.0
    assert distributor.parking.expired(14.9) == []
    assert distributor.parking.expired(15.0) == [silent]


def test_the_longest_idle_are_the_first_to_go_when_room_is_short(distributor: Distributor) -> None:
    first, second, _ = [give_back(distributor, id, 10.0 + id) for id in (1, 2, 3)]
    # One that was never served is none of them.
    distributor.accepted(Connection(4, 104, 1), waiting=False)
    assert distributor.parking.longest_idle(2) == [first, second]
    assert len(distributor.parking.longest_idle(9)) == 3


@pytest.mark.parametrize("listens", [True, False])
def test_what_a_dead_worker_kept_is_idle(distributor: Distributor, listens: bool) -> None:
    connection = Connection(1, 101, 1)
    distributor.accepted(connection, waiting=True)
    ((worker, _),) = distributor.distribute(10.0)
    assert distributor.answer(worker, Kind.ACK | Kind.KEPT, 1, 0, 10.0, 77) is None
    assert worker.kept == {77: connection}
    assert distributor.remove_worker(1) == [connection]
    if not listens:
        distributor.remove_handle(1)
    assert distributor.idle(connection, 20.0) is listens
    assert connection.state is (State.PARKED if listens else State.GONE)
    assert distributor.wake_at(20.0) == (20.0 + KEEP_ALIVE if listens else None)


def test_a_number_that_is_anothers_already_stays_with_it(distributor: Distributor) -> None:
    """1. A worker closes one that it keeps, and keeps another under the same number.  2. It tells of the other first.
    Result: the end of the first takes nothing from the other.
    """
    first, other = Connection(1, 101, 1), Connection(2, 102, 1)
    for connection in (first, other):
        distributor.accepted(connection, waiting=True)
    ((worker, _), _) = distributor.distribute(10.0)
    for connection in (first, other):
        distributor.answer(worker, Kind.ACK | Kind.KEPT, connection.id, 0, 10.0, 77)
    assert distributor.answer(worker, Kind.CLOSED, 1, 0, 10.0) is first
    assert worker.kept == {77: other}


def test_thousands_that_another_master_had_do_not_take_long() -> None:
    """And they are due in the order of their time, whatever comes in between."""
    parking = Parking(KEEP_ALIVE, 0.0)
    began = time.process_time()
    for number in range(20_000):
        # Two that come out of order, as those do that a worker has given back meanwhile.
        since = 1.0 if number in (7_000, 14_000) else 2.0 + number * 1e-4
        parking.inherited(Connection(2 * number + 1, 0, 1), since)
        parking.idle(Connection(2 * number + 2, 0, 1), 4.0 + number * 1e-4)
    # Every one of them sorted anew is 20 s.
    assert time.process_time() - began < 5.0
    first, second, third = parking.longest_idle(3)
    assert [first.id, second.id, third.id] == [14_001, 28_001, 1]
    assert next(iter(sorted(parking.deadlines()))) == 1.0 + KEEP_ALIVE
    assert [each.id for each in parking.expired(1.0 + KEEP_ALIVE)] == [14_001, 28_001]
    assert parking.since(1, 3.0) == (True, 1.0)
    assert len(parking.expired(99.0)) == 40_000 - 2
    assert list(parking.deadlines()) == []


def test_the_longest_idle_of_both_kinds_go_first_when_room_is_short() -> None:
    parking = Parking(KEEP_ALIVE, 0.0)
    for id, since in ((1, 10.0), (2, 12.0)):
        parking.idle(Connection(id, 0, 1), since)
    for id, since in ((3, 9.0), (4, 11.0)):
        parking.inherited(Connection(id, 0, 1), since)
    assert [each.id for each in parking.longest_idle(3)] == [3, 1, 4]
