"""Which worker this process is, and how it is told."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .currentworker import CurrentWorker

#: What makes a process a worker: the descriptors of its message channel, connection channel, board and kept epoll, and
#: the master's pid.  Removed at start-up, so that what the application starts is not taken for one.
VARIABLE: Final = "CLUSTERSERVE_WORKER"

#: What makes a process a template, from which workers are forked: the descriptor of its channel, and the master's pid.
TEMPLATE_VARIABLE: Final = "CLUSTERSERVE_TEMPLATE"

#: Which descriptors a worker is to put where before anything else, "4:70,5:71".
STDIO_VARIABLE: Final = "CLUSTERSERVE_STDIO"

#: The worker's slot, for the application and what it starts.
SLOT_VARIABLE: Final = "CLUSTERSERVE_WORKER_SLOT"

#: A terminal sends some of these to the whole process group, and people send the others to "all of it": the master acts
#: on them, and nobody else.
OF_THE_MASTER: Final = (
    signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU,
    signal.SIGPWR,
)  # fmt: skip

#: Those, and SIGTERM: who boots dies of some of them, and that may be an order to all of us.
TO_ALL: Final = (signal.SIGTERM, *OF_THE_MASTER)

_current: CurrentWorker | None = None


def current_worker() -> CurrentWorker | None:
    """This process's worker, or None in the master and everywhere else (Node: `cluster.worker`)."""
    return _current


def become(worker: CurrentWorker) -> None:
    """Called once, by a worker's start-up."""
    global _current
    _current = worker
    # What the program forks is no worker, and has none of the threads that make one.
    os.register_at_fork(after_in_child=_resign)


def _resign() -> None:
    global _current
    _current = None
