"""The distributor: what each fact does, and design.md's invariants under any order of facts.

The machine at the end plays the shell, the clients and the workers.  It keeps its own account of where every connection
is, and compares after every step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clusterserve.core import handle as handles
from clusterserve.core import lateness as module
from clusterserve.core import worker as workers
from clusterserve.core.connection import Connection, State
from clusterserve.core.distributor import REFUSED_PAUSE, Distributor, Statistics
from clusterserve.core.lateness import AHEAD_PATIENCE, PATIENCE, RETRY
from clusterserve.core.policies import TURN, Candidate, Hash, Policy, RoundRobin, Waiting, make_policy
from clusterserve.core.records import FREE, FULL, Kind
from clusterserve.core.worker import EXPENSIVE, Worker
from clusterserve.errors import PolicyError, ProtocolError

T = TypeVar("T")

ENDINGS = {Kind.CLOSED: State.GONE, Kind.TAKEN: State.GONE, Kind.RETURNED: State.PARKED}
#: What a worker may say about a connection it was offered, and about one it is serving.
_OVER = (*ENDINGS, *(Kind.ACK | ending for ending in ENDINGS))
OF_OFFERED = {
    int(kind) for kind in (Kind.ACK, Kind.ACK | Kind.KEPT, Kind.ACK | Kind.SILENT, Kind.REFUSED, FULL, *_OVER)
}
OF_BORROWED = {int(kind) for kind in (Kind.KEPT, *_OVER)}

CLIENTS = [bytes(15) + bytes([number]) for number in range(12)]


def rig(workers: int = 2, policy: Policy | None = None, key: int = 1) -> Distributor:
    """A distributor with one listener and workers 1, 2, … attached to it."""
    distributor = Distributor()
    distributor.add_handle(key, policy or RoundRobin(), client_speaks_first=False)
    for number in range(workers):
        distributor.add_worker(number + 1, number)
        distributor.attach(number + 1, key)
    return distributor


def accept(distributor: Distributor, *ids: int, listener: int = 1, client: bytes = b"") -> list[Connection]:
    connections = [Connection(id, 100 + id, listener, client) for id in ids]
    for connection in connections:
        distributor.accepted(connection, waiting=True)
    return connections


def distribute(distributor: Distributor, now: float = 0.0) -> list[tuple[int, int]]:
    """(worker, connection) of each offer."""
    return [(worker.id, connection.id) for worker, connection in distributor.distribute(now)]


def say(distributor: Distributor, worker: int, kind: int, id: int, now: float = 0.0) -> Connection | None:
    return distributor.answer(distributor.workers[worker], kind, id, 0, now)


def waiting(distributor: Distributor, key: int = 1) -> list[int]:
    """The ids queued for a listener, lane after lane."""
    return [connection.id for lane in distributor.handles[key].lanes.values() for connection in lane]


def where(distributor: Distributor) -> Iterator[tuple[Connection, str]]:
    """Every connection the distributor knows, with each place it is in."""
    for handle in distributor.handles.values():
        for lane in handle.lanes.values():
            for connection in lane:
                yield connection, "lane"
    for connection in distributor.parking.connections.values():
        yield connection, "parked"
    for worker in distributor.workers.values():
        for connection in worker.unacked.values():
            yield connection, f"offered to {worker.id}"
        for connection in worker.borrowed.values():
            yield connection, f"{'kept' if connection.state is State.KEPT else 'borrowed'} by {worker.id}"


def everything(distributor: Distributor) -> object:
    """All there is to know, in a form that can be compared."""
    connections = [
        (place, *(getattr(connection, name) for name in Connection.__slots__))
        for connection, place in where(distributor)
    ]
    workers = [
        {name: list(value) if isinstance(value := getattr(worker, name), dict | set) else value for name in names}
        for worker, names in ((worker, Worker.__slots__) for worker in distributor.workers.values())
    ]
    return connections, workers, distributor.queued, list(distributor.handles)


class TestTheQueue:
    def test_a_connection_that_waits_is_offered_in_its_turn(self) -> None:
        distributor = rig()
        connections = accept(distributor, 1, 2, 3)
        assert distributor.queued == 3
        assert distribute(distributor) == [(1, 1), (2, 2), (1, 3)]
        assert distributor.queued == 0
        assert [connection.state for connection in connections] == [State.OFFERED] * 3
        assert [connection.worker for connection in connections] == [1, 2, 1]

    def test_a_silent_one_is_parked_until_it_speaks(self) -> None:
        distributor = rig(workers=0)
        distributor.add_handle(2, RoundRobin(), client_speaks_first=True)
        assert [handle.client_speaks_first for handle in distributor.handles.values()] == [False, True]
        distributor.add_worker(1, 0)
        distributor.attach(1, 2)
        connection = Connection(1, 101, 2)
        distributor.accepted(connection, waiting=False)
        assert distribute(distributor) == []
        distributor.readable(1)
        assert connection.state is State.QUEUED
        assert distribute(distributor) == [(1, 1)]

    def test_one_that_leaves_without_a_word_is_for_the_shell_to_close(self) -> None:
        distributor = rig()
        connection = Connection(1, 101, 1)
        distributor.accepted(connection, waiting=False)
        assert distributor.hung_up(1) is connection
        assert connection.state is State.GONE
        assert distributor.parking.connections == {}

    def test_nobody_to_take_it(self) -> None:
        distributor = rig(workers=0)
        accept(distributor, 1)
        assert distribute(distributor) == []
        assert waiting(distributor) == [1]
        assert distributor.wake_at(0.0) is None

    @given(st.lists(st.tuples(st.integers(1, 2), st.sampled_from(CLIENTS)), max_size=12), st.integers(0, 3))
    def test_when_nobody_will_ever_be_ready_the_shell_turns_all_away(
        self, arrivals: list[tuple[int, bytes]], offered: int
    ) -> None:
        """What was offered or is parked is another matter."""
        distributor = rig(workers=0, policy=Hash(2))
        distributor.add_handle(2, RoundRobin(), client_speaks_first=True)
        parked = Connection(1000, 1100, 2)
        distributor.accepted(parked, waiting=False)
        worker = distributor.add_worker(1, 0)
        for key in (1, 2):
            distributor.attach(1, key)
        begun = accept(distributor, *range(2000, 2000 + offered), listener=2)
        assert len(distribute(distributor)) == offered
        distributor.drain_worker(worker.id)
        waited = [accept(distributor, id, listener=key, client=who)[0] for id, (key, who) in enumerate(arrivals)]
        assert distribute(distributor) == []
        assert sorted(connection.id for connection in distributor.given_up()) == list(range(len(arrivals)))
        assert {connection.state for connection in waited} <= {State.GONE}
        assert (distributor.queued, waiting(distributor, 1), waiting(distributor, 2)) == (0, [], [])
        assert (parked.state, {connection.state for connection in begun}) == (
            State.PARKED,
            {State.OFFERED} if offered else set(),
        )
        assert distributor.given_up() == []

    def test_at_most_window_unacknowledged_offers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "WINDOW", 2)
        distributor = rig(workers=1)
        accept(distributor, 1, 2, 3)
        assert distribute(distributor) == [(1, 1), (1, 2)]
        assert distribute(distributor) == []
        say(distributor, 1, Kind.ACK, 1)
        assert distribute(distributor) == [(1, 3)]

    @pytest.mark.parametrize("capacity", [0, 1, 2])
    def test_at_most_capacity_connections(self, capacity: int) -> None:
        distributor = rig(workers=0)
        distributor.add_worker(1, 0, capacity)
        distributor.attach(1, 1)
        accept(distributor, 1, 2, 3)
        assert len(distribute(distributor)) == capacity
        for id in range(1, capacity + 1):
            say(distributor, 1, Kind.ACK, id)
        assert distribute(distributor) == []
        if capacity:
            say(distributor, 1, Kind.CLOSED, 1)
            assert distribute(distributor) == [(1, capacity + 1)]

    def test_over_several_listeners_the_longest_waiting_goes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "WINDOW", 4)
        distributor = rig(workers=1)
        distributor.add_handle(2, RoundRobin(), client_speaks_first=False)
        distributor.attach(1, 2)
        for id, listener in ((1, 2), (2, 1), (3, 1), (4, 2), (5, 1)):
            accept(distributor, id, listener=listener)
        assert distribute(distributor) == [(1, 1), (1, 2), (1, 3), (1, 4)]
        assert waiting(distributor, 1) == [5]

    def test_a_listener_without_workers_holds_up_no_other(self) -> None:
        distributor = rig(workers=1)
        distributor.add_handle(2, RoundRobin(), client_speaks_first=False)
        accept(distributor, 1, 2, listener=2)
        accept(distributor, 3)
        assert distribute(distributor) == [(1, 3)]
        assert waiting(distributor, 2) == [1, 2]

    def test_under_hash_who_waits_for_a_busy_slot_holds_up_nobody(self) -> None:
        policy = Hash(2)
        distributor = rig(workers=1, policy=policy)
        lanes = [policy.lane(Connection(0, 0, 1, client)) for client in CLIENTS]
        here, absent = CLIENTS[lanes.index(0)], CLIENTS[lanes.index(1)]
        accept(distributor, 1, 2, client=absent)
        accept(distributor, 3, client=here)
        accept(distributor, 4)
        assert distribute(distributor) == [(1, 3), (1, 4)]
        distributor.add_worker(2, 1)
        distributor.attach(2, 1)
        assert distribute(distributor) == [(2, 1), (2, 2)]

    def test_lanes_that_nobody_waits_in_do_not_pile_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handles, "MANY_LANES", 4)

        class LanePerClient(RoundRobin):
            def lane(self, connection: Waiting) -> bytes:
                return connection.client

            def pick(self, connection: Waiting, now: float) -> Candidate | None:
                return None if connection.client == b"waits" else super().pick(connection, now)

        distributor = rig(workers=1, policy=LanePerClient())
        accept(distributor, 1, client=b"waits")
        for id in range(2, 30):
            accept(distributor, id, client=b"%d" % id)
            assert distribute(distributor) == [(1, id)]
            say(distributor, 1, Kind.CLOSED, id)
        assert waiting(distributor) == [1]
        assert len(distributor.handles[1].lanes) <= 4

    def test_statistics(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2, 3)
        distribute(distributor)
        say(distributor, 1, Kind.ACK, 1)
        say(distributor, 2, Kind.RETURNED, 2)
        accept(distributor, 4)
        statistics = distributor.statistics()
        with pytest.raises(FrozenInstanceError):
            statistics.queued = 0  # type: ignore[misc]
        assert statistics == Statistics(queued=1, parked=1, offered=1, borrowed=1, workers=((1, 0, 1, 1), (2, 1, 0, 0)))

    @given(st.integers(1, 7), st.sampled_from([0.0, TURN]), st.lists(st.integers(1, 20), max_size=12))
    @settings(deadline=None, max_examples=50)
    def test_with_equal_acks_the_shares_of_rr_differ_by_at_most_one(
        self, count: int, patience: float, bursts: list[int]
    ) -> None:
        distributor = rig(count, RoundRobin(patience))
        shares = Counter(dict.fromkeys(distributor.workers, 0))
        id = 0
        for burst in bursts:
            accept(distributor, *range(id + 1, id + burst + 1))
            id += burst
            offers = distribute(distributor)
            assert len(offers) == burst
            for worker, connection in offers:
                shares[worker] += 1
                say(distributor, worker, Kind.ACK, connection)
            assert max(shares.values()) - min(shares.values()) <= 1


class TestWorkers:
    def test_attaching_twice_counts_once(self) -> None:
        distributor = rig()
        distributor.attach(1, 1)
        accept(distributor, 1, 2, 3, 4)
        assert [worker for worker, _ in distribute(distributor)] == [1, 2, 1, 2]

    def test_one_that_detached_keeps_what_it_holds_and_gets_nothing_more(self) -> None:
        distributor = rig()
        (connection,) = accept(distributor, 1)
        distribute(distributor)
        distributor.detach(1, 1)
        distributor.detach(1, 1)
        accept(distributor, 2, 3)
        assert distribute(distributor) == [(2, 2), (2, 3)]
        say(distributor, 1, Kind.ACK, 1)
        assert connection.state is State.BORROWED

    def test_one_that_drains_keeps_what_it_holds_and_gets_nothing_more(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor)
        distributor.drain_worker(1)
        distributor.drain_worker(1)
        accept(distributor, 2)
        assert distribute(distributor) == [(2, 2)]
        closed = say(distributor, 1, Kind.ACK | Kind.CLOSED, 1)
        assert closed is not None
        assert closed.state is State.GONE

    def test_one_that_drains_may_still_listen_but_gets_nothing(self) -> None:
        distributor = rig(workers=0)
        distributor.add_worker(1, 0)
        distributor.drain_worker(1)
        distributor.attach(1, 1)
        accept(distributor, 1)
        assert distribute(distributor) == []

    @pytest.mark.parametrize("leave", ["detach", "die"])
    def test_a_policy_hears_of_each_departure_once(self, leave: str) -> None:
        policy = Spy(RoundRobin())
        distributor = rig(workers=2, policy=policy)
        distributor.drain_worker(1)
        assert list(policy.present) == [2]
        if leave == "detach":
            distributor.detach(1, 1)
        else:
            distributor.remove_worker(1)
        assert list(policy.present) == [2]

    def test_the_dead_leave_what_they_held_oldest_first(self) -> None:
        distributor = rig(workers=1)
        connections = accept(distributor, 1, 2, 3)
        distribute(distributor)
        say(distributor, 1, Kind.ACK, 2)
        worker = distributor.workers[1]
        assert distributor.remove_worker(1) == connections
        assert (worker.load, worker.ready, worker.listeners) == (0, False, set())
        assert distributor.statistics() == Statistics(0, 0, 0, 0, ())
        # The first had been answered, the others were never touched.
        distributor.gone(connections[0])
        assert distributor.requeue(connections[1:]) == []
        assert [connection.state for connection in connections] == [State.GONE, State.QUEUED, State.QUEUED]
        assert [connection.worker for connection in connections] == [0, 0, 0]
        assert waiting(distributor) == [2, 3]

    def test_what_a_dead_worker_says_late_changes_nothing(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor)
        worker = distributor.workers[1]
        distributor.requeue(distributor.remove_worker(1))
        assert distribute(distributor) == [(2, 1)]
        before = everything(distributor)
        with pytest.raises(ProtocolError):
            distributor.answer(worker, Kind.ACK, 1, 0, 1.0)
        assert everything(distributor) == before

    def test_the_repr_is_a_status_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workers, "WINDOW", 1)
        distributor = rig(workers=1)
        worker = distributor.workers[1]
        assert repr(worker) == "<Worker 1 slot 0 ready: 0 offered, 0 borrowed, 0 of them kept>"
        accept(distributor, 1)
        distribute(distributor)
        assert repr(worker) == "<Worker 1 slot 0 busy: 1 offered, 0 borrowed, 0 of them kept>"
        distributor.lateness.overdue(PATIENCE)
        assert repr(worker) == "<Worker 1 slot 0 stalled: 1 offered, 0 borrowed, 0 of them kept>"
        say(distributor, 1, Kind.ACK, 1)
        distributor.drain_worker(1)
        assert repr(worker) == "<Worker 1 slot 0 draining: 0 offered, 1 borrowed, 0 of them kept>"


class TestAnswers:
    def test_an_ack_makes_it_borrowed(self) -> None:
        distributor = rig()
        (connection,) = accept(distributor, 1)
        distribute(distributor)
        assert distributor.answer(distributor.workers[1], Kind.ACK, 1, 250, 3.0) is None
        assert connection.state is State.BORROWED
        assert connection.worker == 1
        assert distributor.workers[1].held == 250

    @pytest.mark.parametrize("ending", list(ENDINGS))
    @pytest.mark.parametrize("how", ["with the ack", "without an ack", "after the ack"])
    def test_an_ending(self, ending: Kind, how: str) -> None:
        distributor = rig()
        (connection,) = accept(distributor, 1)
        distribute(distributor)
        if how == "after the ack":
            say(distributor, 1, Kind.ACK, 1)
        assert say(distributor, 1, Kind.ACK | ending if how == "with the ack" else ending, 1) is connection
        assert connection.state is ENDINGS[ending]
        assert connection.worker == 0
        assert list(distributor.parking.connections) == ([1] if ending is Kind.RETURNED else [])
        if ending is Kind.TAKEN:
            # Nobody else's concern, but a load on its worker as long as it lasts.
            assert distributor.workers[1].load == 1
            assert say(distributor, 1, Kind.CLOSED, 1) is None
            with pytest.raises(ProtocolError):
                say(distributor, 1, Kind.CLOSED, 1)
        assert distributor.workers[1].load == 0

    def test_what_another_still_has_a_copy_of_cannot_be_taken(self) -> None:
        """The master's own copy is what ends it then."""
        for with_the_ack in (True, False):
            distributor = rig(1)
            (connection,) = accept(distributor, 1)
            distribute(distributor)
            connection.relics = 1
            if with_the_ack:
                assert say(distributor, 1, Kind.ACK | Kind.TAKEN, 1) is None
            else:
                say(distributor, 1, Kind.ACK, 1)
                assert say(distributor, 1, Kind.TAKEN, 1) is None
            assert connection.state is State.BORROWED
            assert distributor.workers[1].load == 1
            assert say(distributor, 1, Kind.CLOSED, 1) is connection
            assert distributor.workers[1].load == 0

    def test_an_old_board_counts_nothing_that_is_gone(self) -> None:
        """1. One that is kept has a request in progress, as the board says.  2. It is closed."""
        distributor = rig(1)
        accept(distributor, 1)
        distribute(distributor)
        say(distributor, 1, Kind.ACK | Kind.KEPT, 1)
        worker = distributor.workers[1]
        assert worker.load == 0
        distributor.lateness.looked([(worker, 2, False, 1)])
        assert worker.load == 1
        say(distributor, 1, Kind.CLOSED, 1)
        assert worker.load == 0

    def test_what_is_taken_counts_towards_the_capacity(self) -> None:
        distributor = rig(0)
        distributor.add_worker(1, 0, 1)
        distributor.attach(1, 1)
        accept(distributor, 1, 2)
        assert len(distribute(distributor)) == 1
        say(distributor, 1, Kind.ACK | Kind.TAKEN, 1)
        assert distribute(distributor) == []
        say(distributor, 1, Kind.CLOSED, 1)
        assert len(distribute(distributor)) == 1

    def test_one_that_was_returned_is_offered_again_when_it_speaks(self) -> None:
        distributor = rig()
        (connection,) = accept(distributor, 1)
        distribute(distributor)
        say(distributor, 1, Kind.RETURNED, 1)
        ticket = connection.ticket
        distributor.readable(1)
        assert connection.ticket > ticket
        assert distribute(distributor) == [(2, 1)]

    @pytest.mark.parametrize("held", ["offered", "borrowed", "another's", "queued", "parked", "unknown"])
    def test_an_answer_that_cannot_be_changes_nothing(self, held: str) -> None:
        distributor = rig()
        accept(distributor, 1, 2)
        distribute(distributor)
        if held == "borrowed":
            say(distributor, 1, Kind.ACK, 1)
        elif held == "another's":
            distributor.requeue(distributor.remove_worker(1))
            distribute(distributor)
            distributor.add_worker(1, 0)
        elif held == "queued":
            distributor.recalled(distributor.workers[1], [1])
        elif held == "parked":
            say(distributor, 1, Kind.RETURNED, 1)
        id = 99 if held == "unknown" else 1
        worker = distributor.workers[1]
        worker.stalled = True
        before = everything(distributor)
        for kind in {*range(256)} - {"offered": OF_OFFERED, "borrowed": OF_BORROWED}.get(held, set()):
            with pytest.raises(ProtocolError, match=rf"^worker 1 answered {kind} for connection {id}, which "):
                distributor.answer(worker, kind, id, 77, 5.0)
            assert everything(distributor) == before

    def test_a_refused_one_goes_to_another_at_once_and_the_refuser_rests(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2)
        assert distribute(distributor) == [(1, 1), (2, 2)]
        assert say(distributor, 1, Kind.REFUSED, 1, now=5.0) is None
        accept(distributor, 3)
        assert distribute(distributor, 5.0) == [(2, 1), (2, 3)]
        distributor.lateness.overdue(5.0 + REFUSED_PAUSE / 2)
        assert not distributor.workers[1].ready
        distributor.lateness.overdue(5.0 + REFUSED_PAUSE)
        assert distributor.workers[1].ready

    def test_what_could_not_be_sent_comes_back_to_the_head_and_its_worker_rests(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2, 3, 4)
        assert distribute(distributor, 5.0) == [(1, 1), (2, 2), (1, 3), (2, 4)]
        accept(distributor, 5)
        assert distributor.undelivered(distributor.workers[1], [1, 3], 5.0) == []
        assert waiting(distributor) == [1, 3, 5]
        assert distribute(distributor, 5.0) == [(2, 1), (2, 3), (2, 5)]
        assert distributor.wake_at(5.0) == 5.0 + PATIENCE
        distributor.lateness.overdue(5.0 + REFUSED_PAUSE)
        assert distributor.workers[1].ready

    def test_how_long_it_holds_its_loop_is_its_recent_worst(self) -> None:
        distributor = rig(workers=1)
        accept(distributor, *range(1, 60))
        distribute(distributor)
        worker = distributor.workers[1]
        remembered = []
        for id, held in enumerate([64, 6400, *[100] * 40], start=1):
            distributor.answer(worker, Kind.ACK, id, held, 1.0)
            remembered.append(worker.held)
        assert remembered[:4] == [64, 6400, 6299, 6200]
        assert remembered == sorted(remembered[:1]) + sorted(remembered[1:], reverse=True)
        assert remembered[-1] > 100

    def test_one_that_nobody_can_take_does_not_spin(self) -> None:
        distributor = rig(workers=1)
        accept(distributor, 1)
        now = 5.0
        for _ in range(3):
            assert distribute(distributor, now) == [(1, 1)]
            say(distributor, 1, Kind.REFUSED, 1, now)
            assert distribute(distributor, now) == []
            wake = distributor.wake_at(now)
            assert wake == now + REFUSED_PAUSE
            now = wake
            assert distributor.lateness.overdue(now) == []


