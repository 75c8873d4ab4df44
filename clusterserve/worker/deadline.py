"""`--timeout-request`: ends the requests that have been running for too long.

Looks at the running requests from time to time instead of timing each, so a request costs nothing and may take a
quarter longer, by two seconds at most.  The time counts from when the application is called: the head is read, the body
may still be on its way.  Time in which nobody could look hardly counts (the machine slept, the process was stopped,
another handler held the loop): the request could not go on either.  What runs on behind a complete response is nobody's
request any more and is left alone, and so is a WebSocket.

Knows of uvicorn what `draining.py` knows, and of its requests' state: `transport`, `response_started`,
`response_complete`, and that nothing is sent once `disconnected` is set, which the protocol's `connection_lost` does
(contract tests in tests/worker/test_deadline.py).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, cast

from .draining import RAISED, cycle_of, described

logger = logging.getLogger("uvicorn.error")

#: How often is looked in the time a request may take, and how rarely at most (seconds).
LOOKS: Final = 8
LOOK: Final = 1.0

#: What a look counts at most that comes late, of the time in which it was due.
LATE: Final = 2

#: How long a client may go on sending after it was told, so that it can read that (seconds).
LINGER: Final = 2.0

GATEWAY_TIMEOUT: Final = (
    b"HTTP/1.1 504 Gateway Timeout\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 27\r\n"
    b"connection: close\r\n\r\nThe request took too long\r\n"
)


class Deadline:
    """Requests may take `timeout` seconds; `tasks` are uvicorn's running requests."""

    def __init__(self, tasks: set[asyncio.Task[None]], timeout: float) -> None:
        self._tasks = tasks
        self._timeout = timeout
        self._pause = min(LOOK, timeout / LOOKS)
        #: For how long each has been running, as far as it was looked at.
        self._ages: dict[asyncio.Task[None], float] = {}
        self._looked = 0.0
        #: Those that were ended and have not noticed yet.
        self.ended: set[asyncio.Task[None]] = set()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look now, and from time to time."""
        before, self._looked = self._looked, loop.time()
        passed = min(self._looked - before, LATE * self._pause)
        self._ages = {task: self._ages[task] + passed if task in self._ages else 0.0 for task in self._tasks}
        for task, age in self._ages.items():
            if age >= self._timeout and task not in self.ended:
                self._end(loop, task, age)
        loop.call_later(self._pause, self.watch, loop)

    def _end(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], age: float) -> None:
        cycle = cycle_of(task)
        if (getattr(cycle, "scope", None) or {}).get("type") != "http" or cycle.response_complete:
            return
        if cycle.disconnected:
            then = "its client has left"
        elif cycle.response_started:
            then = "the connection is closed"
        else:
            then = "its client is told so (504)"
            cycle.transport.write(GATEWAY_TIMEOUT)
        logger.error("%s has been running for %.1f s and is cancelled; %s", described(task), age, then)
        if not cycle.disconnected:
            # Of the requests that wait behind this one the protocol knows the newest only, so it would not tell this.
            cycle.disconnected = True
            Lingering(loop, cycle.transport, "the request took too long")
        self.ended.add(task)
        task.add_done_callback(self.ended.discard)
        task.cancel("the request took longer than --timeout-request")

    def filter(self, record: logging.LogRecord) -> bool:
        """For uvicorn's logger: leave out the tracebacks that end in our own order."""
        return not (
            self.ended
            and record.msg == RAISED
            and record.exc_info is not None
            and isinstance(record.exc_info[1], asyncio.CancelledError)
            and asyncio.current_task() in self.ended
        )


class Lingering(asyncio.Protocol):
    """Takes the place of uvicorn's protocol when its connection is over but for what the client still sends.

    Closing at once would reset what the client has not read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: Any, why: str) -> None:
        protocol = cast("asyncio.Protocol", transport.get_protocol())
        if transport.is_closing() or not transport.can_write_eof():
            # On its way out, or TLS, which says goodbye itself.
            transport.close()
            return
        self._timer = loop.call_later(LINGER, transport.abort)
        transport.set_protocol(self)
        transport.write_eof()
        transport.resume_reading()
        # With an error, or it would close the transport, as if that had ended of itself.
        protocol.connection_lost(ConnectionAbortedError(why))

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
