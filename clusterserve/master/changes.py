"""`Changes`: who waits for what was ordered of the whole cluster."""

from __future__ import annotations

import asyncio

from ..errors import ClusterError


class Changes:
    """Futures of the engine's loop.  Who gave up waiting is left out; whose error nobody asks for is not missed."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[asyncio.Future[None]] = []

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def begin(self) -> asyncio.Future[None]:
        """Done with the next `over`."""
        change: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(change)
        return change

    def over(self, error: ClusterError | None = None) -> None:
        """It is as it was ordered, or never will be."""
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if change.cancelled():
                continue
            if error is None:
                change.set_result(None)
            else:
                change.set_exception(error)
                # A signal may have asked for it, and the log has told.
                change.exception()