class TestStalledWorkers:
    def test_what_it_has_not_read_comes_back_to_the_head_and_goes_to_another(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2, 3)
        assert distribute(distributor, 1.0) == [(1, 1), (2, 2), (1, 3)]
        say(distributor, 2, Kind.ACK, 2, now=1.001)
        assert distributor.wake_at(1.001) == 1.0 + PATIENCE
        assert distributor.lateness.overdue(1.009) == []
        now = 1.0 + PATIENCE
        worker = distributor.workers[1]
        assert distributor.lateness.overdue(now) == [worker]
        accept(distributor, 4)
        # It had read the first.
        assert distributor.recalled(worker, [3]) == []
        assert distribute(distributor, now) == [(2, 3), (2, 4)]
        # Once is enough.
        assert distributor.lateness.overdue(now + PATIENCE / 2) == []

    def test_it_gets_nothing_more_until_it_answers(self) -> None:
        distributor = rig(workers=1)
        accept(distributor, 1)
        distribute(distributor, 1.0)
        distributor.lateness.overdue(2.0)
        accept(distributor, 2)
        assert distribute(distributor, 2.0) == []
        say(distributor, 1, Kind.ACK, 1, now=2.1)
        assert distribute(distributor, 2.1) == [(1, 2)]

    @pytest.mark.parametrize("kind", [Kind.CLOSED, Kind.REFUSED])
    def test_any_answer_shows_that_its_loop_turns(self, kind: Kind) -> None:
        distributor = rig(workers=1)
        accept(distributor, 1)
        distribute(distributor, 1.0)
        distributor.lateness.overdue(2.0)
        worker = distributor.workers[1]
        assert worker.stalled
        say(distributor, 1, kind, 1, now=2.1)
        assert not worker.stalled

    def test_progress_on_anything_is_progress(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2, 3)
        distribute(distributor, 1.0)
        say(distributor, 1, Kind.ACK, 1, now=1.009)
        distributor.lateness.overdue(1.0 + PATIENCE)
        assert not distributor.workers[1].stalled
        assert distributor.workers[2].stalled

    def test_the_clock_of_an_idle_worker_starts_with_its_next_offer(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor, 100.0)
        assert distributor.lateness.overdue(100.0) == []
        assert distributor.wake_at(100.0) == 100.0 + PATIENCE

    def test_with_nobody_to_take_them_its_offers_stay_and_it_is_looked_at_again(self) -> None:
        distributor = rig(workers=1)
        accept(distributor, 1)
        distribute(distributor, 1.0)
        assert distributor.lateness.overdue(2.0) == []
        assert distributor.wake_at(2.0) == 2.0 + PATIENCE
        distributor.add_worker(2, 1)
        distributor.attach(2, 1)
        assert distributor.lateness.overdue(2.0 + PATIENCE) == [distributor.workers[1]]

    def test_a_ready_worker_that_listens_elsewhere_is_nobody_to_take_them(self) -> None:
        distributor = rig(workers=1)
        distributor.add_handle(2, RoundRobin(), client_speaks_first=False)
        distributor.attach(1, 2)
        distributor.add_worker(2, 1)
        distributor.attach(2, 2)
        accept(distributor, 1)
        distribute(distributor, 1.0)
        assert distributor.lateness.overdue(2.0) == []
        accept(distributor, 2, 3, listener=2)
        assert distribute(distributor, 2.0) == [(2, 2), (2, 3)]

    def test_offers_of_a_listener_it_has_closed_come_back_too(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor, 1.0)
        distributor.detach(1, 1)
        assert distributor.lateness.overdue(2.0) == [distributor.workers[1]]

    def test_offers_of_a_listener_that_is_gone_are_nothing_to_take_back(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor, 1.0)
        distributor.remove_handle(1)
        assert distributor.lateness.overdue(2.0) == []

    def test_what_two_workers_give_back_keeps_one_order(self) -> None:
        distributor = rig(workers=3)
        accept(distributor, 1, 2, 3, 4, 5)
        assert distribute(distributor) == [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5)]
        accept(distributor, 6)
        distributor.recalled(distributor.workers[2], [5, 2])
        assert waiting(distributor) == [2, 5, 6]
        distributor.recalled(distributor.workers[1], [1, 4])
        assert waiting(distributor) == [1, 2, 4, 5, 6]

    def test_one_that_lost_all_its_offers_is_tried_again(self) -> None:
        """1. Worker 1 is frozen for a moment, by a debugger or a busy machine, with one unread offer.
        2. The offer is taken back.
        3. The worker goes on, with nothing to answer.
        Result: it gets one connection as a probe, and more when it has answered.
        """
        distributor = rig()
        accept(distributor, 1)
        assert distribute(distributor, 1.0) == [(1, 1)]
        now = 1.0 + PATIENCE
        (worker,) = distributor.lateness.overdue(now)
        distributor.recalled(worker, [1])
        assert distribute(distributor, now) == [(2, 1)]
        say(distributor, 2, Kind.ACK | Kind.CLOSED, 1, now)
        assert not worker.ready

        wake = distributor.wake_at(now)
        assert wake == now + RETRY
        assert distributor.lateness.overdue(wake) == []
        assert worker.ready
        assert distributor.wake_at(wake) is None
        accept(distributor, 2, 3, 4)
        assert distribute(distributor, wake) == [(1, 2), (2, 3), (2, 4)]
        say(distributor, 1, Kind.ACK, 2, wake)
        accept(distributor, 5, 6, 7)
        assert distribute(distributor, wake) == [(1, 5), (2, 6), (1, 7)]

    def test_one_that_hangs_on_costs_one_connection_its_patience_each_time(self) -> None:
        distributor = rig()
        accept(distributor, 1, 2)
        distribute(distributor, 1.0)
        say(distributor, 2, Kind.CLOSED, 2, now=1.0)
        now = 1.0
        for id in (3, 4, 5):
            wake = distributor.wake_at(now)
            assert wake == now + PATIENCE
            (worker,) = distributor.lateness.overdue(wake)
            distributor.recalled(worker, list(worker.unacked))
            for _, connection in distributor.distribute(wake):
                say(distributor, 2, Kind.CLOSED, connection.id, wake)
            now = wake + RETRY
            assert distributor.wake_at(wake) == now
            assert distributor.lateness.overdue(now) == []
            accept(distributor, id)
            assert distribute(distributor, now) == [(1, id)]

    def test_one_without_a_processor_is_excused_so_many_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "EXCUSES", 3)
        distributor = rig()
        accept(distributor, 1, 2)
        now = 1.0
        distribute(distributor, now)
        say(distributor, 2, Kind.ACK, 2, now)
        worker = distributor.workers[1]
        assert distributor.lateness.late(1.009) == []
        for _ in range(3):
            now += PATIENCE
            assert distributor.lateness.late(now) == [1]
            assert distributor.lateness.overdue(now, {1}) == []
            assert not worker.stalled
            # Its time begins anew.
            assert distributor.lateness.late(now) == []
            assert distributor.wake_at(now) == now + PATIENCE
        now += PATIENCE
        assert distributor.lateness.overdue(now, {1}) == [worker]
        assert worker.stalled
        assert distributor.lateness.late(now) == []

    def test_every_answer_gives_it_all_its_excuses_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "EXCUSES", 1)
        distributor = rig(workers=1)
        accept(distributor, 1, 2)
        distribute(distributor, 1.0)
        distributor.lateness.overdue(2.0, {1})
        say(distributor, 1, Kind.ACK, 1, now=2.0)
        distributor.lateness.overdue(3.0, {1})
        assert not distributor.workers[1].stalled
        distributor.lateness.overdue(4.0, {1})
        assert distributor.workers[1].stalled

    def test_nobody_who_is_stalled_is_excused_afterwards(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor, 1.0)
        assert distributor.lateness.overdue(2.0) == [distributor.workers[1]]
        assert distributor.lateness.overdue(3.0, {1}) == [distributor.workers[1]]

    def test_taking_back_what_it_was_not_offered_changes_nothing(self) -> None:
        """A worker answered for an offer it had not read: what comes out of its channel then is no longer its."""
        distributor = rig(workers=1)
        accept(distributor, 1, 2)
        distribute(distributor)
        say(distributor, 1, Kind.CLOSED, 2)
        before = everything(distributor)
        with pytest.raises(ProtocolError, match=r"^worker 1 answered for connection 2 before it had read the offer$"):
            distributor.recalled(distributor.workers[1], [1, 2])
        assert everything(distributor) == before


