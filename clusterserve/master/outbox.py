"""The way of the program's messages to the workers: from any thread of the program's to the engine's loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..channel.message import MessageChannel
from ..core.envelope import Envelope


class _Posted(NamedTuple):
    worker: int
    envelope: Envelope
    descriptors: list[int]
    done: Callable[[bool], None]


class Outbox:
    """Open until `close`.  What is posted to nobody, or after that, comes back as not sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, channel: Callable[[int], MessageChannel | None]) -> None:
        self._loop = loop
        self._channel = channel
        self._lock = threading.Lock()
        self._posted: deque[_Posted] = deque()
        self._open = True

    def post(self, worker: int, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        """Send a message to a worker, in the order in which this is called; any thread may.

        Takes the descriptors over.  `done` is called once, on any thread, with whether the kernel has all of it.
        """
        posted = _Posted(worker, envelope, descriptors, done)
        with self._lock:
            if self._open:
                self._posted.append(posted)
                # A closed loop whose engine has not said so yet: it takes along what waits.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._next)
                return
        _return(posted)

    def _next(self) -> None:
        """One for each call, so that a program that sends a lot does not hold the loop."""
        if not self._posted:
            return
        posted = self._posted.popleft()
        channel = self._channel(posted.worker)
        if channel is None:
            _return(posted)
        else:
            channel.post(posted.envelope, posted.descriptors, posted.done)

    def close(self) -> None:
        """Nobody is there any more."""
        with self._lock:
            self._open = False
        while self._posted:
            _return(self._posted.popleft())


def _return(posted: _Posted) -> None:
    for fd in posted.descriptors:
        os.close(fd)
    posted.done(False)
