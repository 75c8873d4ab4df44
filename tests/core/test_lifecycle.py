"""A worker process's states: every (state, event) pair, against a table written down here."""

from __future__ import annotations

import pytest

from clusterserve.core.connection import IllegalStep
from clusterserve.core.lifecycle import TRANSITIONS, WorkerEvent, WorkerState, step

S, E = WorkerState, WorkerEvent

ALLOWED = {
    (S.NONE, E.ONLINE): S.ONLINE,
    (S.NONE, E.DRAIN): S.DRAINING,
    (S.NONE, E.DISCONNECTED): S.DISCONNECTED,
    (S.NONE, E.EXITED): S.DEAD,
    (S.ONLINE, E.LISTENING): S.LISTENING,
    (S.ONLINE, E.DRAIN): S.DRAINING,
    (S.ONLINE, E.DISCONNECTED): S.DISCONNECTED,
    (S.ONLINE, E.EXITED): S.DEAD,
    (S.LISTENING, E.LISTENING): S.LISTENING,
    (S.LISTENING, E.DRAIN): S.DRAINING,
    (S.LISTENING, E.DISCONNECTED): S.DISCONNECTED,
    (S.LISTENING, E.EXITED): S.DEAD,
    (S.DRAINING, E.ONLINE): S.DRAINING,
    (S.DRAINING, E.LISTENING): S.DRAINING,
    (S.DRAINING, E.DRAIN): S.DRAINING,
    (S.DRAINING, E.DISCONNECTED): S.DISCONNECTED,
    (S.DRAINING, E.EXITED): S.DEAD,
    (S.DISCONNECTED, E.DRAIN): S.DISCONNECTED,
    (S.DISCONNECTED, E.EXITED): S.DEAD,
}
PAIRS = [pytest.param(state, event, id=f"{state.name}-{event.name}") for state in S for event in E]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_step_is_the_one_of_the_table_or_none(state: WorkerState, event: WorkerEvent) -> None:
    target = ALLOWED.get((state, event))
    if target is None:
        with pytest.raises(IllegalStep, match=rf"^a worker that is {state.value} cannot go {event.value}$"):
            step(state, event)
    else:
        assert step(state, event) is target


def test_the_published_table_is_the_one_that_is_used_and_cannot_be_changed() -> None:
    published = {(state, event): target for state, row in TRANSITIONS.items() for event, target in row.items()}
    assert published == ALLOWED
    with pytest.raises(TypeError):
        TRANSITIONS[S.DEAD] = {}  # type: ignore[index]


def test_the_names_are_the_ones_users_see() -> None:
    assert [state.value for state in S] == ["none", "online", "listening", "draining", "disconnected", "dead"]


@pytest.mark.parametrize("state", [state for state in S if state is not S.DEAD])
def test_a_process_can_die_at_every_moment(state: WorkerState) -> None:
    assert step(state, E.EXITED) is S.DEAD


@pytest.mark.parametrize("state", [S.DRAINING, S.DISCONNECTED, S.DEAD])
def test_nobody_comes_back_into_service(state: WorkerState) -> None:
    serving = {S.NONE, S.ONLINE, S.LISTENING}
    assert serving.isdisjoint(TRANSITIONS[state].values())
