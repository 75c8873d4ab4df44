"""`Home`: where a worker's handlers run, and in which order.

That is the program's event loop while one runs, the main thread's if there are several; else the thread of ours that
reads the message channel.  What is to run waits in one line, so that nothing is lost or overtaken when a loop ends and
the next begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Home:
    """`run` is for any thread.  `fallback` is a loop that always runs."""

    def __init__(self, fallback: asyncio.AbstractEventLoop) -> None:
        self._fallback = fallback
        self._loop = fallback
        self._line: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._busy = threading.Lock()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where it runs now."""
        return self._loop

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call it soon, behind everything that is to run already."""
        self._line.append((function, arguments))
        self._wake()

    def call_soon_threadsafe(self, function: Callable[..., None], *arguments: Any) -> None:
        """`run`, as a loop has it."""
        self.run(function, *arguments)

    def call_later(self, delay: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call it after so many seconds, whichever loop runs then."""
        self._fallback.call_soon_threadsafe(self._fallback.call_later, delay, self.run, function, *arguments)

    def enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is about to run, in this thread."""
        if self._loop is self._fallback or threading.current_thread() is threading.main_thread():
            self._loop = loop
            loop.call_soon(self._work)

    def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` does not run any more."""
        if self._loop is loop:
            self._loop = self._fallback
            self._wake()

    def _wake(self) -> None:
        if self._line:
            # A loop that is closed has not said so: a class of its own that knows nothing of us.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._work)

    def _work(self) -> None:
        # Not on two threads at once, when a loop ends in the midst of it: who comes second leaves it to the first.
        if not self._busy.acquire(blocking=False):
            return
        try:
            while self._line:
                function, arguments = self._line.popleft()
                function(*arguments)
        finally:
            self._busy.release()
            # Also if that raised SystemExit; and what came while nobody else could take it.
            self._wake()
