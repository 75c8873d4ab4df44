"""The loop around `plan`: what one action raises is no reason not to do the others, nor to ask again."""

from __future__ import annotations

from typing import Any

import pytest

from clusterserve.core.reconcile import Drain, Spawn, Stop, Target
from clusterserve.core.roster import Limits, Roster
from clusterserve.core.wear import Wear
from clusterserve.master.reconciler import AGAIN, Reconciler

from .rig import SkewedLoop


class BrokenCrew:
    """Knows of each action, and cannot do the one that is `broken`."""

    def __init__(self, roster: Roster, loop: SkewedLoop) -> None:
        self.broken: int | None = None
        self._roster = roster
        self._loop = loop

    def spawn(self, action: Spawn, wear: Wear) -> None:
        self._roster.spawned(action.slot, action.generation, self._loop.time(), wear)

    def perform(self, action: Drain) -> None:
        if action.worker == self.broken:
            raise KeyError(action.worker)
        self._roster.drained(action.worker, action.quick, self._loop.time())


def test_one_that_raises(loop: SkewedLoop) -> None:
    loop.freeze()
    roster = Roster(Limits())
    crew: Any = BrokenCrew(roster, loop)
    reconciler = Reconciler(loop, roster, crew, Target(3), Wear, lambda plan: None)
    reconciler.reconcile()
    crew.broken = 2
    reconciler.target = Target(3, stop=Stop.GRACEFUL)
    with pytest.raises(KeyError):
        reconciler.reconcile()
    assert [member.drained is not None for member in roster.members.values()] == [True, False, True]
    # A second later it is tried again, and again.
    for _ in range(2):
        loop.forward(AGAIN)
        loop.turn()
        (fault,) = loop.faults
        assert isinstance(fault["exception"], KeyError)
        loop.faults.clear()
    crew.broken = None
    loop.forward(AGAIN)
    loop.turn()
    assert all(member.drained is not None for member in roster.members.values())
    reconciler.close()
