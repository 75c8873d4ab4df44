"""`Worker`: a worker as the program that has the cluster sees it (Node: `cluster.workers[id]`)."""

from __future__ import annotations

import logging
import os
import signal as signals
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Final, Protocol

from ..core.envelope import Envelope
from ..core.events import (
    CameOnline,
    Disconnected,
    Event,
    Exited,
    StartedDraining,
    StartedListening,
)
from ..core.lifecycle import WorkerState
from ..emitter import Handler
from ..errors import ClusterError, ProtocolError
from ..messenger import Messenger
from .streams import Streams

logger = logging.getLogger("clusterserve")

#: What a worker tells its listeners; the cluster tells the same, with the worker first.
WORKER_EVENTS: Final = ("online", "listening", "message", "draining", "disconnect", "exit", "error")


@dataclass
class Process:
    """A worker's process.  `returncode` is None while it lives, and if a signal ended it, whose number is `signal`.

    With `silent` or a `stdio` of "pipe" entries, `stdin`, `stdout` and `stderr` are binary files as those of
    `subprocess.Popen`, and `stdio[4]` is a socket whose other end is descriptor 4 of the worker; None where there is
    nothing.  They are yours to read, to close, and to bring to an event loop: a worker whose output nobody reads stops
    when the pipe is full.  What you never asked for is closed with the last reference to the worker.
    """

    pid: int
    returncode: int | None = None
    signal: int | None = None
    streams: Streams | None = field(default=None, repr=False, compare=False)

    @property
    def stdin(self) -> IO[bytes] | None:
        return None if self.streams is None else self.streams.file(0)

    @property
    def stdout(self) -> IO[bytes] | None:
        return None if self.streams is None else self.streams.file(1)

    @property
    def stderr(self) -> IO[bytes] | None:
        return None if self.streams is None else self.streams.file(2)

    @property
    def stdio(self) -> tuple[Any, ...]:
        return () if self.streams is None else self.streams.stdio()


class Orders(Protocol):
    """What a `Worker` needs of its cluster.  None of these waits, and none minds a worker that is gone."""

    def disconnect_worker(self, worker: int) -> None: ...
    def destroy_worker(self, worker: int, number: int) -> None: ...
    def signal_worker(self, worker: int, number: int) -> None: ...
    def streams_of(self, worker: int) -> Streams | None: ...
    def misbehaved(self, worker: int, error: ProtocolError) -> None: ...
    def post_to(
        self, worker: int, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]
    ) -> None: ...
    def emit(self, name: str, *arguments: Any) -> bool: ...
    @property
    def request_handler(self) -> Handler | None: ...


