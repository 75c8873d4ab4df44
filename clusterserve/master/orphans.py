"""The duty of process 1 (in a container): to reap whatever processes are left to it by their dead parents.

Two looks, a second apart: what a part of this program has started itself, a hook for one, it will have waited for by
the second, and only strangers are left.  Workers are always left to whoever waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Final

_PAUSE: Final = 1.0


class Orphans:
    """Reaps from `start` to `close`.  `ours` tells the processes that others wait for."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ours: Callable[[], Iterable[int]]) -> None:
        self._loop = loop
        self._ours = ours
        self._seen: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Look now, and every second from now on."""
        self._timer = self._loop.call_later(_PAUSE, self.start)
        dead = zombies(os.getpid()) - set(self._ours()) if _any_dead() else set()
        for pid in dead & self._seen:
            # Whoever started it may have waited for it just now.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._seen = dead

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def zombies(parent: int) -> set[int]:
    """The children of this process that are dead and not waited for (proc(5))."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat", "rb") as stat:
                # The name of the program, in brackets, may hold anything.
                state, ppid = stat.read().rpartition(b")")[2].split()[:2]
                if state == b"Z" and int(ppid) == parent:
                    found.add(int(name))
    return found


def _any_dead() -> bool:
    """Whether there is anything to look for: one system call, as long as there is not."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False
