"""Which worker this process is, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: What makes a process a worker: the descriptors of its message channel, connection channel, board and kept epoll, and
#: the master's pid.  Removed at start-up, so that what the application starts is not taken for one.
VARIABLE: Final = "CLUSTERSERVE_WORKER"

#: Which descriptors a worker is to put where before anything else, "4:70,5:71".
STDIO_VARIABLE: Final = "CLUSTERSERVE_STDIO"

#: The worker's slot, for the application and what it starts.
SLOT_VARIABLE: Final = "CLUSTERSERVE_WORKER_SLOT"


@dataclass(frozen=True)
class CurrentWorker:
    """This process as a worker: `id` (1, 2, 3 …, never reused), `slot` (0 … N-1, inherited by replacements), `pid`."""

    id: int
    slot: int
    pid: int


_current: CurrentWorker | None = None


def current_worker() -> CurrentWorker | None:
    """This process's worker, or None in the master and everywhere else (Node: `cluster.worker`)."""
    return _current


def become(worker: CurrentWorker) -> None:
    """Called once, by a worker's start-up."""
    global _current
    _current = worker
