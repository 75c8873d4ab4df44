"""Node.js's cluster for Python web servers: a master that accepts, balances and hands connections to uvicorn workers.

The public names, nothing else.  `Cluster` and `run` are imported when they are first used, so that a worker or a
command line that only prints its help does not pay for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .current import CurrentWorker, current_worker
from .errors import BindError, BootError, ClusterError, PolicyError, ProtocolError, SettingsError
from .listen_options import listen_options

if TYPE_CHECKING:
    from .master.cluster import Cluster, WorkerInfo
    from .master.run import run

__version__ = "0.1.0"

__all__ = [
    "BindError",
    "BootError",
    "Cluster",
    "ClusterError",
    "CurrentWorker",
    "PolicyError",
    "ProtocolError",
    "SettingsError",
    "WorkerInfo",
    "__version__",
    "current_worker",
    "listen_options",
    "run",
]

_LAZY = {"Cluster": "cluster", "WorkerInfo": "cluster", "run": "run"}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".master.{module}", __name__), name)
