"""`Reconciler`: asks `plan` what to do, does it, and asks again; the loop around the pure part."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from ..core.lifecycle import WorkerEvent
from ..core.reconcile import Action, Plan, Spawn, Stop, Target, plan
from ..core.roster import Roster
from ..core.wear import Wear
from .crew import Crew

#: Until it is asked again when what should have been done could not be (seconds).
AGAIN: Final = 1.0


class Reconciler:
    """On the engine's loop.  `target` is what is wanted: change it, and call `reconcile`.

    `wear()` is what a new worker may take; `heed` is told of every plan in which nothing is left to do for now, and
    may call `reconcile` again, or `close`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        roster: Roster,
        crew: Crew,
        target: Target,
        wear: Callable[[], Wear],
        heed: Callable[[Plan], None],
    ) -> None:
        self.target = target
        #: How the cluster ends, as ordered; `target.stop` follows when nothing waits for the workers any more.
        self.stopping = Stop.NO
        self._loop = loop
        self._roster = roster
        self._crew = crew
        self._wear = wear
        self._heed = heed
        self._deadline: asyncio.TimerHandle | None = None
        self._planning = False
        self._closed = False

    def reconcile(self) -> None:
        """Do what `plan` says until it says nothing more for now.

        What one action raises comes out of here when the others are done; a second later it is tried again.
        """
        if self._planning or self._closed:
            # An action of the loop below has become a fact, or a fact is not whole yet; it is asked again.
            return
        self._planning = True
        # Should something raise: it is asked again all the same.
        deadline: float | None = self._loop.time() + AGAIN
        try:
            while (current := plan(self.target, self._roster, self._loop.time())).actions:
                with contextlib.ExitStack() as all_of_them:
                    # One that raises keeps no other from being done.
                    for action in reversed(current.actions):
                        all_of_them.callback(self._do, action)
            deadline = current.deadline
        finally:
            self._planning = False
            self._ask_again_at(deadline)
        self._heed(current)

    def _do(self, action: Action) -> None:
        if isinstance(action, Spawn):
            self._crew.spawn(action, self._wear())
        else:
            self._crew.perform(action)

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """What happens in this block is one fact: a plan made in the midst of it would count on a dead worker, or take
        one that listens for one that boots."""
        planning, self._planning = self._planning, True
        try:
            yield
        finally:
            self._planning = planning
        self.reconcile()

    def happened(self, worker: int, event: WorkerEvent) -> None:
        """A fact about a worker.  Raises `IllegalStep` if it cannot be."""
        self._roster.happened(worker, event, self._loop.time())
        self.reconcile()

    def close(self) -> None:
        """Nothing is planned any more."""
        self._closed = True
        self._ask_again_at(None)

    def _ask_again_at(self, when: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if when is None else self._loop.call_at(when, self.reconcile)
