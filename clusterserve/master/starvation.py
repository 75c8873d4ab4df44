"""Is a late worker stuck, or does it only wait for a processor?

A worker that makes no progress because its application holds the loop should lose its turn; one that the kernel
does not let run, because everything else runs, should not: on a busy machine all are late in turn, and taking turns
away would only make the distribution uneven.  /proc tells them apart: a starving process is runnable, and its
running time stands still (proc(5), `stat`; Documentation/scheduler/sched-stats).
"""

from __future__ import annotations

import contextlib
import os


class Starvation:
    """Looks at late processes, and remembers what it saw last time.

    Owns two descriptors for each until `forget` or `close`.
    """

    def __init__(self) -> None:
        self._threads: dict[int, _MainThread] = {}

    def starves(self, pid: int, now: float) -> bool:
        """Whether process `pid` is runnable and has hardly run since the last look (the first look believes it)."""
        thread = self._threads.get(pid)
        if thread is None:
            thread = self._threads[pid] = _MainThread(pid)
        before, (state, ran) = thread.seen, thread.look()
        thread.seen = now, ran
        if state != b"R":
            return False
        if before is None or now - before[0] > 1.0:
            return True
        return ran - before[1] < (now - before[0]) * 1e9 / 2

    def forget(self, pid: int) -> None:
        """The process is gone."""
        thread = self._threads.pop(pid, None)
        if thread is not None:
            thread.close()

    def close(self) -> None:
        """Forget all."""
        for pid in tuple(self._threads):
            self.forget(pid)


class _MainThread:
    """Of a process, by open files of /proc: on a busy machine each worker is looked at every few milliseconds, and
    opening them costs five times what reading does.  Nor can another process's be meant when the id is used again.
    """

    def __init__(self, pid: int) -> None:
        self.seen: tuple[float, int] | None = None
        self._files: list[int] = []
        # Who is gone, or whose files are not for us, is never seen to starve.
        with contextlib.suppress(OSError):
            for name in ("stat", "schedstat"):
                self._files.append(os.open(f"/proc/{pid}/task/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))

    def look(self) -> tuple[bytes, int]:
        """Its state's letter, and how long it has run (ns); an empty letter if it cannot be known."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat, schedstat = self._files
            state = os.pread(stat, 1024, 0).rpartition(b")")[2].split(None, 1)[0]
            return state, int(os.pread(schedstat, 64, 0).split(None, 1)[0])
        return b"", 0

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)
