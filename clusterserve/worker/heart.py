"""The worker's heartbeat.  A timer of the event loop sends it, never a thread: it proves that the loop turns.

Where requests are served in threads, it says besides when nothing is to be expected of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..core.heartbeat import pace
from ..core.messages import Beat, Message
from ..settings import Settings


class Heart:
    """Beats from `start` on, as long as the loop runs.  `served` tells the requests served so far; `stuck`, whether its
    threads are stuck."""

    def __init__(
        self,
        settings: Settings,
        send: Callable[[Message], None],
        served: Callable[[], int],
        stuck: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pause = pace(settings.timeout)
        self._wanted = bool(settings.timeout or settings.limit_max_requests)
        self._send = send
        self._served = served
        self._stuck = stuck
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Beat on `loop` from now on, and on no other, if anybody wants to know."""
        self._loop = loop
        if self._wanted:
            loop.call_later(self._pause, self._beat, loop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is not self._loop:
            # Another one is to prove itself.
            return
        self._send(Beat(self._served(), self._stuck()))
        loop.call_later(self._pause, self._beat, loop)
