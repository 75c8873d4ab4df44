"""Connections from one distributor to another's: none is lost, and each has waited for as long as it has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.bequest import bequeath, inherit
from clusterserve.core.connection import Connection, State
from clusterserve.core.distributor import Distributor
from clusterserve.core.handover import Waits
from clusterserve.core.policies import RoundRobin
from clusterserve.core.records import Kind


def distributor(*keys: int) -> Distributor:
    made = Distributor(keep_alive=5.0, head=30.0)
    for key in keys:
        made.add_handle(key, RoundRobin(), client_speaks_first=True)
    return made


def test_what_nobody_has_is_taken_out() -> None:
    old = distributor(1, 2)
    queued, silent, other = Connection(1, 11, 1, since=2.0), Connection(2, 12, 1, since=3.0), Connection(3, 13, 2)
    old.accepted(queued, waiting=True)
    old.accepted(silent, waiting=False)
    old.accepted(other, waiting=True)
    worker = old.add_worker(1, 0)
    served = Connection(4, 14, 1, since=1.0)
    old.attach(1, 2)
    assert [connection for _, connection in old.distribute(4.0)] == [other]
    old.attach(1, 1)
    old.accepted(served, waiting=True)
    assert [connection for _, connection in old.distribute(4.0)] == [queued, served]
    old.answer(worker, Kind.ACK | Kind.RETURNED, 4, 0, 6.0)
    assert old.recalled(worker, [1]) == []
    assert bequeath(old, {1}, 8.0) == [
        (queued, Waits.WORKER, 6.0),
        (silent, Waits.WORD, 5.0),
        (served, Waits.REQUEST, 2.0),
    ]
    assert {each.state for each in (queued, silent, served)} == {State.GONE}
    assert (old.queued, other.state, bequeath(old, {1}, 8.0)) == (0, State.OFFERED, [])
    assert old.statistics().parked == 0


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.booleans()), max_size=12), st.sets(st.sampled_from([1, 2, 3])))
def test_what_is_left_out_stays(arrivals: list[tuple[int, bool]], listeners: set[int]) -> None:
    """Of some listeners everything goes, in the order in which it came, and of the others nothing."""
    old = distributor(1, 2, 3)
    connections = [Connection(id, 10 + id, listener) for id, (listener, _) in enumerate(arrivals)]
    for connection, (_, waiting) in zip(connections, arrivals, strict=True):
        old.accepted(connection, waiting=waiting)
    found = bequeath(old, listeners, 5.0)
    queued = [each.id for each, waits, _ in found if waits is Waits.WORKER]
    assert queued == [id for id, (listener, waiting) in enumerate(arrivals) if waiting and listener in listeners]
    theirs = {connection.id for connection in connections if connection.listener in listeners}
    assert {each.id for each, _, _ in found} == theirs
    for connection, (listener, waiting) in zip(connections, arrivals, strict=True):
        stays = State.QUEUED if waiting else State.PARKED
        assert connection.state is (State.GONE if listener in listeners else stays)
    assert old.queued == sum(waiting and listener not in listeners for listener, waiting in arrivals)


def test_time_goes_on() -> None:
    new = distributor(7)
    new.parking.idle(mine := Connection(1, 21, 7), 100.0)
    waits = Connection(2, 22, 7)
    idle, silent = Connection(3, 23, 7), Connection(4, 24, 7)
    inherit(new, waits, Waits.WORKER, 3.0, 100.0)
    inherit(new, idle, Waits.REQUEST, 4.0, 100.0)
    inherit(new, silent, Waits.WORD, 29.5, 100.0)
    assert (waits.since, waits.state, new.queued) == (97.0, State.QUEUED, 1)
    assert new.parking.expired(100.4) == []
    # Whoever has been idle for longer is over first, though it came later.
    assert new.parking.expired(100.6) == [silent]
    assert new.parking.expired(101.0) == [idle]
    assert new.parking.expired(105.0) == [mine]
    # Named once, it may still be handed on: what it has sent is under way.
    assert [waits for _, waits, _ in bequeath(new, {7}, 106.0)] == [Waits.WORKER, Waits.WORD, Waits.WORD, Waits.WORD]