class TestNarrowWorkers:
    """One offer at a time for a worker of an expensive application; when nobody is free, one ahead."""

    def rig(self, workers: int = 2) -> Distributor:
        distributor = Distributor(patience=0.002, narrows=True)
        distributor.add_handle(1, RoundRobin(), client_speaks_first=True)
        for number in range(workers):
            distributor.add_worker(number + 1, number)
            distributor.attach(number + 1, 1)
        return distributor

    def test_until_it_is_known_what_a_connection_costs(self) -> None:
        distributor = self.rig()
        accept(distributor, *range(1, 8))
        # One each, and then one ahead each; the others wait.
        assert distribute(distributor) == [(1, 1), (2, 2), (1, 3), (2, 4)]
        assert waiting(distributor) == [5, 6, 7]
        distributor.answer(distributor.workers[1], Kind.ACK | Kind.CLOSED, 1, EXPENSIVE, 0.0)
        assert distribute(distributor) == [(1, 5), (1, 6), (1, 7)]

    def test_as_long_as_its_answers_are_expensive(self) -> None:
        distributor = self.rig()
        accept(distributor, 1, 2, 3, 4, 5)
        distribute(distributor)
        distributor.answer(distributor.workers[1], Kind.ACK | Kind.CLOSED, 1, EXPENSIVE + 1, 0.0)
        assert distribute(distributor) == [(1, 5)]

    def test_what_cannot_begin_in_time_comes_back_to_whoever_is_first(self) -> None:
        distributor = self.rig()
        accept(distributor, 1, 2, 3)
        assert distribute(distributor, 1.0) == [(1, 1), (2, 2), (1, 3)]
        now = 1.0 + AHEAD_PATIENCE
        assert distributor.wake_at(1.0) == now
        # What was offered ahead needs no excuse, but the one that only has what it works on does.
        assert distributor.lateness.late(now) == [2]
        worker, _ = distributor.lateness.overdue(now)
        distributor.recalled(worker, [3])
        assert waiting(distributor) == [3]
        distributor.answer(distributor.workers[2], Kind.ACK | Kind.CLOSED, 2, 2000, now)
        assert distribute(distributor, now) == [(2, 3)]

    def test_nothing_is_taken_back_from_one_that_drains(self) -> None:
        """1. The cluster stops: the queue is empty, and every worker drains.  2. One is late with the first of two.
        Result: the second stays where it is, since nobody else will ever be offered it.
        """
        distributor = self.rig()
        accept(distributor, 1, 2, 3)
        distribute(distributor, 1.0)
        for id in (1, 2):
            distributor.drain_worker(id)
        assert distributor.lateness.overdue(2.0) == []
        assert list(distributor.workers[1].unacked) == [1, 3]


