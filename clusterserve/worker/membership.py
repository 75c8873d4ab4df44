"""What `current_worker()` is and does in a worker that serves an application."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from ..channel.descriptors import Riders
from ..core.address import Address
from ..core.envelope import Envelope
from ..currentworker import CurrentWorker
from ..home import Home
from .link import Link

#: How long the master may take to read what is said last (seconds).
LAST_WORDS: Final = 5.0

Shutdown = Callable[..., Coroutine[Any, Any, None]]


class Membership:
    """Between `worker` and `link`; all of it on the application's loop, but for `post` and `ask_to_leave`."""

    def __init__(self, link: Link, worker: CurrentWorker) -> None:
        self._link = link
        self.worker = self._worker = worker

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the application's, and runs from now on."""
        self._worker.join(self, Home(loop))
        self._link.on_envelope = self._received

    def _received(self, envelope: Envelope, riders: Riders) -> None:
        self._worker.received(envelope, riders)

    def listens(self, address: Address) -> None:
        """A server is in place."""
        self._worker.tell("listening", address, state="listening")

    def started(self) -> None:
        """The application has started: messages that nobody listens to are dropped from now on."""
        self._worker.started_up()

    def drains(self) -> None:
        """The master has told us to go."""
        if self._worker.exited_after_disconnect is None:
            self._worker.exited_after_disconnect = True
            self._worker.tell("draining", state="draining")

    @property
    def in_a_hurry(self) -> bool:
        """Whether the worker has asked to be destroyed: connections need not be waited for."""
        return bool(self._worker.farewell)

    def says_goodbye(self, shutdown: Shutdown) -> Shutdown:
        """uvicorn's `shutdown`, at whose end nothing is left but the handlers of `disconnect`."""

        async def goodbye(*args: Any, **options: Any) -> None:
            await shutdown(*args, **options)
            done = asyncio.Event()
            self._worker.leave(done.set)
            await done.wait()
            self._link.finish(LAST_WORDS)
            if self._worker.farewell:
                self.die(self._worker.farewell)

        return goodbye

    # -- what the worker needs ------------------------------------------------------------------------------------

    def ask_to_leave(self) -> None:
        """Ask the master to be drained."""
        self._link.ask_to_leave()

    def post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        """A message of the application's."""
        self._link.post(envelope, descriptors, done)

    def handle_connection(self, sock: socket.socket) -> None:
        """A connection for its server.  From any thread."""
        self._link.handle_connection(sock)

    def die(self, number: int) -> None:
        """End by this signal."""
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
