"""Which templates there should be, and that workers wait for theirs: what `plan` makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core.lifecycle import TRANSITIONS, WorkerEvent
from clusterserve.core.reconcile import Action, Drain, Kill, Plan, Spawn, Stop, Target, Verdict, plan
from clusterserve.core.roster import Limits, Roster
from clusterserve.core.templates import DismissTemplate, KillTemplate, StartTemplate, Templates

LIMITS = Limits(boot=10.0, graceful=5.0, disconnected=3.0, backoff=1.0, backoff_max=4.0, min_uptime=1.0)


class Play:
    """A shell without processes: it executes plans, and every execution is a fact."""

    def __init__(self, count: int = 2) -> None:
        self.templates = Templates()
        self.roster = Roster(LIMITS, templates=self.templates)
        self.target = Target(count)
        self.now = 100.0
        self.log: list[Action] = []

    def reconcile(self) -> Plan:
        for _ in range(10):
            answer = plan(self.target, self.roster, self.now)
            for action in answer.actions:
                self.execute(action)
            if not answer.actions:
                assert answer.deadline is None or answer.deadline > self.now
                return answer
        raise AssertionError(f"there is no end to it: {self.log}")

    def execute(self, action: Action) -> None:
        self.log.append(action)
        if isinstance(action, Spawn):
            assert self.templates.ready(action.generation) is not None, "a worker is forked, and from whom?"
            self.roster.spawned(action.slot, action.generation, self.now)
        elif isinstance(action, Drain):
            self.roster.drained(action.worker, action.quick, self.now)
        elif isinstance(action, Kill):
            self.roster.killed(action.worker)
        elif isinstance(action, StartTemplate):
            self.templates.started(action.generation, self.now)
        elif isinstance(action, DismissTemplate):
            assert self.templates.here[action.template].dismissed is None
            self.templates.dismissed(action.template, self.now)
        elif isinstance(action, KillTemplate):
            assert not self.templates.here[action.template].killed
            self.templates.killed(action.template)

    def asked(self) -> list[Action]:
        """What is ordered now."""
        self.log = []
        self.reconcile()
        return self.log

    def prepared(self, id: int) -> list[Action]:
        self.templates.prepared(id, self.now)
        return self.asked()

    def gone(self, id: int) -> list[Action]:
        self.roster.template_gone(id, self.now)
        return self.asked()

    def happens(self, worker: int, *events: WorkerEvent) -> list[Action]:
        for event in events:
            self.roster.happened(worker, event, self.now)
        return self.asked()

    def wants(self, **changes: object) -> list[Action]:
        self.target = Target(**{**vars(self.target), **changes})  # type: ignore[arg-type]
        return self.asked()

    @property
    def verdict(self) -> Verdict:
        return plan(self.target, self.roster, self.now).verdict


UP = (WorkerEvent.ONLINE, WorkerEvent.LISTENING)
GONE = (WorkerEvent.DISCONNECTED, WorkerEvent.EXITED)


def running() -> Play:
    """Template 1, and workers 1 and 2 of it, for a while."""
    play = Play()
    play.reconcile()
    play.prepared(1)
    for worker in (1, 2):
        play.happens(worker, *UP)
    play.now += 50.0
    assert play.asked() == []
    assert play.verdict is Verdict.SETTLED
    return play


class TestStart:
    def test_workers_wait_for_their_template(self) -> None:
        play = Play()
        assert play.asked() == [StartTemplate(1)]
        assert play.verdict is Verdict.RUNNING
        assert play.prepared(1) == [Spawn(0, 1), Spawn(1, 1)]

    def test_a_template_that_fails_is_the_end_of_it(self) -> None:
        play = Play()
        play.reconcile()
        assert play.gone(1) == []
        assert play.verdict is Verdict.FAILED

    def test_when_all_workers_have_failed_it_goes_first(self) -> None:
        play = Play()
        play.reconcile()
        play.prepared(1)
        assert play.happens(1, *GONE) == []
        assert play.happens(2, *GONE) == [DismissTemplate(1)]
        assert play.verdict is Verdict.RUNNING
        play.gone(1)
        assert play.verdict is Verdict.FAILED

    def test_one_that_dies_while_workers_boot_is_not_tried_again(self) -> None:
        play = Play()
        play.reconcile()
        play.prepared(1)
        assert play.gone(1) == []
        assert play.verdict is Verdict.RUNNING
        # But it may still come to something.
        assert play.happens(1, *UP) == []
        play.now += LIMITS.backoff
        assert play.asked() == [StartTemplate(1)]

    def test_one_that_is_not_ready_in_time_is_killed(self) -> None:
        play = Play()
        play.reconcile()
        assert plan(play.target, play.roster, play.now).deadline == play.now + LIMITS.boot
        play.now += LIMITS.boot
        assert play.asked() == [KillTemplate(1, "it was not ready within 10 s")]
        assert play.gone(1) == []
        assert play.verdict is Verdict.FAILED


class TestCrash:
    def test_it_is_replaced_and_nobody_else(self) -> None:
        play = running()
        # It was ready for a while: at once.
        assert play.gone(1) == [StartTemplate(1)]
        assert play.verdict is Verdict.SETTLED

    def test_who_is_to_be_replaced_waits_for_the_new_one(self) -> None:
        play = running()
        play.gone(1)
        assert play.happens(1, *GONE) == []
        assert play.prepared(2) == [Spawn(0, 1)]

    def test_one_after_the_other_has_to_wait_longer(self) -> None:
        play = running()
        play.gone(1)
        for id, delay in ((2, 1.0), (3, 2.0), (4, 4.0), (5, 4.0)):
            assert play.gone(id) == []
            assert plan(play.target, play.roster, play.now).deadline == play.now + delay
            play.now += delay
            assert play.asked() == [StartTemplate(1)]

    @given(st.integers(1, 6), st.floats(0.0, 0.9))
    def test_whoever_orders_a_change_does_not_wait_for_what_failed_before(self, failures: int, later: float) -> None:
        play = running()
        play.gone(1)
        for id in range(2, 2 + failures):
            play.now += LIMITS.backoff_max
            play.asked()
            assert play.gone(id) == []
        play.now += later
        assert play.asked() == []
        play.roster.forgiven(play.now)
        assert play.asked() == [StartTemplate(1)]

    def test_whoever_waits_for_a_worker_is_told(self) -> None:
        play = running()
        play.gone(1)
        play.happens(1, *GONE)
        for id in (2, 3, 4):
            play.gone(id)
            play.now += LIMITS.backoff_max
            play.asked()
        assert plan(play.target, play.roster, play.now).stuck == (0,)


class TestReload:
    def test_both_are_there_until_the_new_one_is_proved(self) -> None:
        play = running()
        assert play.wants(generation=2) == [StartTemplate(2)]
        assert play.prepared(2) == [Spawn(0, 2)]
        assert set(play.happens(3, *UP)) == {Drain(1, False, False, True), Spawn(1, 2), DismissTemplate(1)}
        assert play.gone(1) == []
        assert [each.generation for each in play.templates.here.values()] == [2]

    def test_who_dies_before_the_new_one_is_ready_is_replaced_from_the_old_one(self) -> None:
        play = running()
        play.wants(generation=2)
        # However often the next reload comes before the last one's template is ready.
        for generation, worker in ((3, 1), (4, 3)):
            assert play.happens(worker, *GONE) == [Spawn(0, 1)]
            assert set(play.wants(generation=generation)) == {
                StartTemplate(generation),
                DismissTemplate(generation - 1),
            }
            play.gone(generation - 1)
            play.happens(generation, *UP)
            play.now += LIMITS.min_uptime
        # It is worth no more than that: when the new one is ready, all are replaced, the oldest first.
        assert play.prepared(4) == [Spawn(1, 4)]

    def test_reloads_that_outrun_loading_leave_nobody_waiting_for_the_last(self) -> None:
        """1. The template is dead, and so are the workers.  2. Reloads.  Result: who began first is waited for."""
        play = running()
        play.wants(generation=2)
        play.gone(1)
        play.happens(1, *GONE)
        play.happens(2, *GONE)
        play.wants(generation=3)
        assert play.wants(generation=4) == [StartTemplate(4), DismissTemplate(3)]
        assert play.prepared(2) == [Spawn(0, 2), Spawn(1, 2)]
        assert play.happens(3, *UP) == []
        assert DismissTemplate(2) not in play.wants(generation=5)

    def test_one_that_fails_is_rejected_and_the_old_one_goes_on(self) -> None:
        play = running()
        play.wants(generation=2)
        assert play.gone(2) == []
        assert play.verdict is Verdict.REJECTED
        assert play.wants(generation=1) == []
        assert play.happens(1, *GONE) == [Spawn(0, 1)]

    def test_workers_that_fail_take_their_template_with_them(self) -> None:
        play = running()
        play.wants(generation=2)
        play.prepared(2)
        play.happens(3, *GONE)
        assert play.verdict is Verdict.REJECTED
        assert play.wants(generation=1) == [DismissTemplate(2)]

    def test_one_that_was_dismissed_and_stays_is_killed(self) -> None:
        play = running()
        play.wants(generation=2)
        play.prepared(2)
        play.happens(3, *UP)
        play.now += LIMITS.disconnected
        assert KillTemplate(1, "it did not end within 3 s") in play.asked()


@pytest.mark.parametrize("ready", [False, True])
def test_a_stop_ends_templates_too(ready: bool) -> None:
    play = Play()
    play.reconcile()
    if ready:
        play.prepared(1)
    assert DismissTemplate(1) in play.wants(stop=Stop.GRACEFUL)
    for worker in list(play.roster.members):
        play.happens(worker, WorkerEvent.EXITED)
    assert play.verdict is Verdict.RUNNING
    play.gone(1)
    assert play.verdict is Verdict.STOPPED


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("prepared"), st.integers(0, 3)),
        st.tuples(st.just("gone"), st.integers(0, 3)),
        st.tuples(st.just("reload"), st.just(0)),
        st.tuples(st.sampled_from(list(WorkerEvent)), st.integers(0, 5)),
        st.tuples(st.sampled_from([0.1, 1.0, 5.0, 20.0]), st.just(0)),
    ),
    max_size=40,
)


@given(STEPS, st.booleans())
@settings(max_examples=250, deadline=None)
def test_whatever_happens_it_comes_to_rest(steps: list[tuple[object, int]], up: bool) -> None:
    """And in the end all serve, or the cluster has failed; at no time do more than two templates stay."""
    play = running() if up else Play()
    play.reconcile()

    def settle() -> None:
        if play.verdict is Verdict.REJECTED:
            play.wants(generation=play.roster.proven)
        staying = [each for each in play.templates.here.values() if each.dismissed is None]
        assert len(staying) <= 2
        assert len({each.generation for each in staying}) == len(staying)
        # Nobody is missing for longer than its back-off if there is a template that it could come from.
        if play.roster.proven and play.verdict is not Verdict.REJECTED:
            there = {member.slot for member in play.roster.members.values() if member.current}
            waits = {number for number, slot in play.roster.slots.items() if slot.not_before > play.now}
            ready = any(each.ready is not None for each in staying if not each.killed)
            assert not ready or there | waits >= set(range(play.target.count))

    generation = 1
    for what, which in steps:
        templates, members = list(play.templates.here.values()), list(play.roster.members.values())
        if what == "reload":
            generation += 1
            play.wants(generation=generation)
        elif isinstance(what, float):
            play.now += what
            play.asked()
        elif isinstance(what, WorkerEvent):
            # A drain is an order, no fact that comes by itself.
            if which < len(members) and what in TRANSITIONS[members[which].state] and what is not WorkerEvent.DRAIN:
                play.happens(members[which].id, what)
        elif which < len(templates):
            template = templates[which]
            if what == "gone":
                play.gone(template.id)
            elif template.ready is None and template.dismissed is None:
                play.prepared(template.id)
        settle()
    for _ in range(60):
        play.now += 5.0
        play.asked()
        settle()
        for template in list(play.templates.here.values()):
            if template.dismissed is not None or template.killed:
                play.gone(template.id)
            elif template.ready is None:
                play.prepared(template.id)
        for member in list(play.roster.members.values()):
            if not member.current or member.doomed:
                play.happens(member.id, WorkerEvent.EXITED)
            elif member.listening is None:
                for event in UP:
                    if event in TRANSITIONS[member.state]:
                        play.happens(member.id, event)
        settle()
    assert play.verdict in (Verdict.SETTLED, Verdict.FAILED)
    if play.verdict is Verdict.SETTLED:
        (template,) = play.templates.here.values()
        assert template.generation == play.target.generation