class Worker(Messenger):
    """One worker process.  Made by `Cluster.fork`, and for every other worker when it is forked.

    `id` is never used again, `slot` is inherited by a replacement.  `state` is none, online, listening, draining,
    disconnected or dead: as of the event whose handlers run.  `process` is None if it could not be started.
    `exited_after_disconnect` is True if it was told to leave, or asked to, before it was gone; False if not; None as
    long as neither is clear.
    """

    def __init__(
        self,
        id: int = 0,
        *,
        slot: int = 0,
        state: str = WorkerState.NONE.value,
        process: Process | None = None,
        orders: Orders | None = None,
        pickled: bool = False,
    ) -> None:
        super().__init__(WORKER_EVENTS, pickled=pickled)
        self._peer = f"worker {id}"
        self.id = id
        self.slot = slot
        self.state = state
        self.process = process
        self.exited_after_disconnect: bool | None = None
        self._orders = orders
        self._killed = False

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return None if self.process is None else self.process.pid

    def disconnect(self) -> Worker:
        """Have it finish what it holds and end, with code 0 unless it says otherwise.  Again does nothing.

        It stays among the cluster's workers until it is dead; after `timeout_graceful_shutdown` it is killed.
        """
        self._killed = False
        if self._orders is not None and not self.is_dead():
            self._orders.disconnect_worker(self.id)
        return self

    def kill(self, signal: str | int = "SIGTERM") -> None:
        """Deliver a signal to its process, and nothing else: `exited_after_disconnect` will be False.

        A worker that serves an application takes SIGTERM for an order to finish and leave; one that does not act upon
        it within `timeout_graceful_shutdown` is killed.
        """
        number = signal_number(signal)
        if self._orders is not None and not self.is_dead():
            self._killed = True
            self._orders.signal_worker(self.id, number)

    def destroy(self, signal: str | int = "SIGTERM") -> Worker:
        """`disconnect`, and if it does not end by itself after that, the signal as well."""
        number = signal_number(signal)
        self._killed = False
        if self._orders is not None and not self.is_dead():
            self._orders.destroy_worker(self.id, number)
        return self

    def is_connected(self) -> bool:
        """Whether it can be told anything."""
        return self.id > 0 and self.state not in (WorkerState.DISCONNECTED.value, WorkerState.DEAD.value)

    def is_dead(self) -> bool:
        """Whether its process has ended, or never began."""
        return self.state == WorkerState.DEAD.value

    # -- messages -------------------------------------------------------------------------------------------------

    def _post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        if self._orders is not None:
            self._orders.post_to(self.id, envelope, descriptors, done)
            return
        for fd in descriptors:
            os.close(fd)
        done(False)

    def _tell(self, content: Any, sockets: list[Any]) -> bool:
        heard = self.emit("message", content, sockets)
        return (self._orders is not None and self._orders.emit("message", self, content, sockets)) or heard

    def _went_wrong(self, error: ClusterError) -> None:
        heard = self.emit("error", error)
        if not (self._orders is not None and self._orders.emit("error", self, error)) and not heard:
            logger.error("Worker %d: %s", self.id, error)

    def _misbehaved(self, error: ProtocolError) -> None:
        if self._orders is not None:
            self._orders.misbehaved(self.id, error)

    def _answerer(self) -> tuple[Handler, tuple[Any, ...]] | None:
        own = super()._answerer()
        if own is None and self._orders is not None and self._orders.request_handler is not None:
            return self._orders.request_handler, (self,)
        return own

    # -- for the cluster ------------------------------------------------------------------------------------------

    def advance(self, event: Event) -> None:
        """For the cluster: `event`, which is about this worker, is told next."""
        if isinstance(event, StartedDraining):
            self.state = WorkerState.DRAINING.value
            if not self._killed:
                self.exited_after_disconnect = True
        elif isinstance(event, CameOnline | StartedListening):
            # One that was told to go while it booted stays on its way out.
            if self.state != WorkerState.DRAINING.value:
                state = WorkerState.ONLINE if isinstance(event, CameOnline) else WorkerState.LISTENING
                self.state = state.value
        elif isinstance(event, Disconnected):
            self.state = WorkerState.DISCONNECTED.value
            self.exited_after_disconnect = bool(self.exited_after_disconnect)
        elif isinstance(event, Exited):
            self.state = WorkerState.DEAD.value
            self.exited_after_disconnect = bool(self.exited_after_disconnect)
            if self.process is not None:
                self.process.returncode, self.process.signal = event.code, event.signal

    def __repr__(self) -> str:
        return f"<Worker {self.id} slot {self.slot} pid {self.pid} {self.state}>"


def signal_number(signal: str | int) -> int:
    """Of "SIGTERM", "TERM" or 15.  Raises ValueError for what is no signal."""
    if isinstance(signal, str):
        name = signal if signal.startswith("SIG") else f"SIG{signal}"
        if name not in signals.Signals.__members__:
            raise ValueError(f"there is no signal {signal!r}")
        return int(signals.Signals[name])
    if signal not in signals.valid_signals():
        raise ValueError(f"there is no signal {signal!r}")
    return int(signal)
