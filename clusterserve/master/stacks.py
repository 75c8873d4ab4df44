"""Collects what every worker does at this moment (SIGPWR), and logs it: one block per worker.

Each worker is signalled, upon which it writes the stacks of its threads into a file in memory, and asked by a message
for those of its tasks.  Nobody says that the first is complete: a handler in C wrote it, maybe while the loop stands
still.  So the file is looked at until it stays as it is and the answer has come, or the time is over.

In the same file are the stacks of one that has crashed, or was hung and got SIGABRT.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..core.messages import ShowStacks, Stacks

logger = logging.getLogger("clusterserve")

#: What a worker has to answer (seconds), and how often its file is looked at.
PATIENCE: Final = 1.0
_PAUSE: Final = 0.05

#: What is read of a file (bytes): hundreds of threads.
_MOST: Final = 1 << 20

#: One record of the log is one write, and no longer than a pipe takes in one piece: other processes write there too.
_WRITE: Final = 3500


#: How faulthandler begins for a fatal signal.
_FATAL: Final = b"Fatal Python error"


@dataclass
class _Asked:
    who: str
    #: A copy of the worker's file, or -1 if it has none.
    fd: int
    until: float
    size: int = 0
    answer: Stacks | None = None


class StackCollector:
    """Asks and logs.  Owns its timer and its copies of descriptors, until `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: dict[int, _Asked] = {}
        self._timer: asyncio.TimerHandle | None = None

    def ask(
        self, worker: int, who: str, fd: int, send: Callable[[ShowStacks], object], kill: Callable[[int], None]
    ) -> None:
        """Ask worker `worker`, called `who`, who has the file `fd` (-1: it is too young), by a message and a signal.

        Nothing happens if it is being asked already.
        """
        if worker in self._asked:
            return
        if fd < 0:
            logger.warning("%s starts: it cannot tell its stacks yet", who)
            return
        try:
            copy = os.dup(fd)
        except OSError as exc:
            logger.warning("%s: its stacks cannot be read: %s", who, exc)
            return
        os.ftruncate(copy, 0)
        self._asked[worker] = _Asked(who, copy, self._loop.time() + PATIENCE)
        kill(signal.SIGPWR)
        send(ShowStacks())
        if self._timer is None:
            self._timer = self._loop.call_later(_PAUSE, self._look)

    def answered(self, worker: int, answer: Stacks) -> None:
        """A worker's answer; one that comes too late counts for nothing."""
        asked = self._asked.get(worker)
        if asked is not None:
            asked.answer = answer

    def gone(self, worker: int) -> None:
        """A worker has exited: tell what it has told."""
        if worker in self._asked:
            self._tell(worker)

    def crashed(self, who: str, fd: int) -> None:
        """One that has exited, called `who`, may have left its stacks in its file `fd`: log them."""
        text = os.pread(fd, _MOST, 0)
        begun = text.rfind(_FATAL)
        if begun >= 0:
            _log(who, "its stacks at the end", text[begun:].decode(errors="replace").splitlines(), logging.ERROR)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for asked in self._asked.values():
            os.close(asked.fd)
        self._asked.clear()

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        for worker, asked in list(self._asked.items()):
            size = os.fstat(asked.fd).st_size
            if (asked.answer is not None and size and size == asked.size) or now >= asked.until:
                self._tell(worker)
            asked.size = size
        if self._asked:
            self._timer = self._loop.call_later(_PAUSE, self._look)

    def _tell(self, worker: int) -> None:
        asked = self._asked.pop(worker)
        threads = os.pread(asked.fd, _MOST, 0).decode(errors="replace").rstrip()
        # What comes later is no part of what is asked for next.
        os.ftruncate(asked.fd, 0)
        os.close(asked.fd)
        answer = asked.answer
        if not threads and answer is None:
            logger.warning("%s has not told its stacks: it is stopped, or had no time", asked.who)
            return
        if answer is None:
            tasks = f"Its event loop has not turned for {PATIENCE:g} s: its tasks are not known."
        else:
            tasks = answer.tasks or "It has no tasks."
            threads = _named(threads, answer.threads)
        told = f"{threads or 'It has not told its threads.'}\n{tasks}"
        _log(asked.who, "stacks of its threads and tasks", told.splitlines(), logging.WARNING)


def _named(threads: str, names: dict[str, object]) -> str:
    """The threads with their names, where they have one."""

    def name(found: re.Match[str]) -> str:
        known = names.get(found[2])
        return found[0] if known is None else f"{found[1]} {known} (0x{found[2]})"

    return re.sub(r"^(Thread|Current thread) 0x([0-9a-f]{16})\b", name, threads, flags=re.MULTILINE)


def _log(who: str, what: str, lines: list[str], level: int) -> None:
    part: list[str] = []
    size = 0
    for line in lines:
        if part and size + len(line) > _WRITE:
            logger.log(level, "%s, %s:\n%s", who, what, "\n".join(part))
            part, size, what = [], 0, "continued"
        part.append(line)
        size += len(line) + 1
    logger.log(level, "%s, %s:\n%s", who, what, "\n".join(part))
