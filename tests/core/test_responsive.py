"""Whether any worker is well, for whoever restarts the whole cluster otherwise."""

from __future__ import annotations

from clusterserve.core.lifecycle import WorkerEvent
from clusterserve.core.roster import Limits, Roster


def serving(timeout: float = 40.0) -> Roster:
    """Two workers that listen since 100."""
    roster = Roster(Limits(timeout=timeout))
    for slot in range(2):
        worker = roster.spawned(slot, 1, 0.0).id
        for event in (WorkerEvent.ONLINE, WorkerEvent.LISTENING):
            roster.happened(worker, event, 100.0)
    return roster


def test_one_that_was_heard_of_is_enough() -> None:
    roster = serving()
    # Heartbeats come every second.
    assert roster.responsive(10.0, 111.0)
    assert not roster.responsive(10.0, 111.1)
    roster.heard(2, 0, 111.0)
    assert roster.responsive(10.0, 111.1)


def test_one_that_is_doomed_or_leaves_does_not_count() -> None:
    roster = serving()
    roster.aborted(1, 101.0)
    assert roster.responsive(10.0, 101.0)
    roster.drained(2, False, 101.0)
    assert not roster.responsive(10.0, 101.0)


def test_without_heartbeats_those_that_listen_are_well() -> None:
    roster = serving(timeout=0.0)
    assert roster.responsive(1.0, 1000.0)
    for worker in (1, 2):
        roster.happened(worker, WorkerEvent.EXITED, 1000.0)
    assert not roster.responsive(1.0, 1000.0)
