"""Clusters whose program says how many workers there are, and clusters of programs: what `plan` makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core.lifecycle import TRANSITIONS, WorkerEvent, WorkerState
from clusterserve.core.reconcile import Abort, Action, Drain, Kill, Spawn, Stop, Target, Verdict, plan
from clusterserve.core.roster import Limits, Roster

LIMITS = Limits(boot=10.0, graceful=5.0, quick=2.0, disconnected=3.0, timeout=4.0)
MANUAL = Target(0, manual=True)

#: What may happen next: somebody forks, something becomes of a worker, one is told to go or sent SIGTERM, time passes.
STEPS = st.lists(
    st.one_of(
        st.just("fork"),
        st.tuples(st.integers(0, 7), st.sampled_from([*WorkerEvent, "disconnect", "SIGTERM"])),
        st.sampled_from([0.1, 1.0, 3.0, 6.0, 20.0]),
    ),
    max_size=40,
)


class Play:
    """A shell without processes, in which the program decides."""

    def __init__(self, programs: bool) -> None:
        self.roster = Roster(LIMITS, programs=programs)
        self.target = MANUAL
        self.now = 100.0
        self.drained: list[int] = []

    def step(self, step: object) -> None:
        if step == "fork":
            self.roster.spawned(len(self.roster.members), 1, self.now)
        elif isinstance(step, float):
            self.now += step
            self.roster.looked(self.now)
        elif isinstance(step, tuple) and self.roster.members:
            ids = list(self.roster.members)
            self.one(ids[step[0] % len(ids)], step[1])

    def one(self, id: int, what: object) -> None:
        member = self.roster.members[id]
        if what == "disconnect":
            if member.current:
                self.roster.drained(id, False, self.now)
        elif what == "SIGTERM":
            self.roster.terminated(id, self.now)
        elif isinstance(what, WorkerEvent) and what is not WorkerEvent.DRAIN and what in TRANSITIONS[member.state]:
            self.roster.happened(id, what, self.now)

    def reconcile(self) -> tuple[list[Action], Verdict]:
        done: list[Action] = []
        while True:
            answer = plan(self.target, self.roster, self.now)
            assert answer.deadline is None or answer.deadline > self.now
            for action in answer.actions:
                assert action not in done
                done.append(action)
                if isinstance(action, Drain):
                    self.roster.drained(action.worker, action.quick, self.now)
                elif isinstance(action, Abort):
                    self.roster.aborted(action.worker, self.now)
                elif isinstance(action, Kill):
                    self.roster.killed(action.worker)
            if not answer.actions:
                return done, answer.verdict


@given(STEPS, st.booleans())
@settings(deadline=None)
def test_nobody_is_started_or_sent_away_and_those_that_hang_are_killed(steps: list[object], programs: bool) -> None:
    play = Play(programs)
    for step in steps:
        play.step(step)
        actions, verdict = play.reconcile()
        assert verdict is Verdict.SETTLED
        assert all(isinstance(action, Kill | Abort) for action in actions)
    # Whatever was told to go, or cannot come up, is dead in the end.
    late = [member for member in play.roster.members.values() if member.drained is not None]
    play.now += LIMITS.graceful + LIMITS.disconnected + LIMITS.abort
    play.reconcile()
    assert all(member.doomed for member in late)


@given(STEPS, st.booleans(), st.sampled_from([Stop.GRACEFUL, Stop.QUICK]))
@settings(deadline=None)
def test_a_stop_ends_them_all(steps: list[object], programs: bool, how: Stop) -> None:
    play = Play(programs)
    for step in steps:
        play.step(step)
        play.reconcile()
    play.target = replace(play.target, stop=how)
    actions, _ = play.reconcile()
    assert not any(isinstance(action, Spawn) for action in actions)
    for member in play.roster.members.values():
        assert member.doomed or member.drained is not None or member.state is WorkerState.DISCONNECTED
    for id in list(play.roster.members):
        play.roster.happened(id, WorkerEvent.EXITED, play.now)
    assert play.reconcile() == ([], Verdict.STOPPED)


def test_a_program_is_of_use_as_soon_as_it_is_up() -> None:
    roster = Roster(LIMITS, programs=True)
    roster.spawned(0, 1, 0.0)
    assert plan(Target(1), roster, 0.0).verdict is Verdict.RUNNING
    roster.happened(1, WorkerEvent.ONLINE, 1.0)
    assert roster.members[1].serving
    assert plan(Target(1), roster, 1.0).verdict is Verdict.SETTLED
    # That it listens as well is news, but makes no difference; nor does a long time without.
    assert plan(Target(1), roster, 1000.0).actions == ()
    roster.happened(1, WorkerEvent.LISTENING, 1001.0)
    assert roster.members[1].listening == 1.0


def test_one_that_does_not_come_up_is_killed_with_the_right_words() -> None:
    for programs, words in ((True, "it did not come up within 10 s"), (False, "it did not listen within 10 s")):
        roster = Roster(LIMITS, programs=programs)
        roster.spawned(0, 1, 0.0)
        assert plan(MANUAL, roster, 9.0).actions == ()
        assert plan(MANUAL, roster, 10.0).actions == (Kill(1, words),)


@pytest.mark.parametrize("quick", [False, True])
@given(st.floats(0.0, 20.0))
def test_a_program_has_what_is_left_of_its_grace_after_it_has_closed_its_channel(quick: bool, later: float) -> None:
    """An application has nothing to do then: it is given a moment to exit."""
    grace = LIMITS.quick if quick else LIMITS.graceful
    for programs, due in ((True, max(grace, later + LIMITS.disconnected)), (False, later + LIMITS.disconnected)):
        roster = Roster(LIMITS, programs=programs)
        roster.spawned(0, 1, -10.0)
        roster.happened(1, WorkerEvent.ONLINE, -9.0)
        roster.happened(1, WorkerEvent.LISTENING, -9.0)
        roster.drained(1, quick, 0.0)
        roster.happened(1, WorkerEvent.DISCONNECTED, later)
        answer = plan(MANUAL, roster, later)
        assert (answer.actions, answer.deadline) == ((), due)
        assert plan(MANUAL, roster, due).actions == (Kill(1, "it closed its channel but did not exit"),)


def test_one_that_does_not_act_on_sigterm_is_killed_once() -> None:
    roster = Roster(LIMITS)
    roster.spawned(0, 1, 0.0)
    roster.happened(1, WorkerEvent.ONLINE, 0.0)
    roster.happened(1, WorkerEvent.LISTENING, 0.0)
    roster.terminated(1, 1.0)
    # To say it again gives no more time.
    roster.terminated(1, 3.0)
    assert plan(MANUAL, roster, 1.0).deadline == 6.0
    assert plan(MANUAL, roster, 6.0).actions == (Kill(1, "it does not act on SIGTERM"),)
    # It asks to be drained in time.
    roster.drained(1, False, 5.5)
    assert plan(MANUAL, roster, 6.0).actions == ()


def test_no_worker_can_be_wanted() -> None:
    assert plan(Target(0), Roster(LIMITS), 0.0).verdict is Verdict.SETTLED
