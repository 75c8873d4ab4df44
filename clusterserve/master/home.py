"""`Home`: the event loop on which a program's handlers run, whoever turns it.

`async with Cluster` makes it the program's own loop; `with Cluster` and `start()` a thread of ours.  What is posted is
called there in the order in which it was posted.  The engine never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import uvloop

logger = logging.getLogger("clusterserve")

#: How long the end waits for handlers that have not come to theirs (seconds).
LAST_WORDS: Final = 5.0


class Home:
    """On `loop`, which is somebody else's, or else on a thread's own, from `start` to `finish`."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = uvloop.new_event_loop()
            # A daemon: a handler that hangs must not keep the program from ending.
            self._thread = threading.Thread(target=self._run, name="clusterserve-events", daemon=True)
        self.loop = loop
        self._ident = None if self._thread is not None else threading.get_ident()
        self._waiting: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._ending = False

    def start(self) -> None:
        """Start the thread, if there is to be one."""
        if self._thread is not None:
            self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread on which handlers run, which must not wait for them."""
        return threading.get_ident() == (self._thread.ident if self._thread is not None else self._ident)

    @property
    def is_open(self) -> bool:
        """Whether handlers can still be called.  A program's loop may be closed before the cluster ends."""
        return not self.loop.is_closed()

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have it called there, soon.  For any thread; never waits.

        When the loop is closed it is called at once, on this thread, after all that has waited: only the books are
        kept then (`is_open`).
        """
        self._waiting.append((function, arguments))
        try:
            self.loop.call_soon_threadsafe(self._next)
        except RuntimeError:
            while self._waiting:
                self._next()

    def finish(self, within: float = LAST_WORDS) -> None:
        """Call what still waits, let handlers end, and end the thread, within so many seconds.

        Somebody else's loop goes on by itself.  May be called again, and by a handler.
        """
        if self._thread is None:
            return
        if self._thread.ident is None:
            # A Ctrl-C before there was a thread.
            self.loop.close()
            return
        self.post(self._end)
        if not self.is_here:
            self._thread.join(within)
            if self._thread.is_alive():
                logger.warning("A handler did not return within %g s and is left behind", within)

    def _end(self) -> None:
        if not self._ending and self.is_open:
            self._ending = True
            self.loop.stop()

    def _next(self) -> None:
        # One for each call: another thread's may have taken it when the loop was closed.
        with contextlib.suppress(IndexError):
            function, arguments = self._waiting.popleft()
            function(*arguments)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        with contextlib.closing(self.loop):
            while not self._ending:
                self._turn(self.loop.run_forever)
            self._turn(lambda: self.loop.run_until_complete(self._last_words()))

    def _turn(self, run: Callable[[], None]) -> None:
        try:
            run()
        except (SystemExit, KeyboardInterrupt):
            # The main thread's business, and this is not it.
            logger.exception("A handler tried to end the program")

    async def _last_words(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            # A moment less than who waits for the thread.
            _, tasks = await asyncio.wait(tasks, timeout=LAST_WORDS * 0.9)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()
