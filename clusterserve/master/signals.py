"""What each signal to the master means (docs/settings.md, "Signals"), and the exit code that follows from them."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Final

from ..core.reconcile import Stop
from ..errors import ClusterError
from ..log_files import reopen_handlers
from ..surroundings import Reading
from .engine import Engine
from .rereading import compare
from .terminal import Terminal
from .upgrade import Upgrade

logger = logging.getLogger("clusterserve")

#: Exit codes of a forced end (128 + the signal's number).
FORCED_INT: Final = 130
FORCED_QUIT: Final = 131

#: All of them.  SIGWINCH, which a terminal sends when it is resized, is heard and means nothing.
HEARD: Final = tuple(
    getattr(signal, name)
    for name in (
        "SIGTERM",
        "SIGINT",
        "SIGQUIT",
        "SIGHUP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGPWR",
        "SIGUSR1",
        "SIGUSR2",
        "SIGWINCH",
    )
)


class Signals:
    """Handlers on the engine's loop, from now on."""

    def __init__(
        self,
        engine: Engine,
        upgrade: Upgrade,
        loop: asyncio.AbstractEventLoop,
        reloaded: Callable[[asyncio.Future[None]], None] = lambda change: None,
        reread: Callable[[], Reading] | None = None,
        refused: Callable[[ClusterError], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._upgrade = upgrade
        self._reloaded = reloaded
        self._refused = refused
        self._reread = reread
        self._interrupted = False
        self.code = 0
        #: The signal that ended it.
        self.first = 0
        # nohup: who starts it so wants it to stay.
        stays = not engine.settings.reload or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._terminal = None if stays else Terminal()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGQUIT, self._quit, FORCED_QUIT)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGTTIN, engine.scale_by, 1)
        loop.add_signal_handler(signal.SIGTTOU, engine.scale_by, -1)
        loop.add_signal_handler(signal.SIGPWR, engine.show_stacks)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)
        loop.add_signal_handler(signal.SIGUSR2, upgrade.begin)
        loop.add_signal_handler(signal.SIGWINCH, lambda: None)

    def _terminate(self) -> None:
        self.first = self.first or signal.SIGTERM
        self._upgrade.abandon()
        self._engine.stop(Stop.GRACEFUL)

    def _interrupt(self) -> None:
        if self._interrupted:
            self._quit(FORCED_INT)
        self._interrupted = True
        self._upgrade.abandon()
        # Behind a SIGTERM it is somebody who does not want to wait for --shutdown-delay.
        self._engine.stop(Stop.GRACEFUL, at_once=bool(self.first))
        self.first = self.first or signal.SIGINT

    def _quit(self, code: int) -> None:
        self.first = self.first or signal.SIGQUIT
        self.code = self.code or code
        self._upgrade.abandon()
        self._engine.stop(Stop.QUICK)

    def _reopen_logs(self) -> None:
        # Of a --log-config; in a program that embeds us they are the program's.
        reopen_handlers()
        self._engine.reopen_logs()

    def _hang_up(self) -> None:
        if self._terminal is not None and self._terminal.gone:
            # The window of a server in development was closed.
            self._terminate()
            return
        # As gunicorn does, and as people have it in their logrotate files.
        self._reopen_logs()
        self.reload()

    def reload(self) -> None:
        """Read the configuration again, and replace the workers."""
        if self._reread is not None:
            try:
                read = self._reread()
                found = compare(self._engine.settings, read.settings)
                self._engine.adopt(found.settings, read.before)
            except ClusterError as error:
                # Its workers would be of a configuration that is none.
                logger.error("Reload refused, nothing was done: %s", error)
                self._refused(error)
                return
            if found.changed:
                logger.info("The configuration has changed: %s", ", ".join(found.changed))
            if found.fixed:
                logger.warning("Changed too, but only from the next start on: %s", ", ".join(found.fixed))
        self._engine.reload().add_done_callback(self._reloaded)
