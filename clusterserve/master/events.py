"""Telling of events: in order, and never on the engine's loop.

The listeners are other people's code.  They have a thread and an asyncio loop of their own: one that blocks delays only
those behind it, one that raises is logged, and the engine never waits for any, save for a moment at the very end.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from ..core.events import Event, arguments

logger = logging.getLogger("clusterserve")

#: Events that may wait for listeners that do not get on; what comes then is lost, and that is logged.
MOST_WAITING: Final = 10_000

#: How long the end waits for listeners that have not come to theirs (seconds).
LAST_WORDS: Final = 5.0

#: By an event's name: who is called with its arguments, one after the other; a coroutine is awaited.
Listeners = Mapping[str, Sequence[Callable[..., Any]]]


class EventThread:
    """Calls the listeners that `load`, itself run on that thread, returns."""

    def __init__(self, load: Callable[[], Listeners]) -> None:
        self._load = load
        self._ready: Future[None] = Future()
        self._waiting: deque[Event] = deque()
        self._losing = False
        self._ending = False
        self._current = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._more: asyncio.Event
        # A daemon: a listener that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="clusterserve-events", daemon=True)

    def start(self) -> None:
        """Start; returns when the listeners are loaded, and raises what kept them from it."""
        self._thread.start()
        self._ready.result()

    def emit(self, event: Event) -> None:
        """Tell of `event`, soon.  Any thread may call this; it never waits and never raises."""
        if len(self._waiting) >= MOST_WAITING:
            if not self._losing:
                self._losing = True
                logger.error("%s does not return: %d events wait, and more are lost", self._current, MOST_WAITING)
            return
        self._losing = False
        self._waiting.append(event)
        self._wake()

    def finish(self, within: float = LAST_WORDS) -> None:
        """Tell of what still waits and end, within so many seconds; what is not told then is lost."""
        self._ending = True
        self._wake()
        self._thread.join(within)
        if self._thread.is_alive():
            logger.warning("%s did not return within %g s and is left behind", self._current, within)

    def _wake(self) -> None:
        # A closed loop tells nobody any more.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._more.set)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            listeners = self._load()
        except BaseException as exc:  # noqa: BLE001 - whatever it is, `start` waits to hear of it
            self._ready.set_exception(exc)
            return
        # Not asyncio.run: what ends its loop, the SystemExit of a task that a listener has made, ends it for all.
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            telling = loop.create_task(self._deliver(listeners))
            while not telling.done():
                _go_on(loop, telling)
            loop.run_until_complete(_cancel_the_rest())

    async def _deliver(self, listeners: Listeners) -> None:
        self._more = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready.set_result(None)
        while True:
            # Cleared first: what comes from here on sets it again.
            self._more.clear()
            while self._waiting:
                event = self._waiting.popleft()
                for listener in listeners.get(event.name, ()):
                    await self._call(listener, event)
            if self._ending and not self._waiting:
                return
            await self._more.wait()

    async def _call(self, listener: Callable[..., Any], event: Event) -> None:
        module, name = getattr(listener, "__module__", ""), getattr(listener, "__qualname__", repr(listener))
        self._current = f"{name} of {module}"
        try:
            result = listener(*arguments(event))
            if inspect.isawaitable(result):
                await result
        except BaseException as exc:
            # Other people's code; also a sys.exit(), whose thread this is not.  The first frame is this one.
            trace = exc.__traceback__ and (exc.__traceback__.tb_next or exc.__traceback__)
            logger.error("%s raised", self._current, exc_info=(type(exc), exc, trace))


def _go_on(loop: asyncio.AbstractEventLoop, telling: asyncio.Task[None]) -> None:
    try:
        loop.run_until_complete(telling)
    except (SystemExit, KeyboardInterrupt):
        logger.exception("A task of a listener's tried to end the program")


async def _cancel_the_rest() -> None:
    """What listeners have left running."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
