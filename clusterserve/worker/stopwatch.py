"""How long requests hold the event loop: their bytes being read, and the first steps of the tasks that they create.

Between the two, and behind them, the loop runs what belongs to others: an application that awaits and then computes
would be charged for every request that computes at that moment, and taken for expensive.  So whoever reads starts the
watch, stops it when everything is read, and lets the loop start and stop it again in front of the first and behind the
last of those tasks.
"""

from __future__ import annotations

from resource import RUSAGE_THREAD, getrusage, struct_rusage
from time import perf_counter
from typing import Final

#: A time shorter than this (seconds) is taken at its word: asking the kernel is not worth it.
_DOUBTFUL: Final = 0.0005

#: So often, after a longer one, the kernel is asked.
EXACT: Final = 512


class Stopwatch:
    """Adds up in `spent` what passes between `start` and `stop` (seconds), less what others had of the processor.

    A handler that sleeps or waits gives up the processor of its own will, and its time counts in full.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._runs = False
        self._began = 0.0
        self._exact = EXACT
        self._usage: struct_rusage | None = None

    def start(self) -> None:
        self._runs = True
        # A system call, a twentieth of a cheap request: only as long as some time has been doubtful lately.
        self._usage = getrusage(RUSAGE_THREAD) if self._exact else None
        self._began = perf_counter()

    def stop(self) -> None:
        """Of one that does not run, without effect."""
        if self._runs:
            self._runs = False
            took = perf_counter() - self._began
            if took < _DOUBTFUL:
                if self._exact:
                    self._exact -= 1
                self.spent += took
            else:
                self.spent += self._own(took)

    def _own(self, took: float) -> float:
        self._exact = EXACT
        before = self._usage
        if before is None:
            # Out of the blue: whether it worked or waited is known of the next ones.
            return _DOUBTFUL
        usage = getrusage(RUSAGE_THREAD)
        if usage.ru_nvcsw != before.ru_nvcsw:
            return took
        return usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