class TestListenersThatGo:
    def test_who_waited_is_for_the_shell_to_close(self) -> None:
        distributor = rig(workers=0)
        queued = accept(distributor, 1, 2)
        parked = Connection(3, 103, 1)
        distributor.accepted(parked, waiting=False)
        distributor.add_handle(2, RoundRobin(), client_speaks_first=False)
        accept(distributor, 4, listener=2)
        elsewhere = Connection(5, 105, 2)
        distributor.accepted(elsewhere, waiting=False)
        assert distributor.remove_handle(1) == [*queued, parked]
        assert {connection.state for connection in (*queued, parked)} == {State.GONE}
        assert distributor.queued == 1
        assert list(distributor.parking.connections) == [5]

    def test_its_workers_forget_it(self) -> None:
        distributor = rig(workers=1)
        distributor.remove_handle(1)
        assert distributor.workers[1].listeners == set()
        assert distributor.remove_worker(1) == []

    @pytest.mark.parametrize("way", ["refused", "recalled", "requeued", "returned", "returned later"])
    def test_a_connection_that_comes_back_is_for_the_shell_to_close(self, way: str) -> None:
        distributor = rig(workers=1)
        (connection,) = accept(distributor, 1)
        distribute(distributor)
        worker = distributor.workers[1]
        distributor.remove_handle(1)
        if way == "refused":
            assert say(distributor, 1, Kind.REFUSED, 1) is connection
        elif way == "recalled":
            assert distributor.recalled(worker, [1]) == [connection]
        elif way == "requeued":
            assert distributor.requeue(distributor.remove_worker(1)) == [connection]
        else:
            if way == "returned later":
                say(distributor, 1, Kind.ACK, 1)
            assert say(distributor, 1, Kind.RETURNED, 1) is connection
        assert connection.state is State.GONE
        assert connection.worker == 0
        assert list(where(distributor)) == []
        assert distributor.queued == 0


