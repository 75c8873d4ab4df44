"""What a program of ours does to its own process: pid file, umask, title.  Undone at the end."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from ..core.events import BecameReady, Event, StartedReload, StartedShutdown
from ..errors import SettingsError
from ..settings import Settings
from ..titles import titler
from .pidfile import PidFile

logger = logging.getLogger("clusterserve")

_STATES = {BecameReady: "serving", StartedReload: "reloading", StartedShutdown: "stopping"}


@contextlib.contextmanager
def household(settings: Settings) -> Iterator[Callable[[Event], None]]:
    """Keep house inside the block; what it gives is to be told of events, on any thread.

    Raises `SettingsError` or `ClusterError` for what cannot be done.
    """
    if os.geteuid() != 0 and settings.uid not in (None, os.geteuid()):
        raise SettingsError(f"only root can let workers run as another user, and this is user {os.geteuid()}")
    with contextlib.ExitStack() as undo:
        if settings.umask is not None:
            undo.callback(os.umask, os.umask(settings.umask))
        if settings.pid is not None:
            file = PidFile(settings.pid)
            file.write()
            undo.callback(file.remove)
        title = titler()
        if title is None and settings.name is not None:
            logger.warning("--name changes nothing: the processes' titles need the package setproctitle")

        def entitle(state: str) -> None:
            if title is not None:
                title(f"clusterserve: master [{settings.title}] {state}")

        entitle("starting")
        yield lambda event: entitle(_STATES[type(event)]) if type(event) in _STATES else None
