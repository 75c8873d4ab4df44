"""What happens in a cluster, as facts: one frozen dataclass per event, its fields the arguments of who listens.

Each has the name by which it is listened to: `on_exit(worker, code, signal)` in a hooks module hears `Exited`.  The
engine tells of them in the order in which they happened; of one worker always fork, online, listening, draining,
disconnect, exit, as far as it comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final

from .address import Address
from .envelope import Envelope, Riders


@dataclass(frozen=True)
class WorkerName:
    """Which worker an event is about: `id` (1, 2, 3 …, never reused), `slot` (0 … N-1), `pid`."""

    id: int
    slot: int
    pid: int


@dataclass(frozen=True)
class Forked:
    """A worker process was started."""

    name: ClassVar = "fork"
    worker: WorkerName


@dataclass(frozen=True)
class CameOnline:
    """A worker is up, and imports the application next."""

    name: ClassVar = "online"
    worker: WorkerName


@dataclass(frozen=True)
class StartedListening:
    """A worker serves `address`, as text "http://127.0.0.1:8000" or "unix:PATH"; told once for each address."""

    name: ClassVar = "listening"
    worker: WorkerName
    address: Address


@dataclass(frozen=True)
class StartedDraining:
    """A worker was told to finish what it holds and to leave."""

    name: ClassVar = "draining"
    worker: WorkerName


@dataclass(frozen=True)
class WasKilled:
    """A worker was sent SIGKILL by the master; `reason` completes "worker N is killed: …"."""

    name: ClassVar = "kill"
    worker: WorkerName
    reason: str


@dataclass(frozen=True)
class Disconnected:
    """A worker's channel is closed: it can be told nothing any more."""

    name: ClassVar = "disconnect"
    worker: WorkerName


@dataclass(frozen=True)
class Messaged:
    """A message of a worker's program has come: only the program that has the cluster hears of it, no hooks do."""

    name: ClassVar = "message"
    worker: WorkerName
    envelope: Envelope
    riders: Riders


@dataclass(frozen=True)
class Exited:
    """A worker process has ended, by `code` or by `signal`; both are None if somebody else has waited for it."""

    name: ClassVar = "exit"
    worker: WorkerName
    code: int | None
    signal: int | None


@dataclass(frozen=True)
class WentWrong:
    """A worker process could not be started, for which its `exit` event follows: nobody else is harmed."""

    name: ClassVar = "error"
    worker: WorkerName
    #: An OSError, unless it is something that nobody has thought of.
    error: Exception


@dataclass(frozen=True)
class BecameReady:
    """Every worker listens, for the first time."""

    name: ClassVar = "ready"


@dataclass(frozen=True)
class StartedReload:
    """A reload was ordered; forks and exits follow."""

    name: ClassVar = "reload"


@dataclass(frozen=True)
class Scaled:
    """From now on `workers` are wanted, and no longer `before`."""

    name: ClassVar = "scale"
    workers: int
    before: int


@dataclass(frozen=True)
class StartedShutdown:
    """The cluster was told to stop."""

    name: ClassVar = "shutdown"


@dataclass(frozen=True)
class Stopped:
    """Everything is over, and no worker is left."""

    name: ClassVar = "stopped"


AboutWorker = (
    Forked | CameOnline | StartedListening | StartedDraining | WasKilled | Messaged | Disconnected | Exited | WentWrong
)

Event = AboutWorker | BecameReady | StartedReload | Scaled | StartedShutdown | Stopped

_KINDS: Final[tuple[type[Event], ...]] = (
    Forked, CameOnline, StartedListening, StartedDraining, WasKilled, Disconnected, Exited, WentWrong, BecameReady,
    StartedReload,    Scaled, StartedShutdown, Stopped,
)  # fmt: skip

#: The names of all events, and the arguments that come with each.
EVENTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {kind.name: tuple(field.name for field in dataclasses.fields(kind)) for kind in _KINDS}
)


def arguments(event: Event) -> tuple[Any, ...]:
    """What a listener of `event` is called with."""
    return tuple(getattr(event, name) for name in EVENTS[event.name])
