"""Whether connections stay here between two requests, and whether the next request finds a thread.

A connection is kept while requests are cheap (`core.cost`); where they are served in threads, only while many of these
are free: else the requests in the master's queue would watch the threads go to the connections that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..core.cost import Cost

if TYPE_CHECKING:
    from .threads import Threads
    from .watch import Watch

#: More connections than this go back at once: what is kept costs a worker memory, and the master next to none.
MOST_KEPT: Final = 512


class Keeping:
    """Says on the board, by its `counters`, how many threads there are and how many of them are occupied.

    `on_free()` is called when a thread becomes free where all were occupied.
    """

    def __init__(self, counters: memoryview[int], on_free: Callable[[], None]) -> None:
        self._counters = counters
        self._on_free = on_free
        #: Whether a connection is worth keeping for its next request, now.
        self.keeps = False
        #: Whether requests need a thread each, of which there are so many (`has_room`).
        self.crowds = False
        #: Whether connections are kept at all, where the master can take them back.
        self.possible = False
        self._watch: Watch | None = None
        self._always = False
        self._most = MOST_KEPT
        self._cost = Cost()
        # Where requests are served in threads: how many of this turn will need one.
        self._threads: Threads | None = None
        self._begun = 0
        self._crowded = self._last = False

    def start(self, watch: Watch, *, keep: bool, capacity: int | None) -> None:
        """Keep connections in `watch` from now on: if it is shared and with `keep`, as long as that is worth it.

        Of the `capacity` connections that this worker may have, half at most are idle.
        """
        self._watch = watch
        if capacity is not None:
            self._most = min(MOST_KEPT, capacity // 2)
            keep = keep and (self._most > 0 or not watch.shared)
        self.keeps = self._always = keep
        self.possible = keep and watch.shared

    def stop(self) -> None:
        """Keep nothing any more."""
        self.possible = self.keeps = self._always = False

    def returns_real(self, watch: Watch | None) -> bool:
        """Whether a connection that has become the loop's goes back after its response: it cannot wait in `watch`.

        Where requests need a thread it does so always: the loop would read the next one, whether there is one or not.
        """
        return watch is None or watch.shared or not self.keeps or self._threads is not None

    def turned(self, held: float, requests: int) -> None:
        """A turn has ended, in which so many requests (0: none) held the loop for so long (seconds)."""
        self._begun = 0
        watch = self._watch
        if requests and watch is not None and self._threads is None:
            self._weigh(watch, held, requests)

    def _weigh(self, watch: Watch, held: float, requests: int) -> None:
        self._cost.took(held, requests)
        if watch.shared:
            self.keeps = self.possible and self._cost.cheap and len(watch) < self._most
        watch.claims = self._cost.batch

    # -- threads --------------------------------------------------------------------------------------------------

    def employ(self, threads: Threads) -> None:
        """Requests are served in these threads from now on: what finds none free is left, unread, to other workers."""
        self._threads, self.crowds = threads, True
        self._counters[3] = threads.places
        threads.on_begin, threads.on_end = self._occupied, self._vacated

    def has_room(self) -> bool:
        """Whether the next request has a thread, which is reserved for it until the end of this turn."""
        if self._threads is not None and not self._last:
            # One that was read in this turn gets its thread when its task runs, right before the turn ends.
            if self._threads.busy + self._begun >= self._threads.places:
                return False
            self._begun += 1
        return True

    def take_all(self) -> None:
        """Nobody is left who could take what finds no thread: it waits for one here."""
        self._last = True

    def _occupied(self) -> None:
        assert self._threads is not None
        self._counters[2] = self._threads.busy
        self._begun = max(0, self._begun - 1)
        if self._threads.busy >= self._threads.places:
            self._crowded, self.keeps = True, False

    def _vacated(self, seconds: float) -> None:
        assert self._threads is not None
        self._counters[2] = self._threads.busy
        if self._threads.busy == self._threads.places - 1:
            self._on_free()
        self._crowded = self._crowded and self._threads.busy * 2 >= self._threads.places
        self.keeps = self._always
        watch = self._watch
        if watch is not None:
            self._weigh(watch, seconds, 1)
        self.keeps = self.keeps and not self._crowded
