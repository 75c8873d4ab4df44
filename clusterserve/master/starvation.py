"""Is a late worker stuck, or does it only wait for a processor?

A worker that makes no progress because its application holds the loop should lose its turn; one that the kernel
does not let run, because everything else runs, should not: on a busy machine all are late in turn, and taking turns
away would only make the distribution uneven.  /proc tells them apart: a starving process is runnable, and its
running time stands still (proc(5), `stat`; Documentation/scheduler/sched-stats).
"""

from __future__ import annotations

import contextlib


class Starvation:
    """Looks at late processes, and remembers what it saw last time."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, int]] = {}

    def starves(self, pid: int, now: float) -> bool:
        """Whether process `pid` is runnable and has hardly run since the last look (the first look believes it)."""
        state, ran = _look(pid)
        before, self._seen[pid] = self._seen.get(pid), (now, ran)
        if state != "R":
            return False
        if before is None or now - before[0] > 1.0:
            return True
        return ran - before[1] < (now - before[0]) * 1e9 / 2

    def forget(self, pid: int) -> None:
        """The process is gone."""
        self._seen.pop(pid, None)


def _look(pid: int) -> tuple[str, int]:
    """Its state's letter, and how long its main thread has run (ns); an empty letter if it cannot be known."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat") as stat:
        state = stat.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/schedstat") as schedstat:
            return state, int(schedstat.read().split()[0])
    return "", 0
