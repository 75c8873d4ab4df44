"""The threads in which a WSGI application runs, and how many of them are occupied.

Counted on the event loop alone: a thread is occupied from `begin` until the loop has heard that its job has ended, so
`busy` never says less than what runs.  They are daemons, because a thread cannot be ended: what outlives the grace time
must not keep the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from time import perf_counter


class Threads:
    """At most `places` jobs at the same time; more wait for their turn, first come, first served.

    `on_begin()` and `on_end(seconds)` are called on the loop, after `busy` has changed; `seconds` is how long the job
    has taken in its thread.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        #: Jobs that run or wait.
        self.busy = 0
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[float], None] = lambda seconds: None
        self._started = 0
        self._jobs: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = queue.SimpleQueue()

    def begin(self, loop: asyncio.AbstractEventLoop, job: Callable[[], None]) -> None:
        """Run `job`, which must not raise, in a thread.  Raises RuntimeError if the system has no thread for it."""
        if self._started < min(self.places, self.busy + 1):
            # One that has ended its job counts as busy until the loop has heard of it: then there is one for this job.
            threading.Thread(target=self._work, name=f"wsgi-{self._started}", daemon=True).start()
            self._started += 1
        self.busy += 1
        self._jobs.put((loop, job))
        self.on_begin()

    def _work(self) -> None:
        while True:
            loop, job = self._jobs.get()
            began = perf_counter()
            job()
            took = perf_counter() - began
            # Whoever waits here for the next job must not keep the last one's request alive.
            del job
            # Behind the end of the loop nobody counts any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended, took)

    def _ended(self, took: float) -> None:
        self.busy -= 1
        self.on_end(took)
