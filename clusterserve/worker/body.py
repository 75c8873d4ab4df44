"""The body of a request, read by a WSGI application in its thread while it arrives on the event loop.

a2wsgi's own takes a client that leaves in the middle for the end of the body, and answers `readline(limit)` with what
it happens to have.  Here the first is an error, and the second is Python's: an `io.BufferedReader` around `Body`.
"""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

#: Of a body that the application does not read so much is taken in, to notice whether its client leaves (bytes).
_UNREAD: Final = 65536


class ClientGoneError(ConnectionError):
    """The client has left, or the request was ended: what the application reads or writes is of no use any more."""


class Body(io.RawIOBase):
    """`readinto` for the thread, everything else for the loop.  `receive` is ASGI's.

    `on_read` is called, on the loop, when the thread gets some of it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, receive: Callable[[], Awaitable[Any]], on_read: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._receive = receive
        self._on_read = on_read
        # One at a time may ask for more: the application's thread, or `watch`.
        self._turn = asyncio.Lock()
        self._arrived: deque[bytes] = deque()
        self._ended = False
        self._left = False
        self._rest = memoryview(b"")

    # -- in the thread --------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for more of the body; 0 at its end.  Raises `ClientGoneError` if it will not come."""
        if not self._rest:
            if self._ended and not self._arrived and not self._left:
                return 0
            self._rest = memoryview(asyncio.run_coroutine_threadsafe(self._fetch(), self._loop).result())
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    # -- on the loop ----------------------------------------------------------------------------------------------

    async def watch(self) -> bool:
        """Wait until the client leaves, or the response is complete; False if it cannot be known for an unread body."""
        while not self._left:
            async with self._turn:
                if sum(map(len, self._arrived)) >= _UNREAD:
                    return False
                await self._pull()
        return True

    async def _fetch(self) -> bytes:
        # What `watch` has taken in is there for the taking: it may be waiting for what comes next, with the turn.
        while self._must_wait():
            async with self._turn:
                if self._must_wait():
                    await self._pull()
        data = b"".join(self._arrived)
        self._arrived.clear()
        self._on_read()
        if not data and not self._ended:
            raise ClientGoneError("the client has left in the middle of its request")
        return data

    def _must_wait(self) -> bool:
        return not self._arrived and not self._ended and not self._left

    async def _pull(self) -> None:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._left = True
            return
        if message.get("body"):
            self._arrived.append(message["body"])
        self._ended = not message.get("more_body", False)
