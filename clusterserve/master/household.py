"""What a program of ours does to its own process: pid file, umask, title.  Undone at the end."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from ..core.events import BecameReady, Event, StartedReload, StartedShutdown
from ..errors import ClusterError, SettingsError
from ..settings import Settings
from ..titles import titler
from .heritage import Heritage
from .pidfile import PidFile

logger = logging.getLogger("clusterserve")

_STATES = {BecameReady: "serving", StartedReload: "reloading", StartedShutdown: "stopping"}


class House:
    """What there is to say while it lasts; `entitle(state)` renews the title."""

    def __init__(self, entitle: Callable[[str], None], file: PidFile | None) -> None:
        self.entitle = entitle
        self._file = file

    def __call__(self, event: Event) -> None:
        """To be told of events, on any thread."""
        if type(event) in _STATES:
            self.entitle(_STATES[type(event)])

    @property
    def pid_file(self) -> str:
        """The absolute path of the pid file; empty if there is none."""
        return "" if self._file is None else self._file.path

    def take_over(self) -> None:
        """The old master has yielded: its pid file is ours."""
        if self._file is not None:
            try:
                self._file.take_over()
            except ClusterError as error:
                logger.error("%s", error)


@contextlib.contextmanager
def household(settings: Settings, heritage: Heritage | None = None) -> Iterator[House]:
    """Keep house inside the block.  If the old master of `heritage` has the same pid file, it has it until `take_over`.

    Raises `SettingsError` or `ClusterError` for what cannot be done.
    """
    if os.geteuid() != 0 and settings.uid not in (None, os.geteuid()):
        raise SettingsError(f"only root can let workers run as another user, and this is user {os.geteuid()}")
    with contextlib.ExitStack() as undo:
        if settings.umask is not None:
            undo.callback(os.umask, os.umask(settings.umask))
        file = None
        if settings.pid is not None:
            file = PidFile(settings.pid)
            undo.callback(file.remove)
            if heritage is not None and heritage.pid_file == file.path:
                file.prepare()
            else:
                file.write()
        title = titler()
        if title is None and settings.name is not None:
            logger.warning("--name changes nothing: the processes' titles need the package setproctitle")

        def entitle(state: str) -> None:
            if title is not None:
                title(f"clusterserve: master [{settings.title}] {state}")

        entitle("starting")
        yield House(entitle, file)