class TestPoliciesOfOthers:
    def test_three_methods_are_enough(self) -> None:
        class Newest:
            def __init__(self) -> None:
                self.workers: list[Candidate] = []

            def add(self, worker: Candidate) -> None:
                self.workers.append(worker)

            def remove(self, worker: Candidate) -> None:
                self.workers.remove(worker)

            def pick(self, connection: Waiting, now: float) -> Candidate | None:
                return next((worker for worker in reversed(self.workers) if worker.ready), None)

        distributor = rig(workers=3, policy=Newest())
        accept(distributor, 1, 2)
        assert distribute(distributor) == [(3, 1), (3, 2)]
        distributor.drain_worker(3)
        accept(distributor, 3)
        assert distribute(distributor) == [(2, 3)]
        assert distributor.wake_at(0.0) == PATIENCE

    @pytest.mark.parametrize("fault", ["not ready", "a stranger"])
    def test_one_that_names_a_worker_that_cannot_take_it(self, fault: str) -> None:
        stranger = Worker(9, 9)

        class Stubborn(RoundRobin):
            def pick(self, connection: Waiting, now: float) -> Candidate | None:
                return stranger if fault == "a stranger" else distributor.workers[1]

        distributor = rig(workers=1, policy=Stubborn())
        distributor.drain_worker(1)
        (connection,) = accept(distributor, 1)
        with pytest.raises(PolicyError, match=r"^policy Stubborn chose <Worker \d .*>, which is not ready$"):
            distributor.distribute(0.0)
        assert connection.state is State.QUEUED
        assert waiting(distributor) == [1]
        assert distributor.queued == 1


class TestWakeAt:
    def test_nothing_to_do_nothing_to_wake_for(self) -> None:
        assert rig().wake_at(1.0) is None

    def test_the_end_of_a_turn(self) -> None:
        distributor = rig(workers=2, policy=RoundRobin(TURN))
        distributor.workers[1].resting = 9.0
        accept(distributor, 1)
        assert distribute(distributor, 1.0) == []
        assert distributor.wake_at(1.0) == 1.0 + TURN
        assert distribute(distributor, 1.0 + TURN) == [(2, 1)]

    def test_the_first_of_several(self) -> None:
        distributor = rig(workers=3)
        accept(distributor, 1, 2)
        distribute(distributor, 1.0)
        distributor.workers[3].resting = 1.004
        say(distributor, 2, Kind.ACK, 2, now=1.002)
        assert distributor.wake_at(1.002) == 1.004
        distributor.lateness.overdue(1.004)
        assert distributor.wake_at(1.004) == 1.0 + PATIENCE

    def test_nothing_while_a_stalled_worker_is_busy_with_what_it_read(self) -> None:
        distributor = rig()
        accept(distributor, 1)
        distribute(distributor, 1.0)
        (worker,) = distributor.lateness.overdue(2.0)
        distributor.recalled(worker, [])
        assert distributor.wake_at(2.0) is None


class Spy:
    """A policy that passes everything on to another, and checks what it is told."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.present: dict[int, Worker] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.policy, name)

    def add(self, worker: Worker) -> None:
        assert worker.open
        assert worker.id not in self.present
        self.present[worker.id] = worker
        self.policy.add(worker)

    def remove(self, worker: Worker) -> None:
        del self.present[worker.id]
        self.policy.remove(worker)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        return self.policy.pick(connection, now)

    def eligible(self, lane: object) -> list[Worker]:
        """Who may serve this lane, whether it is ready or not."""
        if isinstance(self.policy, Hash) and lane != -1:
            # The newest of the slot: in a reload there are two.
            return [worker for worker in self.present.values() if worker.slot == lane][-1:]
        return list(self.present.values())


@dataclass
class Process:
    """A worker's end: what lies in its channel, and what it has read but not acknowledged."""

    unread: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)


SLOTS = 3
NAMES = st.sampled_from(["rr", "rr with patience", "least", "hash"])
#: Which of several, modulo how many there are.
ONE = st.integers(0, 11)
BOOL = st.booleans()
PAUSES = [0.0, 0.001, 0.004, PATIENCE, 0.03, RETRY, 1.0]
DELAYS = st.sampled_from(PAUSES)


