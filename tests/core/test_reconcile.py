"""The reconciler: what is ordered when, and that every cluster comes to rest.

`Driver` executes plans against processes that do what the test says; the machine at the end lets them do anything.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clusterserve.core.connection import IllegalStep
from clusterserve.core.lifecycle import WorkerEvent, WorkerState
from clusterserve.core.reconcile import (
    Abort,
    Action,
    Drain,
    Kill,
    Plan,
    Spawn,
    Stop,
    Target,
    Verdict,
    plan,
)
from clusterserve.core.roster import Limits, Member, Roster
from clusterserve.core.wear import Wear

ONLINE, LISTENING, DISCONNECTED, EXITED = (
    WorkerEvent.ONLINE, WorkerEvent.LISTENING, WorkerEvent.DISCONNECTED, WorkerEvent.EXITED,
)  # fmt: skip


FINAL = 7
FINAL_LIMITS = Limits(final=frozenset({FINAL}))


class Driver:
    """A shell without processes: it executes plans, and every execution is a fact."""

    def __init__(self, target: Target, limits: Limits | None = None, wear: Wear | None = None) -> None:
        self.roster = Roster(limits or Limits())
        self.target = target
        #: What each new worker may take.
        self.wear = wear or Wear()
        self.now = 1000.0
        self.deadline: float | None = None
        self.verdict = Verdict.RUNNING
        self.stuck: tuple[int, ...] = ()
        #: (when, what) of all that was ever ordered.
        self.log: list[tuple[float, Action]] = []

    def ask(self) -> Plan:
        """Ask once; the plan is checked for what holds of any plan."""
        # As text: copies of it all would take most of the time of these tests.
        roster, before = self.roster, repr(self.roster)
        answer = plan(self.target, roster, self.now)
        assert repr(roster) == before
        assert answer.deadline is None or answer.deadline > self.now
        assert len(set(answer.actions)) == len(answer.actions)
        return answer

    def reconcile(self) -> list[Action]:
        """Execute plans until there is nothing to do; no action may be ordered twice on the way."""
        done: list[Action] = []
        for _ in range(5):
            answer = self.ask()
            self.deadline, self.verdict, self.stuck = answer.deadline, answer.verdict, answer.stuck
            if not answer.actions:
                return done
            assert set(done).isdisjoint(answer.actions)
            for action in answer.actions:
                self.execute(action)
                done.append(action)
        raise AssertionError(f"there is no end to it: {done}")

    def execute(self, action: Action) -> None:
        self.log.append((self.now, action))
        if isinstance(action, Spawn):
            self.roster.spawned(action.slot, action.generation, self.now, replace(self.wear))
        elif isinstance(action, Drain):
            assert not self.roster.members[action.worker].doomed
            self.roster.drained(action.worker, action.quick, self.now)
        elif isinstance(action, Abort):
            self.roster.aborted(action.worker, self.now)
        else:
            self.roster.killed(action.worker)

    def looks(self, seconds: float, *, every: float = 1.0, but: int = 0) -> list[Action]:
        """The master looks at its workers as time goes by; all but one send their heartbeats."""
        done: list[Action] = []
        end = self.now + seconds
        while self.now < end:
            self.now += every
            for member in self.roster.members.values():
                if member.id != but and member.listening is not None:
                    self.roster.heard(member.id, member.wear.served, self.now)
            self.roster.looked(self.now)
            done += self.reconcile()
        return done

    def happens(self, id: int, *events: WorkerEvent) -> list[Action]:
        for event in events:
            self.roster.happened(id, event, self.now)
        return self.reconcile()

    def at(self, now: float) -> list[Action]:
        assert now >= self.now
        self.now = now
        return self.reconcile()

    def wants(self, **changes: object) -> list[Action]:
        self.target = replace(self.target, **changes)  # type: ignore[arg-type]
        return self.reconcile()

    @property
    def slots(self) -> dict[int, int]:
        """Which worker serves or boots in which slot."""
        return {member.slot: member.id for member in self.roster.members.values() if member.current}


def running(count: int = 2, limits: Limits | None = None, wear: Wear | None = None) -> Driver:
    """A cluster whose workers 1 … count have been listening for a while, at time 1010."""
    driver = Driver(Target(count), limits, wear)
    driver.reconcile()
    for id in range(1, count + 1):
        driver.happens(id, ONLINE, LISTENING)
    driver.at(1010.0)
    assert driver.verdict is Verdict.SETTLED
    return driver


class TestStart:
    def test_all_workers_start_at_once(self) -> None:
        driver = Driver(Target(3))
        assert driver.reconcile() == [Spawn(0, 1), Spawn(1, 1), Spawn(2, 1)]
        assert [(member.id, member.slot) for member in driver.roster.members.values()] == [(1, 0), (2, 1), (3, 2)]
        assert driver.verdict is Verdict.RUNNING

    def test_settled_when_all_listen(self) -> None:
        driver = Driver(Target(2))
        driver.reconcile()
        driver.happens(1, ONLINE, LISTENING)
        assert driver.verdict is Verdict.RUNNING
        driver.happens(2, ONLINE)
        assert driver.verdict is Verdict.RUNNING
        driver.happens(2, LISTENING)
        assert (driver.verdict, driver.deadline) == (Verdict.SETTLED, None)

    def test_the_second_server_of_a_worker_changes_nothing(self) -> None:
        driver = running()
        since = driver.roster.members[1].listening
        assert driver.happens(1, LISTENING) == []
        assert driver.roster.members[1].listening == since

    def test_who_does_not_listen_in_time_is_killed_once(self) -> None:
        driver = Driver(Target(2), Limits(boot=60.0))
        driver.reconcile()
        driver.happens(1, ONLINE, LISTENING)
        driver.happens(2, ONLINE)
        assert driver.deadline == 1060.0
        assert driver.at(1059.9) == []
        assert driver.at(1060.0) == [Kill(2, "it did not listen within 60 s")]
        assert (driver.at(1100.0), driver.deadline) == ([], None)
        assert driver.happens(2, EXITED) == []
        assert driver.deadline == pytest.approx(1100.1)
        assert driver.at(driver.deadline) == [Spawn(1, 1)]

    def test_without_a_limit_it_may_take_for_ever(self) -> None:
        driver = Driver(Target(1), Limits(boot=0))
        driver.reconcile()
        assert (driver.at(1e9), driver.deadline) == ([], None)

    def test_nobody_wanted_is_settled_at_once(self) -> None:
        driver = Driver(Target(0))
        assert driver.reconcile() == []
        assert driver.verdict is Verdict.SETTLED


class TestABrokenApplication:
    @pytest.mark.parametrize("how", [(EXITED,), (ONLINE, EXITED), (ONLINE, DISCONNECTED, EXITED)])
    def test_no_respawn_before_anyone_ever_listened(self, how: tuple[WorkerEvent, ...]) -> None:
        driver = Driver(Target(3))
        driver.reconcile()
        for id in (1, 2, 3):
            assert driver.verdict is Verdict.RUNNING
            for event in how:
                assert driver.happens(id, event) == []
        assert (driver.verdict, driver.deadline) == (Verdict.FAILED, None)
        assert driver.at(2000.0) == []
        assert driver.verdict is Verdict.FAILED

    def test_it_has_not_failed_while_one_still_boots(self) -> None:
        driver = Driver(Target(2))
        driver.reconcile()
        driver.happens(1, EXITED)
        assert driver.verdict is Verdict.RUNNING
        assert driver.deadline == 1060.0
        assert driver.at(1060.0) == [Kill(2, "it did not listen within 60 s")]
        assert driver.verdict is Verdict.RUNNING
        driver.happens(2, EXITED)
        assert driver.verdict is Verdict.FAILED

    def test_once_one_listens_the_others_get_their_second_chance(self) -> None:
        driver = Driver(Target(2))
        driver.reconcile()
        driver.happens(1, EXITED)
        driver.now += 5
        assert driver.happens(2, ONLINE, LISTENING) == [Spawn(0, 1)]

    def test_a_cluster_that_has_served_never_fails(self) -> None:
        driver = running(1)
        driver.happens(1, EXITED)
        for id in range(2, 12):
            assert driver.verdict is Verdict.RUNNING
            if id not in driver.roster.members:
                assert driver.deadline is not None
                driver.at(driver.deadline)
            driver.happens(id, EXITED)
        assert driver.verdict is Verdict.RUNNING


class TestRespawn:
    def test_a_healthy_worker_is_replaced_at_once_in_its_slot(self) -> None:
        driver = running()
        assert driver.happens(1, EXITED) == [Spawn(0, 1)]
        assert driver.slots == {0: 3, 1: 2}

    def test_the_delay_doubles_up_to_its_limit(self) -> None:
        driver = running(2, Limits(backoff=0.1, backoff_max=1.0))
        driver.happens(1, EXITED)
        delays = []
        for id in range(3, 10):
            assert driver.happens(id, EXITED) == []
            assert driver.deadline is not None
            delays.append(driver.deadline - driver.now)
            assert driver.at(driver.deadline) == [Spawn(0, 1)]
        assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0])

    def test_it_doubles_for_ever_without_an_overflow(self) -> None:
        driver = running()
        driver.happens(1, EXITED)
        driver.roster.slots[0].failures = 5000
        driver.happens(3, EXITED)
        assert driver.deadline == 1010.0 + 15.0

    def test_one_that_listened_long_enough_was_healthy(self) -> None:
        driver = running(2, Limits(backoff=0.1, min_uptime=1.0))
        driver.happens(1, EXITED)
        driver.happens(3, EXITED)
        driver.at(1010.1)
        driver.happens(4, ONLINE, LISTENING)
        # Not long enough.
        driver.at(1011.0)
        assert driver.happens(4, EXITED) == []
        assert driver.deadline == pytest.approx(1011.2)
        driver.at(1012.0)
        driver.happens(5, ONLINE, LISTENING)
        # Long enough: at once, and the next failure starts over.
        driver.at(1013.0)
        assert driver.happens(5, EXITED) == [Spawn(0, 1)]
        assert driver.happens(6, EXITED) == []
        assert driver.deadline == pytest.approx(1013.1)

    def test_failures_are_forgotten_when_a_healthy_worker_is_told_to_leave(self) -> None:
        driver = running(1, Limits(backoff=1.0, backoff_max=100.0, min_uptime=1.0))
        driver.happens(1, EXITED)
        for id in (2, 3, 4):
            driver.happens(id, EXITED)
            assert driver.deadline is not None
            driver.at(driver.deadline)
        driver.happens(5, ONLINE, LISTENING)
        driver.now += 0.5
        driver.wants(count=0)
        assert driver.roster.slots[0].failures == 3
        driver.wants(count=1)
        driver.happens(6, ONLINE, LISTENING)
        driver.now += 1.0
        driver.wants(count=0)
        assert driver.roster.slots[0].failures == 0

    def test_slots_fail_each_for_itself(self) -> None:
        driver = running(2, Limits(backoff=1.0))
        driver.happens(1, EXITED)
        driver.happens(3, EXITED)
        assert driver.happens(2, EXITED) == [Spawn(1, 1)]

    def test_a_worker_that_closed_its_channel_is_replaced_and_killed_if_it_stays(self) -> None:
        driver = running(2, Limits(disconnected=5.0))
        assert driver.happens(1, DISCONNECTED) == [Spawn(0, 1)]
        driver.happens(3, ONLINE, LISTENING)
        assert (driver.verdict, driver.deadline) == (Verdict.RUNNING, 1015.0)
        assert driver.at(1015.0) == [Kill(1, "it closed its channel but did not exit")]
        assert driver.at(1030.0) == []
        driver.happens(1, EXITED)
        assert driver.verdict is Verdict.SETTLED

    def test_a_channel_that_closes_before_the_exit_is_one_failure_and_waited_for(self) -> None:
        """Every death begins with the end of the channel; the exit is learned a moment later."""
        driver = running(1, Limits(backoff=1.0))
        driver.happens(1, EXITED)
        driver.happens(2, ONLINE)
        assert driver.happens(2, DISCONNECTED) == []
        assert driver.deadline == 1011.0
        driver.now += 0.5
        assert driver.happens(2, EXITED) == []
        assert driver.roster.slots[0].failures == 1
        assert driver.deadline == 1011.0
        assert driver.at(1011.0) == [Spawn(0, 1)]


class TestGivenUp:
    """What does not help is done rarely, and told."""

    def test_after_so_many_restarts_in_a_row_it_waits_the_longest(self) -> None:
        driver = running(2, Limits(backoff=0.1, backoff_max=60.0, max_restarts=2))
        driver.happens(1, EXITED)
        delays = []
        for id in (3, 4, 5, 6):
            assert driver.happens(id, EXITED) == []
            assert driver.deadline is not None
            delays.append((driver.deadline - driver.now, driver.ask().given_up))
            driver.at(driver.deadline)
        assert delays == [(pytest.approx(0.1), ()), (pytest.approx(0.2), ()), *[(pytest.approx(60.0), (0,))] * 2]
        # One that is healthy makes all of it forgotten, as somebody does who orders a change.
        driver.happens(7, ONLINE, LISTENING)
        driver.at(driver.now + 1.0)
        assert driver.happens(7, EXITED) == [Spawn(0, 1)]
        assert driver.ask().given_up == ()

    def test_never(self) -> None:
        driver = running(1, Limits(max_restarts=0))
        driver.happens(1, EXITED)
        driver.roster.slots[0].failures = 5000
        assert driver.ask().given_up == ()


class TestEndsForGood:
    """Exit codes with which a worker says that it is not to be restarted."""

    def ends(self, driver: Driver, id: int, code: int | None = FINAL) -> list[Action]:
        driver.roster.ended(id, code)
        return driver.happens(id, EXITED)

    def test_nobody_follows_and_the_others_go_on(self) -> None:
        driver = running(2, FINAL_LIMITS)
        assert self.ends(driver, 1) == []
        assert (driver.verdict, driver.deadline, driver.slots) == (Verdict.SETTLED, None, {1: 2})
        # Another code, a signal.
        assert self.ends(driver, 2, 8) == [Spawn(1, 1)]
        driver.happens(3, ONLINE, LISTENING)
        driver.now += 1.0
        assert self.ends(driver, 3, None) == [Spawn(1, 1)]

    def test_when_all_have_the_cluster_is_deserted(self) -> None:
        driver = running(2, FINAL_LIMITS)
        self.ends(driver, 1)
        self.ends(driver, 2)
        assert (driver.verdict, driver.deadline) == (Verdict.DESERTED, None)

    def test_until_its_exit_is_known_nobody_follows(self) -> None:
        driver = running(2, FINAL_LIMITS)
        assert driver.happens(1, DISCONNECTED) == []
        assert self.ends(driver, 1) == []
        assert driver.slots == {1: 2}
        assert driver.happens(2, DISCONNECTED) == []
        assert self.ends(driver, 2, 0) == [Spawn(1, 1)]

    def test_who_was_told_to_go_is_replaced(self) -> None:
        driver = running(2, FINAL_LIMITS)
        driver.execute(Drain(1, quick=False, interrupt=False, keep=True))
        assert driver.reconcile() == [Spawn(0, 1)]
        assert self.ends(driver, 1) == []
        assert driver.slots == {0: 3, 1: 2}

    def test_a_change_that_is_ordered_starts_it_again(self) -> None:
        driver = running(2, FINAL_LIMITS)
        self.ends(driver, 1)
        driver.roster.forgiven(driver.now)
        assert driver.reconcile() == [Spawn(0, 1)]

    def test_before_anybody_listened_it_is_a_failure_to_start(self) -> None:
        driver = Driver(Target(1), FINAL_LIMITS)
        driver.reconcile()
        assert self.ends(driver, 1) == []
        assert driver.verdict is Verdict.FAILED


class TestScale:
    def test_up(self) -> None:
        driver = running(2)
        assert driver.wants(count=4) == [Spawn(2, 1), Spawn(3, 1)]

    def test_down_takes_the_highest_slots(self) -> None:
        driver = running(4)
        assert driver.wants(count=2) == [Drain(3, False, False, True), Drain(4, False, False, True)]
        assert driver.verdict is Verdict.RUNNING
        driver.happens(3, DISCONNECTED, EXITED)
        assert driver.happens(4, EXITED) == []
        assert driver.verdict is Verdict.SETTLED
        assert driver.slots == {0: 1, 1: 2}

    def test_down_while_one_boots(self) -> None:
        driver = Driver(Target(2))
        driver.reconcile()
        assert driver.wants(count=1) == [Drain(2, False, True, True)]
        # What it had sent before it read that is late and changes nothing.
        assert driver.happens(2, ONLINE, LISTENING) == []
        assert driver.roster.members[2].state is WorkerState.DRAINING
        assert driver.roster.proven == 0

    def test_down_and_up_again_starts_a_new_worker_beside_the_leaving_one(self) -> None:
        driver = running(2)
        driver.wants(count=1)
        assert driver.wants(count=2) == [Spawn(1, 1)]
        assert driver.slots == {0: 1, 1: 3}

    def test_one_that_was_asked_to_leave_did_not_fail(self) -> None:
        driver = running(2)
        driver.wants(count=1)
        driver.happens(2, EXITED)
        assert driver.roster.slots[1].failures == 0
        assert driver.wants(count=2) == [Spawn(1, 1)]

    def test_who_does_not_finish_in_time_is_killed(self) -> None:
        driver = running(2, Limits(graceful=30.0))
        driver.wants(count=1)
        assert driver.deadline == 1040.0
        assert driver.at(1040.0) == [Kill(2, "it did not finish within 30 s")]

    def test_one_that_disconnects_while_it_drains_has_a_time_of_its_own(self) -> None:
        driver = running(2, Limits(graceful=30.0, disconnected=5.0))
        driver.wants(count=1)
        driver.at(1020.0)
        driver.happens(2, DISCONNECTED)
        assert driver.deadline == 1025.0
        assert driver.at(1025.0) == [Kill(2, "it closed its channel but did not exit")]
        driver.happens(2, EXITED)
        assert driver.verdict is Verdict.SETTLED


class TestReload:
    def test_one_at_a_time_and_the_old_one_leaves_when_the_new_one_listens(self) -> None:
        driver = running(3)
        assert driver.wants(generation=2) == [Spawn(0, 2)]
        driver.happens(4, ONLINE)
        assert driver.happens(4, LISTENING) == [Spawn(1, 2), Drain(1, False, False, True)]
        assert driver.happens(1, DISCONNECTED, EXITED) == []
        assert driver.happens(5, ONLINE, LISTENING) == [Spawn(2, 2), Drain(2, False, False, True)]
        assert driver.happens(6, ONLINE, LISTENING) == [Drain(3, False, False, True)]
        driver.happens(2, EXITED)
        assert driver.verdict is Verdict.RUNNING
        driver.happens(3, EXITED)
        assert driver.verdict is Verdict.SETTLED
        assert driver.slots == {0: 4, 1: 5, 2: 6}

    def test_surge_at_a_time(self) -> None:
        driver = running(5, Limits(surge=2))
        driver.target = replace(driver.target, generation=2)
        assert driver.ask().actions == (Spawn(0, 2), Spawn(1, 2))
        assert driver.reconcile() == [Spawn(0, 2), Spawn(1, 2)]
        assert driver.happens(6, ONLINE, LISTENING) == [Spawn(2, 2), Drain(1, False, False, True)]
        assert driver.happens(7, ONLINE, LISTENING) == [Spawn(3, 2), Drain(2, False, False, True)]

    def test_a_generation_that_cannot_start_leaves_the_old_one_serving(self) -> None:
        driver = running(2, Limits(backoff=1.0, backoff_max=4.0))
        driver.wants(generation=2)
        assert driver.happens(3, ONLINE, EXITED) == []
        assert driver.verdict is Verdict.REJECTED
        assert driver.deadline is None
        assert driver.wants(generation=1) == []
        assert driver.verdict is Verdict.SETTLED
        assert driver.slots == {0: 1, 1: 2}
        # The next one has to wait as after any failure, and is not taken for the one before.
        assert driver.wants(generation=3) == []
        assert driver.verdict is Verdict.RUNNING
        assert driver.at(1011.0) == [Spawn(0, 3)]
        assert driver.happens(4, ONLINE, LISTENING) == [Spawn(1, 3), Drain(1, False, False, True)]

    def test_a_generation_is_rejected_when_who_failed_is_dead(self) -> None:
        driver = running(2)
        driver.wants(generation=2)
        assert driver.happens(3, ONLINE, DISCONNECTED) == []
        assert driver.verdict is Verdict.RUNNING
        assert driver.at(1014.0) == []
        assert driver.happens(3, EXITED) == []
        assert driver.verdict is Verdict.REJECTED

    def test_an_old_worker_that_dies_while_a_generation_is_rejected_is_replaced_afterwards(self) -> None:
        driver = running(2)
        driver.wants(generation=2)
        driver.happens(3, ONLINE, DISCONNECTED)
        assert driver.happens(1, EXITED) == []
        driver.happens(3, EXITED)
        assert driver.verdict is Verdict.REJECTED
        assert driver.wants(generation=1) == [Spawn(0, 1)]

    def test_one_of_a_generation_that_has_listened_may_die(self) -> None:
        driver = running(2)
        driver.wants(generation=2)
        driver.happens(3, ONLINE, LISTENING)
        driver.happens(4, EXITED)
        assert driver.verdict is Verdict.RUNNING

    def test_before_anything_listened_nothing_is_rejected(self) -> None:
        driver = Driver(Target(1))
        driver.reconcile()
        driver.wants(generation=2)
        driver.happens(2, EXITED)
        assert driver.verdict is not Verdict.REJECTED

    def test_a_worker_of_the_old_generation_that_dies_meanwhile_is_replaced_by_a_new_one(self) -> None:
        driver = running(3)
        driver.wants(generation=2)
        assert driver.happens(3, EXITED) == [Spawn(2, 2)]
        # Two boot now, one more than in a reload alone: an empty slot is worth more than the pace.
        assert driver.happens(4, ONLINE, LISTENING) == [Drain(1, False, False, True)]
        assert driver.happens(5, ONLINE, LISTENING) == [Spawn(1, 2)]

    def test_a_healthy_worker_that_dies_does_not_wait_for_what_its_replacement_did_wrong(self) -> None:
        driver = running(1, Limits(backoff=5.0))
        driver.wants(generation=2)
        assert driver.happens(2, EXITED) == []
        assert driver.wants(generation=1) == []
        assert driver.happens(1, EXITED) == [Spawn(0, 1)]

    def test_another_reload_before_the_first_is_over(self) -> None:
        """1. A replacement of generation 2 boots.  2. Generation 3 is wanted.
        Result: the one that boots is of no use to anybody and leaves; a replacement of generation 3 takes its place.
        """
        driver = running(2)
        driver.wants(generation=2)
        assert driver.wants(generation=3) == [Spawn(0, 3), Drain(3, False, True, True)]
        driver.happens(3, EXITED)
        assert driver.happens(4, ONLINE, LISTENING) == [Spawn(1, 3), Drain(1, False, False, True)]

    def test_another_reload_in_the_moment_a_replacement_came_up(self) -> None:
        """1. A replacement listens.  2. Before that is acted upon, the next generation is wanted.
        Result: the oldest leaves all the same, so that the slot never has three; the slot with the oldest worker is
        first.
        """
        driver = running(2)
        driver.wants(generation=2)
        driver.roster.happened(3, ONLINE, driver.now)
        driver.roster.happened(3, LISTENING, driver.now)
        assert driver.wants(generation=3) == [Spawn(1, 3), Drain(1, False, False, True)]
        assert driver.happens(4, ONLINE, LISTENING) == [Spawn(0, 3), Drain(2, False, False, True)]

    def test_fewer_of_a_new_generation(self) -> None:
        """Who is one too many leaves when somebody of the new generation serves: it may be rejected."""
        driver = running(3)
        assert driver.wants(generation=2, count=1) == [Spawn(0, 2)]
        assert sorted(driver.happens(4, ONLINE, LISTENING), key=repr) == [
            Drain(id, False, False, True) for id in (1, 2, 3)
        ]

    def test_fewer_of_a_new_generation_that_is_rejected(self) -> None:
        driver = running(3)
        driver.wants(generation=2, count=1)
        assert driver.happens(4, ONLINE, EXITED) == []
        assert driver.verdict is Verdict.REJECTED
        assert driver.wants(generation=1, count=3) == []
        assert driver.verdict is Verdict.SETTLED
        assert driver.slots == {0: 1, 1: 2, 2: 3}

    def test_more_of_a_new_generation(self) -> None:
        """None of the old one is started for it."""
        driver = running(1)
        assert driver.wants(generation=2, count=2) == [Spawn(1, 2), Spawn(0, 2)]

    def test_none_of_a_new_generation(self) -> None:
        driver = running(2)
        assert driver.wants(generation=2, count=0) == [Drain(1, False, False, True), Drain(2, False, False, True)]

    def test_back_to_the_old_generation(self) -> None:
        driver = running(3, Limits(surge=2))
        driver.wants(generation=2)
        driver.happens(4, ONLINE, LISTENING)
        # Slot 0 has been replaced, slots 1 and 2 are being.
        assert driver.wants(generation=1) == [Spawn(0, 1), Drain(5, False, True, True), Drain(6, False, True, True)]
        assert driver.happens(7, ONLINE, LISTENING) == [Drain(4, False, False, True)]
        for id in (1, 4, 5, 6):
            driver.happens(id, EXITED)
        assert driver.verdict is Verdict.SETTLED
        assert driver.slots == {0: 7, 1: 2, 2: 3}

    def test_back_to_the_old_generation_in_the_moment_a_replacement_came_up(self) -> None:
        driver = running(2)
        driver.wants(generation=2)
        driver.roster.happened(3, ONLINE, driver.now)
        driver.roster.happened(3, LISTENING, driver.now)
        assert driver.wants(generation=1) == [Drain(3, False, False, True)]
        assert driver.slots == {0: 1, 1: 2}

    def test_one_that_boots_is_not_abandoned_while_nobody_listens(self) -> None:
        """Reloads faster than a worker boots would leave nobody."""
        driver = running(1)
        driver.happens(1, EXITED)
        driver.at(driver.now + 1.0)
        booting = max(driver.roster.members)
        assert Drain(booting, False, True, True) not in driver.wants(generation=2)
        assert Drain(booting, False, True, True) not in driver.wants(generation=3)
        driver.happens(booting, ONLINE, LISTENING)
        assert driver.roster.members[booting].current

    def test_one_that_boots_where_nobody_serves_is_not_abandoned_either(self) -> None:
        """Others serve, but not for long: reloads faster than a worker boots would leave nobody in the end."""
        driver = running(2)
        driver.happens(2, EXITED)
        driver.at(driver.now + 1.0)
        booting = max(driver.roster.members)
        seen = [*driver.wants(generation=2), *driver.wants(generation=3), *driver.wants(generation=4)]
        assert Drain(booting, False, True, True) not in seen
        driver.happens(booting, ONLINE, LISTENING)
        assert driver.roster.members[booting].current
        # Nor does each reload leave one more that boots.
        assert sum(member.current and member.slot == 1 for member in driver.roster.members.values()) <= 2

    def test_a_reload_of_a_cluster_that_has_not_come_up_starts_over(self) -> None:
        driver = Driver(Target(2))
        driver.reconcile()
        assert driver.wants(generation=2) == [
            Spawn(0, 2),
            Spawn(1, 2),
            Drain(1, False, True, True),
            Drain(2, False, True, True),
        ]


class TestWornWorkers:
    """A worker that has taken enough is replaced: the replacement listens before it leaves."""

    def test_the_replacement_listens_first(self) -> None:
        driver = running(2, wear=Wear(requests=100))
        assert not driver.roster.heard(1, 99, driver.now)
        assert driver.reconcile() == []
        assert driver.roster.heard(1, 100, driver.now)
        assert driver.reconcile() == [Spawn(0, 1, 1, "has served 100 requests")]
        assert driver.happens(3, ONLINE) == []
        assert driver.happens(3, LISTENING) == [Drain(1, False, False, True)]
        assert driver.happens(1, EXITED) == []
        assert (driver.slots, driver.verdict) == ({0: 3, 1: 2}, Verdict.SETTLED)

    def test_one_at_a_time_and_the_oldest_first(self) -> None:
        driver = running(3, wear=Wear(requests=100))
        driver.happens(1, EXITED)
        driver.happens(4, ONLINE, LISTENING)
        for id in (2, 3, 4):
            driver.roster.heard(id, 100 + id, driver.now)
        assert driver.reconcile() == [Spawn(1, 1, 2, "has served 102 requests")]
        assert driver.happens(5, ONLINE, LISTENING) == [
            Spawn(2, 1, 3, "has served 103 requests"),
            Drain(2, False, False, True),
        ]
        assert driver.happens(6, ONLINE, LISTENING) == [
            Spawn(0, 1, 4, "has served 104 requests"),
            Drain(3, False, False, True),
        ]

    def test_surge_at_a_time(self) -> None:
        driver = running(3, Limits(surge=2), Wear(requests=1))
        for id in (1, 2, 3):
            driver.roster.heard(id, 1, driver.now)
        assert [action.slot for action in driver.reconcile() if isinstance(action, Spawn)] == [0, 1]

    def test_a_replacement_that_cannot_start_leaves_the_worn_one_serving(self) -> None:
        driver = running(2, Limits(backoff=1.0, backoff_max=2.0), Wear(requests=100))
        driver.roster.heard(1, 100, driver.now)
        driver.roster.heard(2, 100, driver.now)
        spawn = Spawn(0, 1, 1, "has served 100 requests")
        assert driver.reconcile() == [spawn]
        for id, wait in ((3, 1.0), (4, 2.0), (5, 2.0)):
            # Nor is it tried with the other one: what made this one fail may make that one fail too.
            assert driver.happens(id, ONLINE, EXITED) == []
            assert driver.verdict is Verdict.SETTLED
            assert driver.deadline == driver.now + wait
            assert driver.slots == {0: 1, 1: 2}
            assert driver.at(driver.deadline) == [spawn]
        assert driver.happens(6, ONLINE, LISTENING)[1] == Drain(1, False, False, True)

    def test_a_worn_worker_that_dies_before_its_replacement_listens(self) -> None:
        driver = running(1, wear=Wear(requests=1))
        driver.roster.heard(1, 1, driver.now)
        driver.reconcile()
        assert driver.happens(1, EXITED) == []
        assert driver.happens(2, ONLINE, LISTENING) == []
        assert driver.verdict is Verdict.SETTLED

    def test_a_replacement_that_is_worn_at_once(self) -> None:
        driver = running(1, wear=Wear(requests=1))
        driver.roster.heard(1, 1, driver.now)
        driver.reconcile()
        driver.roster.happened(2, ONLINE, driver.now)
        driver.roster.happened(2, LISTENING, driver.now)
        driver.roster.heard(2, 1, driver.now)
        assert driver.reconcile() == [Spawn(0, 1, 2, "has served 1 requests"), Drain(1, False, False, True)]

    def test_a_worn_worker_of_a_slot_that_is_not_wanted_just_leaves(self) -> None:
        driver = running(2, wear=Wear(requests=1))
        driver.roster.heard(2, 1, driver.now)
        assert driver.wants(count=1) == [Drain(2, False, False, True)]

    def test_a_reload_replaces_the_worn_as_well(self) -> None:
        driver = running(1, wear=Wear(requests=1))
        driver.roster.heard(1, 1, driver.now)
        driver.reconcile()
        assert driver.wants(generation=2) == [Spawn(0, 2), Drain(2, False, True, True)]
        assert driver.happens(3, ONLINE, LISTENING) == [Drain(1, False, False, True)]

    def test_after_a_rejected_reload_the_worn_one_stays_and_it_is_tried_again(self) -> None:
        driver = running(1, Limits(backoff=1.0), Wear(requests=1))
        driver.wants(generation=2)
        driver.roster.heard(1, 1, driver.now)
        driver.happens(2, EXITED)
        assert driver.verdict is Verdict.REJECTED
        assert driver.wants(generation=1) == []
        assert driver.at(1011.0) == [Spawn(0, 1, 1, "has served 1 requests")]
        assert driver.slots == {0: 3}
        assert driver.happens(3, EXITED) == []
        assert (driver.slots, driver.deadline) == ({0: 1}, 1013.0)

    def test_nobody_is_replaced_who_boots_or_leaves(self) -> None:
        driver = Driver(Target(1), wear=Wear(requests=1))
        driver.reconcile()
        driver.roster.heard(1, 5, driver.now)
        assert driver.reconcile() == []
        driver.wants(count=0)
        driver.roster.heard(1, 6, driver.now)
        assert driver.reconcile() == []

    def test_age_is_a_deadline(self) -> None:
        driver = running(2, wear=Wear(lifetime=60.0))
        assert driver.deadline == 1060.0
        assert driver.at(1059.0) == []
        assert driver.at(1060.0) == [Spawn(0, 1, 1, "has served for 60 s")]
        driver.now = 1061.0
        assert driver.happens(3, ONLINE, LISTENING) == [
            Spawn(1, 1, 2, "has served for 60 s"),
            Drain(1, False, False, True),
        ]
        driver.happens(1, EXITED)
        driver.happens(4, ONLINE, LISTENING)
        driver.happens(2, EXITED)
        assert (driver.verdict, driver.deadline) == (Verdict.SETTLED, 1121.0)

    def test_memory(self) -> None:
        driver = running(1, wear=Wear(rss=1 << 20, samples=2))
        assert not driver.roster.weighed(1, 2 << 20, driver.now)
        assert driver.roster.weighed(1, 2 << 20, driver.now)
        assert driver.reconcile() == [Spawn(0, 1, 1, "holds 2 MiB of memory, more than 1")]


class TestWhatIsSomebodyElsesBusiness:
    """Programs that fork, end and debug workers themselves."""

    def test_nobody_is_started_replaced_or_sent_away(self) -> None:
        driver = Driver(Target(0, manual=True), wear=Wear(requests=1))
        assert driver.reconcile() == []
        assert driver.verdict is Verdict.SETTLED
        # Two in one slot, and one of them worn.
        for id in (1, 2):
            driver.roster.spawned(0, 1, driver.now, Wear(requests=1))
            assert driver.happens(id, ONLINE, LISTENING) == []
        assert driver.roster.heard(1, 1, driver.now)
        assert driver.reconcile() == []
        assert driver.happens(1, EXITED) == []
        assert driver.verdict is Verdict.SETTLED

    def test_one_that_does_not_act_on_sigterm_is_killed_at_its_time_and_it_counts_from_the_first(self) -> None:
        driver = running(1, Limits(graceful=30.0))
        began = driver.now
        driver.roster.terminated(1, began)
        assert driver.reconcile() == []
        driver.roster.terminated(1, began + 10.0)
        assert driver.deadline == began + 30.0
        assert driver.at(began + 30.0) == [Kill(1, "it does not act on SIGTERM")]

    def test_who_is_debugged_may_stand_still_and_take_its_time_to_listen(self) -> None:
        driver = Driver(Target(1), Limits(timeout=4.0, boot=60.0))
        driver.reconcile()
        driver.roster.debugging(1)
        assert driver.at(driver.now + 1000.0) == []
        assert driver.happens(1, ONLINE, LISTENING) == []
        assert driver.looks(20.0, but=1) == []


class TestHungWorkers:
    """Silence, told by looks of a master that is awake."""

    ABORT = Abort(1, "its event loop has not turned for 4 s")

    def test_it_is_told_to_write_its_stacks_and_then_killed(self) -> None:
        driver = running(2, Limits(timeout=4.0, abort=1.0))
        assert driver.looks(5.0, but=1) == []
        assert driver.looks(1.0, but=1) == [self.ABORT]
        assert driver.deadline == driver.now + 1.0
        assert driver.at(driver.deadline) == [Kill(1, "it was hung, and did not die of SIGABRT")]
        assert driver.happens(1, EXITED) == [Spawn(0, 1)]
        assert driver.slots == {0: 3, 1: 2}

    def test_it_mostly_dies_of_the_first(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        driver.looks(6.0, but=1)
        assert driver.happens(1, EXITED) == [Spawn(0, 1)]
        assert driver.looks(20.0) == []

    def test_who_is_heard_of_in_time_is_not_hung(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        for _ in range(5):
            assert driver.looks(4.0, but=1) == []
            driver.roster.heard(1, 0, driver.now)

    def test_one_whose_loop_turns_and_whose_threads_are_stuck(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        told: list[object] = []
        for _ in range(6):
            assert not told
            # Of its loop there is news: whoever asks for that hears it.
            driver.roster.heard(1, 0, driver.now, stuck=True)
            assert driver.roster.responsive(1.0, driver.now)
            told = driver.looks(1.0, but=1)
        assert told == [Abort(1, "nothing has come of its threads for 4 s")]

    def test_one_whose_threads_get_on_in_between(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        for turn in range(20):
            driver.roster.heard(1, 0, driver.now, stuck=turn % 4 != 0)
            assert driver.looks(1.0, but=1) == []

    def test_off(self) -> None:
        driver = running(1, Limits(timeout=0.0))
        assert driver.looks(1000.0, but=1) == []

    @pytest.mark.parametrize("slept", [10.0, 3600.0])
    def test_what_a_master_that_slept_did_not_hear_does_not_count(self, slept: float) -> None:
        """1. A worker has been silent for a while.  2. Everything sleeps.  3. The master wakes first, twice.
        Result: the worker has the time that a worker has between two heartbeats, and more.
        """
        driver = running(1, Limits(timeout=4.0))
        driver.looks(2.0, but=1)
        assert driver.looks(slept, every=slept, but=1) == []
        assert driver.looks(1.0, but=1) == []
        driver.roster.heard(1, 0, driver.now)
        assert driver.looks(4.0, but=1) == []

    def test_a_master_that_is_always_late_counts_its_looks(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        assert driver.looks(90.0, every=20.0, but=1) == []
        assert driver.looks(20.0, every=20.0, but=1) == [self.ABORT]

    def test_who_boots_has_a_time_of_its_own(self) -> None:
        driver = Driver(Target(1), Limits(timeout=4.0, boot=60.0))
        driver.reconcile()
        driver.roster.looked(driver.now)
        assert driver.looks(59.0) == []
        driver.happens(1, ONLINE, LISTENING)
        # Its silence begins with its listening, in the midst between two looks.
        driver.now += 0.5
        driver.roster.looked(driver.now)
        assert driver.roster.members[1].silence == pytest.approx(0.5)

    def test_who_leaves_has_a_time_of_its_own(self) -> None:
        driver = running(1, Limits(timeout=4.0, graceful=30.0))
        driver.wants(count=0)
        assert driver.looks(29.0, but=1) == []

    def test_a_hung_worker_is_not_told_to_stop(self) -> None:
        driver = running(2, Limits(timeout=4.0))
        driver.looks(6.0, but=1)
        assert driver.wants(stop=Stop.GRACEFUL) == [Drain(2, False, False, False)]
        assert driver.at(driver.now + 1.0) == [Kill(1, "it was hung, and did not die of SIGABRT")]

    def test_nor_to_make_place(self) -> None:
        driver = running(2, Limits(timeout=4.0))
        driver.looks(6.0, but=2)
        assert driver.wants(count=1) == []

    def test_a_hung_worker_of_the_old_generation(self) -> None:
        driver = running(1, Limits(timeout=4.0))
        driver.looks(6.0, but=1)
        assert driver.wants(generation=2) == [Spawn(0, 2)]
        assert driver.happens(2, ONLINE, LISTENING) == []
        assert driver.happens(1, EXITED) == []
        assert driver.verdict is Verdict.SETTLED


class TestAChangeThatMayNeverBe:
    def test_a_new_slot_whose_workers_die(self) -> None:
        driver = running(1, Limits(tries=3))
        driver.wants(count=2)
        for id in (2, 3, 4):
            assert driver.stuck == ()
            driver.happens(id, ONLINE, EXITED)
            assert driver.verdict is Verdict.RUNNING
            assert driver.deadline is not None
            if id < 4:
                driver.at(driver.deadline)
        assert driver.stuck == (1,)
        # It goes on, and who comes to listen after all is welcome.
        assert driver.at(driver.deadline) == [Spawn(1, 1)]
        driver.happens(5, ONLINE, LISTENING)
        assert (driver.stuck, driver.verdict) == ((), Verdict.SETTLED)

    def test_a_reload_of_which_only_the_first_came_up(self) -> None:
        driver = running(2, Limits(tries=2))
        driver.wants(generation=2)
        driver.happens(3, ONLINE, LISTENING)
        driver.happens(1, EXITED)
        driver.happens(4, EXITED)
        assert driver.stuck == ()
        assert driver.deadline is not None
        driver.at(driver.deadline)
        driver.happens(5, EXITED)
        assert driver.stuck == (1,)
        assert driver.slots == {0: 3, 1: 2}

    def test_who_orders_a_change_has_not_failed_yet(self) -> None:
        driver = running(1, Limits(tries=1, backoff=10.0))
        driver.wants(count=2)
        driver.happens(2, EXITED)
        assert driver.stuck == (1,)
        driver.roster.forgiven(driver.now)
        assert driver.wants(count=3) == [Spawn(1, 1), Spawn(2, 1)]
        assert driver.stuck == ()

    def test_a_worn_worker_that_cannot_be_replaced_serves(self) -> None:
        driver = running(1, Limits(tries=1), Wear(requests=1))
        driver.roster.heard(1, 1, driver.now)
        driver.reconcile()
        driver.happens(2, EXITED)
        assert driver.stuck == ()

    def test_at_the_end_nobody_waits(self) -> None:
        driver = running(1, Limits(tries=1))
        driver.wants(count=2)
        driver.happens(2, EXITED)
        driver.wants(stop=Stop.GRACEFUL)
        assert driver.stuck == ()


class TestStop:
    @pytest.mark.parametrize(("stop", "quick"), [(Stop.GRACEFUL, False), (Stop.QUICK, True)])
    def test_everybody_is_told_once(self, stop: Stop, quick: bool) -> None:
        driver = running(2)
        assert driver.wants(stop=stop) == [Drain(1, quick, False, False), Drain(2, quick, False, False)]
        driver.happens(1, DISCONNECTED, EXITED)
        assert driver.verdict is Verdict.RUNNING
        driver.happens(2, EXITED)
        assert (driver.verdict, driver.deadline) == (Verdict.STOPPED, None)

    def test_who_boots_is_interrupted(self) -> None:
        driver = Driver(Target(1))
        driver.reconcile()
        assert driver.wants(stop=Stop.GRACEFUL) == [Drain(1, False, True, False)]

    def test_from_graceful_to_quick(self) -> None:
        driver = running(1, Limits(graceful=30.0, quick=2.0))
        driver.wants(stop=Stop.GRACEFUL)
        assert driver.deadline == 1040.0
        driver.at(1020.0)
        assert driver.wants(stop=Stop.QUICK) == [Drain(1, True, False, False)]
        assert driver.deadline == 1022.0
        assert driver.at(1022.0) == [Kill(1, "it did not finish within 2 s")]
        assert driver.happens(1, EXITED) == []
        assert driver.verdict is Verdict.STOPPED

    def test_quick_is_the_end_of_it(self) -> None:
        driver = running(1)
        driver.wants(stop=Stop.QUICK)
        assert driver.wants(stop=Stop.GRACEFUL) == []
        assert driver.deadline == 1012.0

    def test_who_has_left_is_not_told_and_who_already_drains_not_again(self) -> None:
        driver = running(3)
        driver.wants(count=2)
        driver.happens(1, DISCONNECTED)
        driver.happens(4, ONLINE, LISTENING)
        assert driver.wants(stop=Stop.GRACEFUL) == [Drain(2, False, False, False), Drain(4, False, False, False)]

    def test_who_was_killed_is_told_nothing(self) -> None:
        driver = running(1, Limits(boot=60.0))
        driver.wants(count=2)
        driver.at(1070.0)
        assert driver.roster.members[2].killed
        assert driver.wants(stop=Stop.GRACEFUL) == [Drain(1, False, False, False)]
        assert driver.wants(stop=Stop.QUICK) == [Drain(1, True, False, False)]

    def test_nobody_is_replaced_any_more(self) -> None:
        driver = running(2)
        driver.wants(stop=Stop.GRACEFUL)
        assert driver.happens(1, EXITED) == []

    def test_before_anyone_ever_listened_it_is_a_stop_and_no_failure(self) -> None:
        driver = Driver(Target(1))
        driver.reconcile()
        driver.wants(stop=Stop.GRACEFUL)
        driver.happens(1, EXITED)
        assert driver.verdict is Verdict.STOPPED


class TestRoster:
    def test_the_limits_unless_somebody_says_otherwise(self) -> None:
        assert Limits() == Limits(
            boot=60.0,
            graceful=30.0,
            quick=2.0,
            disconnected=5.0,
            backoff=0.1,
            backoff_max=15.0,
            min_uptime=1.0,
            surge=1,
            timeout=30.0,
            abort=1.0,
            tries=3,
        )

    def test_ids_are_never_reused(self) -> None:
        driver = running(1)
        ids = [1]
        for _ in range(5):
            driver.happens(ids[-1], EXITED)
            driver.at(driver.now + 20)
            ids.extend(driver.roster.members)
        assert ids == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("event", [LISTENING, *WorkerEvent])
    def test_a_fact_about_nobody(self, event: WorkerEvent) -> None:
        roster = Roster(Limits())
        with pytest.raises(KeyError):
            roster.happened(1, event, 0.0)

    def test_a_fact_that_cannot_be_changes_nothing(self) -> None:
        driver = Driver(Target(1))
        driver.reconcile()
        before = deepcopy(driver.roster)
        with pytest.raises(IllegalStep):
            driver.roster.happened(1, LISTENING, 1.0)
        assert driver.roster == before

    def test_counts_by_state(self) -> None:
        driver = running(3)
        driver.wants(count=2)
        counts = {state: driver.roster.count(state) for state in WorkerState}
        assert counts == {
            WorkerState.NONE: 0, WorkerState.ONLINE: 0, WorkerState.LISTENING: 2, WorkerState.DRAINING: 1,
            WorkerState.DISCONNECTED: 0, WorkerState.DEAD: 0,
        }  # fmt: skip

    def test_the_newest_generation_that_ever_listened_is_remembered(self) -> None:
        driver = running(1)
        assert driver.roster.proven == 1
        driver.wants(generation=5)
        driver.happens(2, ONLINE, LISTENING)
        assert driver.roster.proven == 5

    def test_who_died_is_told_once_more(self) -> None:
        driver = running(1)
        member = driver.roster.happened(1, EXITED, 1010.0)
        assert member.state is WorkerState.DEAD
        assert not member.current
        assert driver.roster.members == {}


LIMITS = Limits(
    final=frozenset({FINAL}),
    boot=10.0,
    graceful=5.0,
    quick=2.0,
    disconnected=3.0,
    backoff=0.1,
    backoff_max=2.0,
    min_uptime=1.0,
    timeout=4.0,
)
#: What a worker of the machine may take.
WEAR = Wear(requests=10)
#: How long a process that behaves takes for anything.
PACE = 0.25
ONE = st.integers(0, 11)


class Cluster(RuleBasedStateMachine):
    """Processes that boot, serve, hang, disconnect and die as they like, under a target that changes as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(Target(0))
        #: Those that do nothing more by themselves: only a kill ends them.
        self.hung: set[int] = set()
        self.ever: list[int] = []
        #: Per slot, when its last worker left unasked without ever having been healthy; absent if the last one was.
        self.failed: dict[int, float] = {}
        self.unproven: set[int] = set()
        #: Of generations, which are never asked for twice.
        self.newest = 1

    @initialize(count=st.integers(1, 4), surge=st.integers(1, 2))
    def start(self, count: int, surge: int) -> None:
        self.driver = Driver(Target(count), replace(LIMITS, surge=surge), WEAR)
        self.reconcile()

    # -- what happens to processes --

    def members(self, *states: WorkerState) -> list[Member]:
        return [member for member in self.driver.roster.members.values() if member.state in states]

    @rule(
        number=ONE,
        fate=st.sampled_from(["goes on", "goes on", "hangs", "disconnects", "dies", "ends for good"]),
        then=st.booleans(),
    )
    def one(self, number: int, fate: str, then: bool) -> None:
        """It comes up, or goes down if it was told to; or does not."""
        members = list(self.driver.roster.members.values())
        if not members:
            return
        member = members[number % len(members)]
        if fate == "goes on":
            self.advance(member.id)
        elif fate == "hangs":
            self.hung.add(member.id)
        elif fate == "dies":
            self.exits(member.id)
        elif fate == "ends for good":
            self.exits(member.id, FINAL)
        elif member.disconnected is None:
            self.leaves(member, DISCONNECTED)
        if then:
            self.reconcile()

    @rule()
    def all_come_up(self) -> None:
        for member in self.members(WorkerState.NONE, WorkerState.ONLINE):
            while self.advance(member.id) and member.state is WorkerState.ONLINE:
                pass
        self.reconcile()

    @rule(delay=st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0]))
    def time_passes(self, delay: float) -> None:
        self.driver.now += delay
        self.reconcile()

    @rule(delay=st.sampled_from([0.5, 1.0, 1.0, 60.0]), times=st.integers(1, 4))
    def the_master_looks(self, delay: float, times: int) -> None:
        """Who hangs is silent."""
        for _ in range(times):
            self.driver.now += delay
            for member in self.members(WorkerState.LISTENING):
                if member.id not in self.hung:
                    self.driver.roster.heard(member.id, 0, self.driver.now)
            self.driver.roster.looked(self.driver.now)
            self.reconcile()

    @rule(number=ONE, served=st.integers(5, 12), then=st.booleans())
    def one_serves(self, number: int, served: int, then: bool) -> None:
        members = self.members(WorkerState.LISTENING, WorkerState.DRAINING)
        if members:
            self.driver.roster.heard(members[number % len(members)].id, served, self.driver.now)
        if then:
            self.reconcile()

    # -- what is wanted --

    @rule(count=st.integers(0, 5), then=st.booleans())
    def scale(self, count: int, then: bool) -> None:
        self.want(then, count=count)

    @rule(then=st.booleans(), back=st.booleans())
    def reload(self, then: bool, back: bool) -> None:
        """To the next generation, or back to the newest that ever listened."""
        proven = self.driver.roster.proven
        if back and proven:
            self.want(then, generation=proven)
        else:
            self.newest += 1
            self.want(then, generation=self.newest)

    # A stop is the end of everything else, so it comes late or not at all.
    @precondition(lambda self: len(self.driver.log) > 12)
    @rule(quick=st.booleans())
    def stop(self, quick: bool) -> None:
        worse = quick or self.driver.target.stop is Stop.QUICK
        self.want(True, stop=Stop.QUICK if worse else Stop.GRACEFUL)

    # -- and in the end --

    @rule(stop=st.sampled_from([Stop.NO, Stop.NO, Stop.NO, Stop.GRACEFUL, Stop.QUICK]))
    def disturbances_cease(self, stop: Stop) -> None:
        """What starts comes up, what is told to leave does; what hangs hangs until it is killed."""
        driver = self.driver
        if stop is not Stop.NO and driver.target.stop is Stop.NO:
            driver.target = replace(driver.target, stop=stop)
        self.reconcile()
        begin = driver.now
        events: dict[int, float] = {}
        while driver.verdict is Verdict.RUNNING or self.worn:
            for member in driver.roster.members.values():
                asked = member.drained is not None or member.aborted is not None
                moves = member.id not in self.hung and (asked or member.listening is None)
                if moves or member.killed or (member.disconnected is not None and member.id not in self.hung):
                    events.setdefault(member.id, driver.now + PACE)
                else:
                    events.pop(member.id, None)
            times = [*events.values(), *([] if driver.deadline is None else [driver.deadline])]
            assert times, f"nothing will ever happen: {driver.roster}"
            driver.now = min(times)
            for id in [id for id, when in events.items() if when <= driver.now]:
                del events[id]
                if id in driver.roster.members:
                    self.advance(id)
            self.reconcile()
            # Each slot may wait for a kill, a back-off and two boots, one slot after another.
            bound = (len(driver.roster.slots) + 1) * 2 * (LIMITS.boot + LIMITS.graceful + LIMITS.backoff_max + 8 * PACE)
            assert driver.now - begin <= bound

        if driver.target.stop is not Stop.NO:
            assert driver.verdict is Verdict.STOPPED
        elif driver.verdict is Verdict.FAILED:
            assert not driver.roster.proven
        elif driver.verdict is Verdict.DESERTED:
            assert set(range(driver.target.count)) <= self.closed
        else:
            assert driver.verdict is Verdict.SETTLED
            wanted = range(driver.target.count)
            assert sorted(driver.slots) == [number for number in wanted if number not in self.closed]
            generations = {member.generation for member in driver.roster.members.values()}
            assert generations <= {driver.target.generation}
        assert driver.ask().actions == ()

    # -- the shell --

    @property
    def closed(self) -> set[int]:
        return {number for number, slot in self.driver.roster.slots.items() if slot.closed}

    @property
    def worn(self) -> bool:
        """Whether a worker that should be replaced still serves."""
        stops = self.driver.target.stop is not Stop.NO
        return not stops and any(member.worn(self.driver.now) for member in self.members(WorkerState.LISTENING))

    def advance(self, id: int) -> bool:
        """The next step of a process that does as it should, if it has one to make; whether it had."""
        member = self.driver.roster.members[id]
        if member.killed:
            self.exits(id)
        elif id in self.hung:
            return False
        elif member.drained is not None or member.aborted is not None or member.state is WorkerState.DISCONNECTED:
            self.exits(id)
        elif member.state is WorkerState.LISTENING:
            return False
        else:
            event = ONLINE if member.state is WorkerState.NONE else LISTENING
            self.driver.roster.happened(id, event, self.driver.now)
        return True

    def exits(self, id: int, code: int = 0) -> None:
        self.driver.roster.ended(id, code)
        self.leaves(self.driver.roster.members[id], EXITED)
        self.hung.discard(id)

    def leaves(self, member: Member, event: WorkerEvent) -> None:
        now = self.driver.now
        unasked = member.drained is None and member.disconnected is None
        healthy = member.listening is not None and now - member.listening >= LIMITS.min_uptime
        self.driver.roster.happened(member.id, event, now)
        if unasked and healthy:
            self.failed.pop(member.slot, None)
        elif unasked:
            self.failed[member.slot] = now
            if not self.driver.roster.proven:
                self.unproven.add(member.slot)

    def want(self, then: bool, **changes: object) -> None:
        if self.driver.target.stop is not Stop.NO and "stop" not in changes:
            return
        self.driver.target = replace(self.driver.target, **changes)  # type: ignore[arg-type]
        if then:
            self.reconcile()

    def reconcile(self) -> None:
        driver = self.driver
        was_proven = driver.roster.proven
        for action in driver.reconcile():
            if isinstance(action, Spawn):
                assert driver.target.stop is Stop.NO
                assert action.slot < driver.target.count
                assert action.slot not in self.closed
                assert action.generation == driver.target.generation
                assert was_proven or action.slot not in self.unproven
                assert driver.now >= self.failed.get(action.slot, 0.0) + LIMITS.backoff
            elif isinstance(action, Drain):
                self.check_who_leaves(driver.roster.members[action.worker], action)
        self.ever += [id for id in driver.roster.members if id > (self.ever[-1] if self.ever else 0)]
        self.check_nobody_is_too_many()
        if driver.verdict is Verdict.REJECTED:
            # As the engine does.
            assert driver.target.generation > driver.roster.proven > 0
            driver.target = replace(driver.target, generation=driver.roster.proven)
            self.reconcile()
            assert driver.verdict is not Verdict.REJECTED

    # -- what must hold --

    def check_who_leaves(self, member: Member, order: Drain) -> None:
        """Nobody who serves leaves a slot that is wanted before another serves there."""
        if member.listening is not None and self.driver.now - member.listening >= LIMITS.min_uptime:
            self.failed.pop(member.slot, None)
        if member.listening is not None and order.keep and member.slot < self.driver.target.count:
            assert any(other.slot == member.slot for other in self.members(WorkerState.LISTENING))

    def check_nobody_is_too_many(self) -> None:
        """After every plan; between a fact and the plan it leads to there is nothing to hold."""
        current = [member for member in self.driver.roster.members.values() if member.current and not member.doomed]
        target = self.driver.target
        if target.stop is not Stop.NO:
            assert current == []
            return
        if target.count and 0 < self.driver.roster.proven < target.generation:
            # They wait for the new generation, which may be rejected.
            current = [member for member in current if member.slot < target.count or not member.serving]
        assert len(current) <= self.driver.target.count + self.driver.roster.limits.surge
        now = self.driver.now
        places = Counter((member.slot, member.generation, bool(member.worn(now))) for member in current)
        assert all(count == 1 for count in places.values())
        assert all(member.slot < self.driver.target.count for member in current)

    @invariant()
    def ids_count_up(self) -> None:
        assert self.ever == sorted(set(self.ever))
        assert list(self.driver.roster.members) == sorted(self.driver.roster.members)

    @invariant()
    def each_signal_is_ordered_once(self) -> None:
        drains: dict[int, list[Drain]] = {}
        kills: list[int] = []
        aborts: list[int] = []
        for _, action in self.driver.log:
            if isinstance(action, Drain):
                drains.setdefault(action.worker, []).append(action)
            elif isinstance(action, Kill):
                kills.append(action.worker)
            elif isinstance(action, Abort):
                aborts.append(action.worker)
        assert len(set(kills)) == len(kills)
        assert len(set(aborts)) == len(aborts)
        for orders in drains.values():
            assert [order.quick for order in orders] in ([False], [True], [False, True])

    @invariant()
    def no_kill_comes_before_its_time(self) -> None:
        born: list[float] = []
        # The earliest kill: of one that closed its channel at once, or was told to be quick.
        earliest: dict[int, float] = {}
        for when, action in self.driver.log:
            if isinstance(action, Spawn):
                born.append(when)
                earliest[len(born)] = when + LIMITS.disconnected
            elif isinstance(action, Drain):
                earliest[action.worker] = when + (LIMITS.quick if action.quick else LIMITS.disconnected)
            elif isinstance(action, Abort):
                earliest[action.worker] = when + LIMITS.abort
            else:
                assert when >= min(earliest[action.worker], born[action.worker - 1] + LIMITS.boot)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
