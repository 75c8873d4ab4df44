"""`Ending`: how a cluster ends.  After a delay, when what was accepted is served, quickly, or as another takes over.

Nothing here waits: each step is taken when the one before it has become a fact.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Collection
from typing import Final

from ..core.bequest import Bequest
from ..core.events import Event, StartedShutdown
from ..core.messages import Failed
from ..core.reconcile import Stop
from ..core.roster import Roster
from .crew import Crew
from .dispatcher import Dispatcher
from .handles import Handles
from .reconciler import Reconciler

logger = logging.getLogger("clusterserve")

#: Between SIGTERM and the closing of the listeners (seconds): clients whose handshake is done, but whose first bytes
#: are still under way, are not in the backlog yet that TCP_DEFER_ACCEPT keeps.
LISTENER_LINGER: Final = 0.05


class Ending:
    """On the engine's loop; all parts are the engine's.  `stopping` of the reconciler says how far it has come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        reconciler: Reconciler,
        roster: Roster,
        crew: Crew,
        dispatcher: Dispatcher,
        handles: Handles,
        emit: Callable[[Event], None],
    ) -> None:
        self._loop = loop
        self._reconciler = reconciler
        self._roster = roster
        self._crew = crew
        self._dispatcher = dispatcher
        self._handles = handles
        self._emit = emit
        self._deadline = 0.0
        #: While it serves on although it was told to stop.
        self._delay: asyncio.TimerHandle | None = None
        #: The failure that nobody was told of when the stop was ordered: the others were still booting.
        self.untold: Failed | None = None

    def stop(self, how: Stop, *, at_once: bool = False, told: bool = False) -> None:
        """Stop the cluster: GRACEFUL serves what was accepted, after `shutdown_delay`, QUICK does not.

        May be called again, to hurry: `at_once` ends the delay.  `told`: why nothing could be started has been said.
        """
        first = self._reconciler.stopping is Stop.NO
        if how.value > self._reconciler.stopping.value:
            self._reconciler.stopping = how
        elif self._delay is None or not at_once:
            return
        if first:
            self._emit(StartedShutdown())
            # What a worker says from now on may come of being interrupted; so may how the template has ended.
            self.untold = None if self._roster.proven or told or self._crew.hit else self._crew.failure
            self._crew.announce_stop()
            waits = self._roster.proven and how is Stop.GRACEFUL and not at_once
            delay = self._crew.settings.shutdown_delay
            if delay and waits:
                logger.info("Told to stop: serving on for %g s, --shutdown-delay", delay)
                self._delay = self._loop.call_later(delay, self._begin)
                return
        self._begin()

    def leave(
        self, shared: Collection[int], continued: Collection[int], heir: Callable[[list[Bequest]], None]
    ) -> float:
        """Another master goes on: finish what the workers hold, and stop.  Within how many seconds, at most.

        `shared` are the listeners that it has too, `continued` those with whose connections it goes on: `heir` gets
        them.  What others have accepted is served here.
        """
        self._reconciler.stopping = Stop.GRACEFUL
        self._reconciler.target = dataclasses.replace(self._reconciler.target, keep=True)
        self._emit(StartedShutdown())
        self._deadline = self._loop.time() + self._crew.settings.timeout_graceful_shutdown
        self._handles.leave_to_another(shared)
        self._dispatcher.bequeath(continued, heir)
        self._close_soon()
        return self._crew.settings.timeout_graceful_shutdown

    def _begin(self) -> None:
        """No delay, or it is over."""
        self.close()
        how, first = self._reconciler.stopping, not self._deadline
        if first:
            self._deadline = self._loop.time() + self._crew.settings.timeout_graceful_shutdown
            logger.info("Stopping %s", "quickly" if how is Stop.QUICK else "when what was accepted is served")
        if how is Stop.QUICK or not self._roster.proven:
            self._close_listeners()
            self._stop_workers()
        elif first:
            self._close_soon()

    def _close_soon(self) -> None:
        self._dispatcher.accept_rest()
        self._loop.call_later(LISTENER_LINGER, self._close_listeners)
        self._loop.call_at(self._deadline, self._stop_workers)

    def _close_listeners(self) -> None:
        if not self._handles.closed:
            self._dispatcher.accept_rest()
            self._handles.close()
            self._dispatcher.end_idle()
            self.queue_is_empty()

    def queue_is_empty(self) -> None:
        """Once nothing more can come and nothing waits, the workers may go."""
        ends = self._reconciler.stopping is not Stop.NO and self._handles.closed
        if ends and not self._dispatcher.distributor.queued:
            self._stop_workers()

    def _stop_workers(self) -> None:
        if self._reconciler.target.stop.value < self._reconciler.stopping.value:
            self._reconciler.target = dataclasses.replace(self._reconciler.target, stop=self._reconciler.stopping)
            left = max(0.0, self._deadline - self._loop.time())
            self._roster.limits = dataclasses.replace(self._roster.limits, graceful=left)
            self._reconciler.reconcile()
            self._dispatcher.expect_no_workers()

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None
