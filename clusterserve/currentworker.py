"""`CurrentWorker`: what this process can do as a worker, the worker's side of `Worker`."""

from __future__ import annotations

import asyncio
import os
import signal as signals
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from .core.envelope import Envelope
from .errors import ClusterError
from .home import Home
from .messenger import Messenger

EVENTS: Final = ("message", "listening", "draining", "disconnect", "error")


class Wire(Protocol):
    """What a worker needs of its link to the master."""

    def ask_to_leave(self) -> None: ...

    def die(self, signal: int) -> None: ...

    def post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None: ...

    def handle_connection(self, sock: socket.socket) -> None: ...


class CurrentWorker(Messenger):
    """This process as a worker (Node: `cluster.worker`).

    `id` is 1, 2, 3 …, never used again; `slot` is 0 … N-1, and inherited by replacements.  `state` is "online",
    "listening", "draining" or "disconnected", and, like `is_connected`, may be asked from any thread.

    Handlers run on the program's event loop while it runs, else on a thread of their own.  Events: `message(message,
    sockets)`; `listening(address)`, a server of this worker is in place; `draining`, the worker is to leave and gets no
    new connections; `disconnect`, its last connection has ended and so has the channel to the master; `error(error)`.
    The process ends when the handlers of `disconnect`, coroutines included, are done.  Messages and requests that come
    before anybody listens to them wait, until an application has started or a program had its time.
    """

    _peer = "the master"

    def __init__(self, id: int, slot: int, pid: int, *, pickled: bool = False) -> None:
        super().__init__(EVENTS, pickled=pickled, early=True)
        self.id = id
        self.slot = slot
        self.pid = pid
        self.state = "online"
        #: Whether the worker leaves because somebody asked for it; None as long as it does not leave.
        self.exited_after_disconnect: bool | None = None
        self._wire: Wire | None = None
        self._place: Home | None = None
        self._asked = False
        #: The signal that `destroy` has named; 0 for none.
        self.farewell = 0

    def __repr__(self) -> str:
        return f"<CurrentWorker {self.id} slot {self.slot} pid {self.pid} {self.state}>"

    # -- what it can do -------------------------------------------------------------------------------------------

    def is_connected(self) -> bool:
        """Whether it has a channel to the master: not any more in the handlers of `disconnect`, and after."""
        return self.state != "disconnected"

    def is_dead(self) -> bool:
        """False: whoever asks is alive.  It is here because the master's `Worker` has it."""
        return False

    def disconnect(self) -> CurrentWorker:
        """Ask the master to let this worker go: it gets no new connections, and ends when it has none.

        Returns at once, and nothing has happened by then.  Asking again changes nothing.
        """
        if not self._asked and self._wire is not None and self.state in ("online", "listening"):
            self._asked = True
            self._wire.ask_to_leave()
        return self

    def kill(self, signal: int | str = "SIGTERM") -> None:
        """Deliver a signal to this process.  What it does is what it does to any process."""
        os.kill(os.getpid(), number_of(signal))

    def destroy(self, signal: int | str = "SIGTERM") -> CurrentWorker:
        """`disconnect`, without waiting for connections, and then die of the signal, whatever handles it."""
        self.farewell = number_of(signal)
        if self._wire is not None and self.state == "disconnected":
            self._wire.die(self.farewell)
        return self.disconnect()

    def serve(self, sock: socket.socket) -> None:
        """Have this worker's server serve a connection, say one that came with a message.

        It takes the socket over, and treats it as one that it has accepted itself; what was read from it before is not
        there any more.  With several servers it is the one that listened first; `server.handle_connection` chooses.
        Raises `ClusterError` if nothing listens; the socket is still yours then.  Any thread may call this.
        """
        if self._wire is None:
            raise ClusterError("this worker has no server for a connection")
        self._wire.handle_connection(sock)

    def _post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        if self._wire is not None:
            self._wire.post(envelope, descriptors, done)
            return
        for fd in descriptors:
            os.close(fd)
        done(False)

    # -- for the worker's own machinery ---------------------------------------------------------------------------

    def join(self, wire: Wire, home: Home) -> None:
        """From now on it can ask the master, and handlers run at `home`."""
        self._wire = wire
        self._place = home
        # All that is asked of it is that it calls.
        self.settle(cast("asyncio.AbstractEventLoop", home))

    def tell(self, name: str, *arguments: Any, state: str | None = None) -> None:
        """Emit an event at home; `state` is what the worker is from then on.  From any thread."""
        assert self._place is not None, "it has not joined"
        self._place.run(self._advance, name, arguments, state)

    def _advance(self, name: str, arguments: tuple[Any, ...], state: str | None) -> None:
        if state is not None and self.state != "disconnected":
            self.state = state
        self.emit(name, *arguments)

    def leave(self, done: Callable[[], None]) -> None:
        """Tell of the end, behind everything else, and call `done` when all handlers are.  From any thread."""
        assert self._place is not None, "it has not joined"
        self._place.run(self._leave, done)

    def _leave(self, done: Callable[[], None]) -> None:
        self.channel_closed()
        self.state = "disconnected"
        before = set(self._tasks)
        self.emit("disconnect")
        tasks = self._tasks - before
        left = len(tasks)

        def ended(task: asyncio.Task[Any]) -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for task in tasks:
            task.add_done_callback(ended)
        if not tasks:
            done()


def number_of(signal: int | str) -> int:
    """The number of a signal, which is given by that or by its name.  Raises ValueError if there is none such."""
    if isinstance(signal, str):
        try:
            return signals.Signals[signal]
        except KeyError:
            raise ValueError(f"there is no signal {signal!r}") from None
    return signals.Signals(signal)