def one_of(things: Sequence[T], number: int) -> T:
    return things[number % len(things)]


class Shell(RuleBasedStateMachine):
    """Clients, workers and the master's shell around a distributor, and an account of where everything should be."""

    #: Whether workers of an expensive application get one offer at a time.
    narrows = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        # Small, so that it is reached.
        self.patch.setattr(workers, "WINDOW", 3)
        self.now = 1000.0
        self.distributor = Distributor(narrows=self.narrows)
        self.policies: dict[int, Spy] = {}
        self.processes: dict[int, Process] = {}
        self.connections: dict[int, Connection] = {}
        #: Where each connection must be, in the words of `where`; None for those that are gone.
        self.places: dict[int, str | None] = {}
        #: Since when a round robin with patience waits, per listener.
        self.turns: dict[int, float] = {}
        #: The last ticket that was offered for the first time, per lane; and all of those.
        self.last: dict[object, int] = {}
        self.offered: set[int] = set()
        self.listener = self.worker = 0
        #: What was taken back, from whom, and not confirmed.
        self.lost: list[tuple[int, int]] = []

    def teardown(self) -> None:
        self.patch.undo()

    # -- listeners and workers --

    @initialize(names=st.lists(NAMES, min_size=1, max_size=2))
    def start(self, names: list[str]) -> None:
        for name in names:
            self.open_listener(name)
        for slot in range(2):
            self.spawn(slot, None)

    @precondition(lambda self: len(self.policies) < 3)
    @rule(name=NAMES)
    def open_listener(self, name: str) -> None:
        self.listener += 1
        patience = TURN if name == "rr with patience" else 0.0
        policy = self.policies[self.listener] = Spy(make_policy(name.split()[0], slots=SLOTS, patience=patience))
        self.distributor.add_handle(self.listener, policy, client_speaks_first=True)

    @precondition(lambda self: len(self.policies) > 1)
    @rule(number=ONE)
    def close_listener(self, number: int) -> None:
        key = one_of(list(self.policies), number)
        del self.policies[key]
        waited = [
            id for id, place in self.places.items()
            if place in ("lane", "parked") and self.connections[id].listener == key
        ]  # fmt: skip
        assert sorted(connection.id for connection in self.distributor.remove_handle(key)) == sorted(waited)
        self.place(waited, None)

    @precondition(lambda self: len(self.processes) < 5)
    @rule(slot=st.integers(0, SLOTS - 1), capacity=st.sampled_from([None, None, None, 0, 1, 4]))
    def spawn(self, slot: int, capacity: int | None) -> None:
        self.worker += 1
        self.processes[self.worker] = Process()
        self.distributor.add_worker(self.worker, slot, capacity)
        for key in self.policies:
            self.distributor.attach(self.worker, key)

    @precondition(lambda self: self.processes)
    @rule(number=ONE, key=ONE)
    def attach(self, number: int, key: int) -> None:
        self.distributor.attach(one_of(list(self.processes), number), one_of(list(self.policies), key))

    @precondition(lambda self: self.processes)
    @rule(number=ONE, key=ONE)
    def detach(self, number: int, key: int) -> None:
        self.distributor.detach(one_of(list(self.processes), number), one_of(list(self.policies), key))

    @precondition(lambda self: self.processes)
    @rule(number=ONE)
    def drain(self, number: int) -> None:
        self.distributor.drain_worker(one_of(list(self.processes), number))

    @rule(spoke=st.sets(ONE))
    def expire(self, spoke: set[int]) -> None:
        """Whose time is over is closed, but for those who have spoken in the last moment."""
        named = self.distributor.parking.expired(self.now)
        assert [connection.state for connection in named] == [State.PARKED] * len(named)
        assert self.distributor.parking.expired(self.now) == []
        for position, connection in enumerate(named):
            if position in spoke:
                self.distributor.readable(connection.id)
                self.place([connection.id], "lane")
            else:
                assert self.distributor.hung_up(connection.id) is connection
                self.place([connection.id], None)

    @invariant()
    def only_what_is_parked_expires(self) -> None:
        assert self.distributor.parking._expiries.keys() <= self.distributor.parking.connections.keys()
        assert list(self.distributor.parking._expiries.values()) == sorted(self.distributor.parking._expiries.values())

    @precondition(lambda self: self.processes)
    @rule(number=ONE, touched=st.sets(ONE), together=st.booleans())
    def die(self, number: int, touched: set[int], together: bool) -> None:
        id = one_of(list(self.processes), number)
        del self.processes[id]
        held = self.distributor.remove_worker(id)
        tickets = [connection.ticket for connection in held]
        assert tickets == sorted(tickets)
        self.lost = [pair for pair in self.lost if pair[0] != id]
        its = f"offered to {id}", f"borrowed by {id}", f"kept by {id}"
        assert {connection.id for connection in held} == {known for known, place in self.places.items() if place in its}
        assert len(set(tickets)) == len(tickets)
        untouched = [connection for position, connection in enumerate(held) if position not in touched]
        for connection in held:
            if connection not in untouched and connection.id % 2 and self.places[connection.id] == f"kept by {id}":
                parked = self.distributor.idle(connection, self.now)
                assert parked is (connection.listener in self.policies)
                self.place([connection.id], "parked" if parked else None)
            elif connection not in untouched:
                self.distributor.gone(connection)
                self.place([connection.id], None)
        for some in [untouched] if together else [[connection] for connection in reversed(untouched)]:
            self.came_back([connection.id for connection in some], self.distributor.requeue(some))

    # -- clients --

    @rule(key=ONE, clients=st.lists(st.sampled_from([b"", *CLIENTS]), min_size=1, max_size=6), speaks=st.booleans())
    def connect(self, key: int, clients: list[bytes], speaks: bool) -> None:
        for client in clients:
            id = len(self.connections) + 1
            connection = self.connections[id] = Connection(id, 1000 + id, one_of(list(self.policies), key), client)
            self.distributor.accepted(connection, waiting=speaks)
            self.place([id], "lane" if speaks else "parked")
        self.turn(0.0)

    @rule(number=ONE, speaks=st.booleans())
    def a_parked_one(self, number: int, speaks: bool = True) -> None:
        """It says something, or leaves without a word."""
        if not self.distributor.parking.connections:
            return
        id = one_of(list(self.distributor.parking.connections), number)
        if speaks:
            self.distributor.readable(id)
        else:
            assert self.distributor.hung_up(id) is self.connections[id]
        self.place([id], "lane" if speaks else None)

    # -- workers' answers --

    @rule(number=ONE, count=st.integers(1, 4))
    def read(self, number: int, count: int) -> None:
        senders = [pair for pair in self.processes.items() if pair[1].unread]
        if senders:
            worker, process = one_of(senders, number)
            self.hears(worker, process.unread[:count])
            process.read += process.unread[:count]
            del process.unread[:count]

    @rule(number=ONE, which=ONE, kind=st.sampled_from(sorted(OF_OFFERED)), turn=st.booleans())
    def answer(self, number: int, which: int, kind: int, turn: bool) -> None:
        answerers = [pair for pair in self.processes.items() if pair[1].read]
        if answerers:
            id, process = one_of(answerers, number)
            self.say(id, one_of(process.read, which), kind)
        if turn:
            self.turn(0.0)

    @rule(number=ONE, which=ONE, kind=st.sampled_from(sorted(OF_BORROWED)), turn=st.booleans())
    def finish(self, number: int, which: int, kind: int, turn: bool) -> None:
        borrowers = [worker for worker in self.distributor.workers.values() if worker.borrowed]
        if borrowers:
            worker = one_of(borrowers, number)
            id = one_of(list(worker.borrowed), which)
            if kind != Kind.KEPT or self.places[id] != f"kept by {worker.id}":
                self.say(worker.id, id, kind)
        if turn:
            self.turn(0.0)

    @rule(number=ONE, which=st.sets(ONE, min_size=1, max_size=3), turn=st.booleans())
    def take_back(self, number: int, which: set[int], turn: bool) -> None:
        """The kernel has given the master the next requests on some that a worker keeps."""
        keepers = [worker for worker in self.distributor.workers.values() if worker.kept]
        if keepers:
            worker = one_of(keepers, number)
            some = list({one_of(list(worker.kept.values()), each).id: None for each in which})
            orphans = self.distributor.taken_back(worker, [self.connections[id] for id in some], self.now)
            self.lost += [(worker.id, id) for id in some]
            self.came_back(some, orphans)
        if turn:
            self.turn(0.0)

    @rule(number=ONE, late=st.sampled_from([None, Kind.RETURNED, Kind.CLOSED]))
    def drop(self, number: int, late: Kind | None) -> None:
        """The worker hears of it; what it has said before that counts for nothing."""
        if self.lost:
            worker, id = one_of(self.lost, number)
            record = self.distributor.workers[worker]
            if late is not None:
                assert self.distributor.answer(record, late, id, 0, self.now) is None
                assert id in record.lost
            self.hears(worker, [id])

    def hears(self, worker: int, ids: Sequence[int]) -> None:
        """That it has lost one lies in front of an offer of the same one anew: it confirms the one before the other."""
        for id in ids:
            if (worker, id) in self.lost:
                assert self.distributor.answer(self.distributor.workers[worker], Kind.DROPPED, id, 0, self.now) is None
                self.lost.remove((worker, id))

    @rule(
        turns=st.lists(st.integers(0, 3), min_size=1),
        unclaimed=st.booleans(),
        pause=st.booleans(),
        starve=st.booleans(),
    )
    def look(self, turns: list[int], unclaimed: bool, pause: bool, starve: bool) -> None:
        """At the boards: who stands still loses its requests, if somebody else is ready for them."""
        if pause:
            self.distributor.lateness.overlook()
        lateness, workers = self.distributor.lateness, tuple(self.distributor.workers.values())
        before = {worker.id: (worker.turns, worker.unclaimed) for worker in workers}
        boards = [(worker, one_of(turns, number), unclaimed, 1) for number, worker in enumerate(workers)]
        stuck = lateness.looked(boards)
        assert stuck == [worker for worker in workers if worker.stuck]
        for worker, now, _, _ in boards:
            still = before[worker.id][0] == now
            assert worker.stuck == (still and (now % 2 == 1 or (unclaimed and before[worker.id][1])))
        if starve:
            # Who waits for a processor is not stuck.
            for worker in stuck:
                worker.stuck = False
            stuck = []
        for worker in lateness.late_with_kept(stuck):
            assert worker.stuck
            assert unclaimed
            assert not worker.ready
            assert worker.kept
            assert any(other.ready for other in workers)
        assert self.distributor.lateness.watched == any(
            worker.stuck or worker.kept for worker in self.distributor.workers.values()
        )
        self.turn(0.0)

    @precondition(lambda self: self.processes)
    @rule(number=ONE, id=st.integers(0, 40), kind=st.integers(0, 255))
    def lie(self, number: int, id: int, kind: int) -> None:
        worker = one_of(list(self.processes), number)
        place = self.places.get(id)
        if (worker, id) in self.lost or (kind, id) == (FREE, 0):
            return
        if kind in {
            f"offered to {worker}": OF_OFFERED,
            f"borrowed by {worker}": OF_BORROWED,
            f"kept by {worker}": OF_BORROWED - {Kind.KEPT},
        }.get(str(place), ()):
            return
        before = everything(self.distributor)
        with pytest.raises(ProtocolError):
            self.distributor.answer(self.distributor.workers[worker], kind, id, 1, self.now)
        assert everything(self.distributor) == before

    # -- the shell --

    @rule(delay=DELAYS, starving=st.booleans(), full=st.none() | ONE, room=st.integers(0, 2))
    def turn(self, delay: float, starving: bool = False, full: int | None = None, room: int = 0) -> None:
        """The master's loop turns: what is due, then offers, of which one worker's channel may take only some."""
        self.now += delay
        late = self.distributor.lateness.late(self.now)
        for worker in self.distributor.lateness.overdue(self.now, late[:1] if starving else ()):
            self.recall(worker)
        assert self.distributor.lateness.late(self.now) == []
        offers = self.offer()
        if offers and full is not None:
            worker = one_of(offers, full)[0]
            unread = self.processes[worker.id].unread
            unsent = [connection.id for to, connection in offers if to is worker][room:]
            del unread[len(unread) - len(unsent) :]
            self.came_back(unsent, self.distributor.undelivered(worker, unsent, self.now))
            offers += self.offer()
        self.check_nobody_waits_for_nothing({connection.listener for _, connection in offers})
        wake = self.distributor.wake_at(self.now)
        assert wake is None or wake > self.now

    @rule()
    def settle(self) -> None:
        """Everyone behaves from now on: whatever can be served is, with no wake-ups but the announced ones."""
        for _ in range(1000):
            self.turn(0.0)
            if self.serve_everything():
                continue
            wake = self.distributor.wake_at(self.now)
            if wake is None:
                break
            self.now = wake
        else:
            raise AssertionError("it never comes to rest")
        for key, policy in self.policies.items():
            for lane, queue in self.distributor.handles[key].lanes.items():
                # What a worker has for good counts towards its capacity for good.
                full = (w.capacity is not None and len(w.taken) >= w.capacity for w in policy.eligible(lane))
                assert not queue or all(full)

    def offer(self) -> list[tuple[Worker, Connection]]:
        offers = self.distributor.distribute(self.now)
        self.check_order(offers)
        for worker, connection in offers:
            self.processes[worker.id].unread.append(connection.id)
            self.place([connection.id], f"offered to {worker.id}")
        return offers

    def serve_everything(self) -> bool:
        """Read and end all there is; whether there was anything."""
        before = self.now, dict(self.places)
        # Who was stuck is ready again, and is to be given what waits.
        released = any(worker.stuck for worker in self.distributor.workers.values())
        self.distributor.lateness.overlook()
        for id, process in self.processes.items():
            self.hears(id, process.unread)
            process.read += process.unread
            process.unread.clear()
            for connection in tuple(process.read):
                self.say(id, connection, Kind.ACK | Kind.CLOSED)
            for connection in tuple(self.distributor.workers[id].borrowed):
                self.say(id, connection, Kind.CLOSED)
        while self.distributor.parking.connections:
            self.a_parked_one(0)
        return released or before != (self.now, self.places)

    def say(self, worker: int, id: int, kind: int) -> None:
        connection = self.connections[id]
        offered = self.places[id] == f"offered to {worker}"
        listens = connection.listener in self.policies
        # Every third is expensive.
        held = 5 if id % 3 else EXPENSIVE + 5
        answer = self.distributor.answer(self.distributor.workers[worker], kind, id, held, self.now, 100 + id)
        if offered:
            self.processes[worker].read.remove(id)
        if kind in (Kind.REFUSED, FULL):
            self.came_back([id], [] if answer is None else [answer])
        elif kind == Kind.ACK:
            assert answer is None
            self.place([id], f"borrowed by {worker}")
        elif kind & Kind.KEPT:
            assert answer is None
            self.place([id], f"kept by {worker}")
        else:
            assert answer is connection
            self.place([id], "parked" if kind & (Kind.RETURNED | Kind.SILENT) and listens else None)

    def recall(self, worker: Worker) -> None:
        """Only what lies unread, and only if somebody else could have it, or it itself when it is free again."""
        process = self.processes[worker.id]
        assert not worker.ready
        wanted = {self.connections[id].listener for id in (*process.unread, *process.read)} & self.policies.keys()
        assert (worker.narrow and worker.open) or any(
            other.ready for key in wanted for other in self.policies[key].present.values() if other is not worker
        )
        ids = list(process.unread)
        process.unread.clear()
        self.came_back(ids, self.distributor.recalled(worker, reversed(ids)))

    def came_back(self, ids: list[int], orphans: list[Connection]) -> None:
        lost = [id for id in ids if self.connections[id].listener not in self.policies]
        assert sorted(connection.id for connection in orphans) == sorted(lost)
        self.place(ids, "lane")
        self.place(lost, None)

    def place(self, ids: list[int], place: str | None) -> None:
        self.places.update(dict.fromkeys(ids, place))

    # -- what must hold --

    def check_order(self, offers: list[tuple[Worker, Connection]]) -> None:
        """Within a lane by ticket, and none overtakes one that stays."""
        tickets: dict[object, list[int]] = {}
        for _, connection in offers:
            lane = getattr(self.policies[connection.listener], "lane", lambda _: None)(connection)
            tickets.setdefault((connection.listener, lane), []).append(connection.ticket)
            if connection.ticket not in self.offered:
                self.offered.add(connection.ticket)
                assert connection.ticket > self.last.get((connection.listener, lane), 0)
                self.last[connection.listener, lane] = connection.ticket
        for key in self.policies:
            for lane, queue in self.distributor.handles[key].lanes.items():
                order = [*tickets.get((key, lane), ()), *(connection.ticket for connection in queue)]
                assert order == sorted(order)

    def check_nobody_waits_for_nothing(self, moved: set[int]) -> None:
        for key, policy in self.policies.items():
            patience = getattr(policy.policy, "patience", 0.0)
            free = [
                worker
                for lane, queue in self.distributor.handles[key].lanes.items() if queue
                for worker in policy.eligible(lane) if worker.ready
            ]  # fmt: skip
            if not free:
                self.turns.pop(key, None)
                continue
            assert patience, f"{free} could serve listener {key}"
            if key in moved:
                self.turns.pop(key, None)
            end = self.turns.setdefault(key, self.now) + patience
            wake = getattr(policy.policy, "wake_at", None)
            assert wake is not None
            assert self.now < wake <= end

    @invariant()
    def every_connection_is_in_one_state_and_one_place(self) -> None:
        found = [(connection.id, place) for connection, place in where(self.distributor)]
        assert sorted(found) == sorted((id, place) for id, place in self.places.items() if place is not None)
        for id, place in self.places.items():
            connection = self.connections[id]
            words = (place or "gone").split()
            assert connection.state is {
                "lane": State.QUEUED, "parked": State.PARKED, "offered": State.OFFERED, "borrowed": State.BORROWED,
                "kept": State.KEPT, "gone": State.GONE,
            }[words[0]]  # fmt: skip
            assert connection.worker == (int(words[-1]) if len(words) > 1 else 0)
            assert connection.relics == sum(lost == id for _, lost in self.lost)

    @invariant()
    def the_counts_are_what_can_be_counted(self) -> None:
        counts = Counter(connection.state for connection in self.connections.values())
        statistics = self.distributor.statistics()
        lanes = [lane for handle in self.distributor.handles.values() for lane in handle.lanes.values()]
        assert self.distributor.queued == statistics.queued == counts[State.QUEUED] == sum(map(len, lanes))
        assert statistics.parked == counts[State.PARKED]
        assert statistics.offered == counts[State.OFFERED]
        assert statistics.borrowed == counts[State.BORROWED] + counts[State.KEPT]
        assert statistics.kept == counts[State.KEPT]

    @invariant()
    def no_worker_has_more_than_it_may(self) -> None:
        for worker in self.distributor.workers.values():
            process = self.processes[worker.id]
            assert set(worker.unacked) == {*process.unread, *process.read}
            assert len(worker.unacked) <= (1 if worker.suspect else workers.WINDOW)
            assert worker.capacity is None or len(worker.unacked) + len(worker.borrowed) <= worker.capacity


