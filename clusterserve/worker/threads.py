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


class Job:
    """What is to be run, and what has become of it; written on the loop."""

    __slots__ = ("lost", "over", "run")

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.lost = self.over = False


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
        #: Of those, jobs that were given up.
        self.lost = 0
        # Grows with everything that shows that a thread gets on; and what it was when that was last asked.
        self._signs = self._seen = 0
        self._started = 0
        self._jobs: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, Job]] = queue.SimpleQueue()

    def begin(self, loop: asyncio.AbstractEventLoop, run: Callable[[], None]) -> Job:
        """Run `run`, which must not raise, in a thread.  Raises RuntimeError if the system has no thread for it."""
        if self._started < min(self.places, self.busy + 1):
            # One that has ended its job counts as busy until the loop has heard of it: then there is one for this job.
            threading.Thread(target=self._work, name=f"wsgi-{self._started}", daemon=True).start()
            self._started += 1
        # One that has to wait is no sign of anything.
        self._signs += not self.busy
        self.busy += 1
        job = Job(run)
        self._jobs.put((loop, job))
        self.on_begin()
        return job

    def give_up(self, job: Job) -> None:
        """Nobody waits for what comes of it any more; it goes on all the same."""
        if not job.over and not job.lost:
            job.lost = True
            self.lost += 1

    def gets_on(self) -> None:
        """Something has come of a thread; called on the loop."""
        self._signs += 1

    def stuck(self) -> bool:
        """Asked now and then: whether nothing is to be expected of any thread, as it looks since the last time.

        That is so if nobody waits for what they do.  An only thread is also stuck when nothing comes of it: no request
        begins or ends, and nothing of a body or a response goes through.
        """
        before, self._seen = self._seen, self._signs
        if self.places == 1 and self.busy and self._signs == before:
            return True
        return self.lost >= self.places

    def _work(self) -> None:
        while True:
            loop, job = self._jobs.get()
            began = perf_counter()
            job.run()
            took = perf_counter() - began
            # It refers to the request, which has the job: a cycle, for the collector only to find.
            del job.run
            # Behind the end of the loop nobody counts any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended, job, took)
            # Whoever waits here for the next job must not keep the last one's request alive.
            del job

    def _ended(self, job: Job, took: float) -> None:
        self.busy -= 1
        self._signs += 1
        job.over = True
        if job.lost:
            self.lost -= 1
        self.on_end(took)
