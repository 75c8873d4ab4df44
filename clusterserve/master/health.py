"""How the workers do: what they say of themselves, and what the kernel says of their memory.

Facts for the roster, on timers of its own; what follows from them is `plan`'s business.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterable
from typing import Final

from ..core.heartbeat import pace
from ..core.roster import Roster
from ..core.wear import Wear
from ..settings import Settings

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Health:
    """Owns its timers, from `start` to `close`.  `pids` names every living worker, `changed` is called when `plan`
    may have something to say."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        roster: Roster,
        pids: Callable[[], Iterable[tuple[int, int]]],
        changed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._roster = roster
        self._pids = pids
        self._changed = changed
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}

    def start(self) -> None:
        if self._settings.timeout:
            self._again(self._look, pace(self._settings.timeout))
        if self._settings.workers_max_rss:
            self._again(self._weigh, self._settings.rss_sample_interval)

    def use(self, settings: Settings) -> None:
        """Look after the workers as these settings say, from now on."""
        self.close()
        self._settings = settings
        self.start()

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def wear(self) -> Wear:
        """What a new worker may take: the limits, each with a jitter of its own, lest all are worn at once."""
        settings = self._settings
        requests, lifetime = settings.limit_max_requests, settings.workers_lifetime
        return Wear(
            requests=requests and requests + random.randint(0, settings.limit_max_requests_jitter),
            lifetime=lifetime and lifetime + random.uniform(0.0, settings.workers_lifetime_jitter),
            rss=settings.workers_max_rss,
            samples=settings.rss_samples,
        )

    def heard(self, worker: int, served: int, *, stuck: bool = False) -> None:
        """A worker's heartbeat."""
        if self._roster.heard(worker, served, self._loop.time(), stuck=stuck):
            self._changed()

    def _again(self, do: Callable[[], None], after: float) -> None:
        self._timers[do] = self._loop.call_later(after, do)

    def _look(self) -> None:
        self._again(self._look, pace(self._settings.timeout))
        # Between two looks the loop has read its channels, and a late look adds no more silence than one in time:
        # whatever a worker said while nobody listened is known before anyone is taken for hung.
        if self._roster.looked(self._loop.time()):
            self._changed()

    def _weigh(self) -> None:
        self._again(self._weigh, self._settings.rss_sample_interval)
        weigh = proportional if self._settings.preload else resident
        worn = False
        for worker, pid in self._pids():
            if self._roster.members[worker].serving:
                worn = self._roster.weighed(worker, weigh(pid), self._loop.time()) or worn
        if worn:
            self._changed()


def resident(pid: int) -> int:
    """The memory a process holds in RAM, in bytes (proc(5), statm); 0 if it is no more.

    Of `smaps_rollup` this is the same figure, for which the kernel walks all its pages.
    """
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


def proportional(pid: int) -> int:
    """The same, but what it shares with other processes counts a part each (proc(5), smaps_rollup: Pss).

    The kernel walks all its pages for this.  Where it does not tell, which takes CAP_SYS_PTRACE for another user's
    process, it is what the process holds.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            for line in rollup:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
    except PermissionError:
        return resident(pid)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0