class NarrowShell(Shell):
    narrows = True


TestShell = Shell.TestCase
TestShell.settings = settings(deadline=None, max_examples=60, stateful_step_count=50)
TestNarrowShell = NarrowShell.TestCase
TestNarrowShell.settings = settings(deadline=None, max_examples=60, stateful_step_count=50)


class Walk:
    """The same rules in a random order that goes deep: what is served long chains of them need is rare above.

    Each seed is another walk, the same every time.
    """

    def __init__(self, kind: type[Shell], seed: int) -> None:
        self.chance = random.Random(seed)
        self.shell = kind()
        self.shell.start(self.chance.sample(["rr", "rr with patience", "least", "hash"], 2))

    def one(self) -> int:
        return self.chance.randrange(12)

    def some(self, least: int = 0) -> set[int]:
        return {self.one() for _ in range(self.chance.randint(least, 3))}

    def coin(self) -> bool:
        return self.chance.random() < 0.5

    def step(self) -> None:
        shell, chance, one, coin = self.shell, self.chance, self.one, self.coin
        known, processes = len(shell.policies), len(shell.processes)
        clients = chance.choices([b"", *CLIENTS], k=chance.randint(1, 4))
        # (how often, whether it may be, what it is)
        rules: list[tuple[float, bool, Callable[[], None]]] = [
            (6, True, lambda: shell.connect(one(), clients, chance.random() < 0.8)),
            (10, True, lambda: shell.read(one(), chance.randint(1, 4))),
            (14, True, lambda: shell.answer(one(), one(), chance.choice(sorted(OF_OFFERED)), coin())),
            (8, True, lambda: shell.finish(one(), one(), chance.choice(sorted(OF_BORROWED)), coin())),
            (4, True, lambda: shell.a_parked_one(one(), chance.random() < 0.8)),
            (3, True, lambda: shell.take_back(one(), self.some(1), coin())),
            (3, True, lambda: shell.drop(one(), chance.choice([None, Kind.RETURNED, Kind.CLOSED]))),
            (4, True, lambda: shell.look([chance.randrange(4) for _ in range(3)], coin(), coin(), coin())),
            (8, True, lambda: shell.turn(chance.choice(PAUSES), coin(), chance.choice([None, None, one()]), 1)),
            (1, True, lambda: shell.expire(self.some())),
            (0.3, True, shell.settle),
            (1, processes > 0, lambda: shell.lie(one(), chance.randrange(41), chance.randrange(256))),
            (1, processes > 0, lambda: shell.attach(one(), one())),
            (0.5, processes > 0, lambda: shell.detach(one(), one())),
            (0.5, processes > 0, lambda: shell.drain(one())),
            (0.7, processes > 0, lambda: shell.die(one(), self.some(), coin())),
            (1.5, processes < 5, lambda: shell.spawn(chance.randrange(SLOTS), chance.choice([None, None, 0, 1, 4]))),
            (0.3, known < 3, lambda: shell.open_listener(chance.choice(["rr", "rr with patience", "least", "hash"]))),
            (0.2, known > 1, lambda: shell.close_listener(one())),
        ]
        allowed = [(often, do) for often, may, do in rules if may]
        chance.choices([do for _, do in allowed], [often for often, _ in allowed])[0]()
        shell.only_what_is_parked_expires()
        shell.every_connection_is_in_one_state_and_one_place()
        shell.the_counts_are_what_can_be_counted()
        shell.no_worker_has_more_than_it_may()


@pytest.mark.parametrize("kind", [Shell, NarrowShell])
@pytest.mark.parametrize("seed", range(20))
def test_a_long_walk(kind: type[Shell], seed: int) -> None:
    walk = Walk(kind, seed)
    try:
        for _ in range(200):
            walk.step()
        walk.shell.settle()
    finally:
        walk.shell.teardown()


def test_nothing_is_recalled_for_a_sticky_policy() -> None:
    """Hash waits for one worker and no other: taking an offer back from it would only make the connection wait."""
    distributor = Distributor()
    distributor.add_handle(1, Hash(slots=2), client_speaks_first=True)
    for number in range(2):
        distributor.add_worker(number + 1, number)
        distributor.attach(number + 1, 1)
    distributor.accepted(Connection(1, 10, 1, client=b"\x01" * 16), waiting=True)
    [(worker, _)] = distributor.distribute(0.0)
    assert distributor.lateness.overdue(1.0) == []
    assert worker.stalled
    assert list(worker.unacked) == [1]
