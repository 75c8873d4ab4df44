"""How a worker's application and its log learn that the worker leaves.

Next to `protocols.py` the other file that knows the insides of uvicorn's protocols, and each of them has a contract
test (tests/worker/test_draining.py): `Config.loaded_app` may be replaced after `load`; a task of `server_state.tasks`
runs `run_asgi` of an object that has the request's `scope`; what uvicorn logs before it cancels them, and when an
application raises.

The event reaches the application through a *plain function* in front of it, which returns the application's own
coroutine.  Measured per request (CPython 3.11 and 3.13): 0.1 µs, and it is for every protocol, uvicorn's and others.  A
coroutine in front costs as much for its frame alone, and again at each await that passes through it; a subclass of the
protocols would pay a call of `super()` for it, and know `--http` and `--ws` of uvicorn only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

logger = logging.getLogger("uvicorn.error")

#: The name of the extension in `scope["extensions"]`.
EXTENSION: Final = "clusterserve"

#: What uvicorn says when its time limit for requests in flight is over, right before it cancels them.
CANCELLED: Final = "Cancel %s running task(s), timeout graceful shutdown exceeded"

#: What uvicorn says, with a traceback, of everything that comes out of an application, its own cancelling included.
RAISED: Final = "Exception in ASGI application\n"

#: How often is looked which requests are running (seconds).  Their age is known as well as that, at no request's cost.
LOOK: Final = 1.0

#: Requests that are named when the time is over; of more there is only the number.
NAMED: Final = 20


class Draining:
    """One per worker.  `event` is set when the drain begins, `stopping` when the cluster was told to stop.

    `tasks` are uvicorn's running requests, `worker` and `slot` who this is.
    """

    def __init__(self, tasks: set[asyncio.Task[None]], worker: int = 0, slot: int = 0) -> None:
        self.event = asyncio.Event()
        self.stopping = asyncio.Event()
        self._extension = {"draining": self.event, "stopping": self.stopping, "worker": worker, "slot": slot}
        self._tasks = tasks
        self._cut = False
        self._since: dict[asyncio.Task[None], float] = {}

    # -- the application ------------------------------------------------------------------------------------------

    def announced(self, app: Any) -> Any:
        """`app`, whose every scope has the extension."""
        extension = self._extension

        def call(scope: dict[str, Any], receive: Any, send: Any) -> Any:
            # The outer dictionary is each scope's own: what a middleware adds there must not be the next request's.
            if "extensions" in scope:
                scope["extensions"][EXTENSION] = extension
            else:
                scope["extensions"] = {EXTENSION: extension}
            return app(scope, receive, send)

        return call

    def begin(self) -> None:
        """The worker leaves: those who wait for it hear of it in the loop's next turn."""
        self.event.set()

    def cut(self) -> None:
        """Cancel every running request."""
        self._cut = True
        for task in tuple(self._tasks):
            task.cancel("the cluster is stopped quickly")

    # -- the log --------------------------------------------------------------------------------------------------

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note since when each request has been running, from now on."""
        now = loop.time()
        self._since = {task: self._since.get(task, now) for task in self._tasks}
        loop.call_later(LOOK, self.watch, loop)

    def filter(self, record: logging.LogRecord) -> bool:
        """For uvicorn's logger: name the requests that are about to be cancelled, and leave out what comes of it."""
        if record.msg == CANCELLED:
            self._cut = True
            for line in self._overdue():
                logger.error(line)
        # A traceback that ends in the order itself is nobody's fault.
        return not (
            self._cut
            and record.msg == RAISED
            and record.exc_info is not None
            and isinstance(record.exc_info[1], asyncio.CancelledError)
        )

    def _overdue(self) -> Iterator[str]:
        now = asyncio.get_running_loop().time()
        oldest = sorted(self._tasks, key=lambda task: self._since.get(task, now))
        for task in oldest[:NAMED]:
            age = now - self._since.get(task, now)
            yield f"{described(task)} is cut off: it has been running for {age:.0f} s, beyond the grace time"
        if len(oldest) > NAMED:
            yield f"{len(oldest) - NAMED} more requests are cut off"


def cycle_of(task: asyncio.Task[None]) -> Any:
    """The request that a task of uvicorn's serves; None if the task serves something else, or has ended."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame and frame.f_locals.get("self")


def described(task: asyncio.Task[None]) -> str:
    """What a task of uvicorn's serves, as in `GET /path`."""
    scope = getattr(cycle_of(task), "scope", None)
    if not isinstance(scope, dict) or "path" not in scope:
        return "A request"
    # Quoted as in the access log: a path may hold any character, a line break for one.
    return f"{scope.get('method', 'WebSocket')} {quote(scope['path'])}"
