"""`Worker`: a worker as the program that has the cluster sees it (Node: `cluster.workers[id]`)."""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass
from typing import Final, Protocol

from ..core.events import (
    CameOnline,
    Disconnected,
    Event,
    Exited,
    StartedDraining,
    StartedListening,
)
from ..core.lifecycle import WorkerState
from ..emitter import Emitter

#: What a worker tells its listeners; the cluster tells the same, with the worker first.
WORKER_EVENTS: Final = ("online", "listening", "message", "draining", "disconnect", "exit", "error")


@dataclass
class Process:
    """A worker's process.  `returncode` is None while it lives, and if a signal ended it, whose number is `signal`."""

    pid: int
    returncode: int | None = None
    signal: int | None = None


class Orders(Protocol):
    """What a `Worker` needs of its cluster.  None of these waits, and none minds a worker that is gone."""

    def disconnect_worker(self, worker: int) -> None: ...
    def destroy_worker(self, worker: int, number: int) -> None: ...
    def signal_worker(self, worker: int, number: int) -> None: ...


class Worker(Emitter):
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
    ) -> None:
        super().__init__(WORKER_EVENTS)
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
