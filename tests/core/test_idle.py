"""The distributor and connections that were given back; the machine of test_distributor.py has them as well."""

from __future__ import annotations

import pytest

from clusterserve.core.connection import Connection, State
from clusterserve.core.distributor import KEEP_ALIVE, Distributor
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
    assert distributor.expired(9.9 + KEEP_ALIVE) == []
    assert distributor.expired(10.0 + KEEP_ALIVE) == [first]
    assert distributor.expired(10.0 + KEEP_ALIVE) == []
    assert distributor.wake_at(15.0) == 12.0 + KEEP_ALIVE
    assert distributor.expired(99.0) == [second]
    assert distributor.wake_at(99.0) is None
    # Both are still parked: what has arrived meanwhile decides.
    distributor.readable(1)
    assert distributor.hung_up(2) is second
    assert second.state is State.GONE


def test_who_never_spoke_does_not_expire(distributor: Distributor) -> None:
    distributor.accepted(Connection(1, 101, 1), waiting=False)
    assert distributor.expired(1e9) == []
    assert distributor.wake_at(0.0) is None


def test_who_speaks_begins_anew(distributor: Distributor) -> None:
    give_back(distributor, 1, 10.0)
    distributor.readable(1)
    assert distributor.wake_at(10.0) is None
    ((worker, connection),) = distributor.distribute(14.0)
    distributor.answer(worker, Kind.ACK, 1, 0, 14.0)
    assert distributor.expired(99.0) == []
    distributor.answer(worker, Kind.RETURNED, 1, 0, 100.0)
    assert distributor.expired(100.0) == []
    assert distributor.expired(100.0 + KEEP_ALIVE) == [connection]


def test_who_hangs_up_and_whose_listener_goes_is_forgotten(distributor: Distributor) -> None:
    give_back(distributor, 1, 10.0)
    other = give_back(distributor, 2, 10.0)
    distributor.hung_up(1)
    assert distributor.remove_handle(1) == [other]
    assert distributor.expired(99.0) == []


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
