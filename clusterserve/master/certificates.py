"""`Certificates`: the credentials of the cluster, as the files have them now or, on error, as they last fitted.

The files are looked at every second: that sees every way in which they are replaced, on every file system (renamed
files, swapped symbolic links as of certbot and Kubernetes, a network's).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Hashable
from typing import Final

from ..core.settled import Settled
from ..credentials import Credentials, files, read, terms
from ..errors import SettingsError
from ..settings import Settings

logger = logging.getLogger("clusterserve")

#: How often the files are looked at (seconds).
LOOK: Final = 1.0


class Certificates:
    """Of one cluster.  `tell(credentials)` is called when workers are to show others from now on."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: Settings, tell: Callable[[Credentials], None]
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._tell = tell
        self._settled = Settled(())
        self._timer: asyncio.TimerHandle | None = None
        #: None: no TLS.
        self.credentials: Credentials | None = None

    @property
    def terms(self) -> str:
        """On what clients are let in now; empty without TLS."""
        return "" if self.credentials is None else terms(self._settings, self.credentials)

    def start(self) -> None:
        """Read the files, and look at them from now on; raises `SettingsError` if they do not fit."""
        self.use(self._settings)

    def use(self, settings: Settings) -> None:
        """Take the files that these settings name from now on; raises `SettingsError`, and then nothing has changed."""
        if not settings.tls:
            return
        # Before they are read: what changes meanwhile is a change.
        seen = _look(settings)
        self._hold(settings, read(settings), seen)

    def go_back(self, settings: Settings, credentials: Credentials | None) -> None:
        """What was before `use` holds again; what the same files have said since is no mistake of these settings."""
        if files(settings) != files(self._settings):
            self._hold(settings, credentials, _look(settings))

    def _hold(self, settings: Settings, credentials: Credentials | None, seen: Hashable) -> None:
        self._settings, self.credentials = settings, credentials
        self._settled.heed(seen)
        self.close()
        if settings.tls and settings.ssl_reload:
            self._timer = self._loop.call_later(LOOK, self._on_time)

    def reread(self) -> None:
        """Look now, as at a reload: what has changed holds from now on, and if it does not fit, what there was."""
        if self._settings.tls:
            seen = _look(self._settings)
            self._settled.heed(seen)
            self._renew(seen)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        self._timer = self._loop.call_later(LOOK, self._on_time)
        seen = _look(self._settings)
        if self._settled.look(seen):
            self._renew(seen)

    def _renew(self, seen: Hashable) -> None:
        try:
            credentials = read(self._settings)
        except SettingsError as error:
            if _look(self._settings) == seen:
                logger.error("The certificate has changed, and the old one stays: %s", error)
            return
        if credentials != self.credentials:
            self.credentials = credentials
            logger.info("The certificate has changed: new connections get that of %s", self._settings.ssl_certfile)
            self._tell(credentials)


def _look(settings: Settings) -> Hashable:
    """What changes when a file does."""
    return tuple(_state(path) for path in files(settings).values())


def _state(path: str) -> Hashable:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
