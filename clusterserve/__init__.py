"""Node.js's cluster for Python web servers: a master that accepts, balances and hands connections to uvicorn workers.

The public names, nothing else.  `Cluster` and `run` are imported when they are first used, so that a worker or a
command line that only prints its help does not pay for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.address import Address
from .current import current_worker
from .errors import BindError, BootError, ChannelClosed, ClusterError, PolicyError, ProtocolError, SettingsError
from .listen_options import listen_options

if TYPE_CHECKING:
    from .currentworker import CurrentWorker
    from .master.cluster import Cluster
    from .master.run import run
    from .master.worker import Worker

    is_master: bool
    is_worker: bool

__version__ = "0.1.0"

__all__ = [
    "SCHED_HASH",
    "SCHED_LEAST",
    "SCHED_NONE",
    "SCHED_RR",
    "Address",
    "BindError",
    "BootError",
    "ChannelClosed",
    "Cluster",
    "ClusterError",
    "CurrentWorker",
    "PolicyError",
    "ProtocolError",
    "SettingsError",
    "Worker",
    "__version__",
    "current_worker",
    "is_master",
    "is_worker",
    "listen_options",
    "run",
]

_LAZY = {
    "Cluster": "master.cluster", "Worker": "master.worker", "run": "master.run", "CurrentWorker": "currentworker",
}  # fmt: skip

SCHED_RR = "rr"
SCHED_LEAST = "least"
SCHED_HASH = "hash"
SCHED_NONE = "none"


def __getattr__(name: str) -> Any:
    if name in ("is_master", "is_worker"):
        # Only its start-up makes a process a worker, and that may be after this import.
        return (current_worker() is not None) == (name == "is_worker")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{module}", __name__), name)
