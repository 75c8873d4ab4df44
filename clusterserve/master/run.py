"""`clusterserve APP`: a cluster as a program of its own, that listens to signals and answers with an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import uvloop

from ..core.envelope import Kind, declined
from ..core.events import Event, Messaged
from ..core.reconcile import Stop
from ..errors import ClusterError
from ..log_files import LogFiles, reopen_handlers
from ..logs import configure
from ..settings import Settings
from .engine import Engine
from .hooks import told_of_events
from .household import household
from .notify import Notifier, notifier
from .orphans import Orphans
from .rereading import compare

logger = logging.getLogger("clusterserve")

#: Exit codes of a forced end (128 + the signal's number).
FORCED_INT: Final = 130
FORCED_QUIT: Final = 131

#: Understood, but not yet acted upon.  None of them may end the master while workers live.
_LATER: Final = ("SIGUSR2", "SIGWINCH")

_HEARD: Final = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGTTIN", "SIGTTOU", "SIGPWR", "SIGUSR1", *_LATER)
)


def run(app: str, **settings: Any) -> int:
    """Serve `app` until a signal ends it; returns the exit code.  For the main thread: it handles signals.

    The program's own signal handlers are in place again when it returns.  Raises `SettingsError`, `BindError` or
    `BootError` if it never came to serve.
    """
    return run_settings(Settings.create(app=app, **settings))


def run_settings(settings: Settings, *, exits: bool = False, reread: Callable[[], Settings] | None = None) -> int:
    """`run`, with settings that have been checked, and `reread` (raises `ClusterError`) to have them again at a reload.

    `exits`: the process ends next, and until then every signal is ignored.  Who says SIGTERM twice would kill it with
    the second on its way out, and read of a failure.
    """
    files = LogFiles.of(settings)
    files.open()
    # Never closed: the logger has them as long as the process lives, as it would have a `FileHandler`.
    configure(settings, files.places)
    try:
        return _run(settings, files, exits, reread)
    except ClusterError as error:
        if settings.log_format == "json" or settings.error_logfile != "-":
            # For people, whoever called us says it on stderr; a file, and a machine, hear it from us.
            text = getattr(error, "traceback", "")
            logger.critical("%s", error.args[0] if text else error, extra={"exception": text} if text else None)
            error.told = settings.error_logfile == "-"
        raise


def _run(settings: Settings, files: LogFiles, exits: bool, reread: Callable[[], Settings] | None) -> int:
    if settings.app_dir is not None:
        # For a policy of the application's own, and its hooks; a program that embeds us has its path in order.
        sys.path.insert(0, os.path.abspath(settings.app_dir))
    loop = uvloop.new_event_loop()
    with _handlers_put_back(ignore=exits):
        try:
            # Its end may take a moment: the loop still has the signals then, and makes nothing of them.
            with household(settings) as keep, notifier(settings, loop) as teller, told_of_events(settings) as hooks:

                def emit(event: Event) -> None:
                    keep(event)
                    teller.on_event(event)
                    hooks(event)

                return loop.run_until_complete(_serve(settings, loop, emit, teller, reread, files))
        finally:
            # The loop leaves the default behind for every signal it has handled, which for most of them is death.
            signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
            loop.close()


@contextlib.contextmanager
def _handlers_put_back(*, ignore: bool) -> Iterator[None]:
    """Signals that come while the handlers change are held back, and are for those that are there afterwards."""
    before = {number: signal.SIG_IGN if ignore else signal.getsignal(number) for number in _HEARD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: it was not set by Python, which cannot set it again.
            if handler is not None:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


async def _serve(
    settings: Settings,
    loop: asyncio.AbstractEventLoop,
    emit: Callable[[Event], None],
    teller: Notifier,
    reread: Callable[[], Settings] | None,
    files: LogFiles,
) -> int:
    def told(event: Event) -> None:
        if not isinstance(event, Messaged):
            emit(event)
        elif event.envelope.kind is Kind.REQUEST:
            # Nobody is here who could; whoever asks must not wait for ever.
            engine.outbox.post(event.worker.id, declined(event.envelope), [], lambda sent: None)

    engine = Engine(settings, loop, told, files)
    signals = _Signals(engine, loop, teller.on_reloaded, reread, teller.on_refused)
    with _watching(settings, loop, signals):
        engine.start()
        teller.watch(loop, engine.healthy)
        orphans = Orphans(loop, engine.pids)
        if os.getpid() == 1 or settings.templated:
            # Under a template too, because for moments orphans come to us (subreaper.py).
            orphans.start()
        error = await engine.finished
        orphans.close()
    if error is not None:
        raise error
    logger.info("Stopped, master process %d", os.getpid())
    if not engine.served:
        # Nobody is to take this for a success; and it is what a signal makes of a program that does not handle it, as
        # this one does not in its first moments.
        return signals.code or 128 + signals.first
    return signals.code


def _watching(
    settings: Settings, loop: asyncio.AbstractEventLoop, signals: _Signals
) -> contextlib.AbstractContextManager[None]:
    if not settings.reload:
        return contextlib.nullcontext()
    # watchfiles is an extra, and takes its time to import.
    from .watcher import described, watching

    def changed(paths: list[str]) -> None:
        if not signals.first:
            logger.info("Changed: %s", described(paths))
            signals.reload()

    return watching(settings, loop, changed)


class _Signals:
    """What each signal means (docs/settings.md, "Signals"), and the exit code that follows from them."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        reloaded: Callable[[asyncio.Future[None]], None] = lambda change: None,
        reread: Callable[[], Settings] | None = None,
        refused: Callable[[ClusterError], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._reloaded = reloaded
        self._refused = refused
        self._reread = reread
        self._interrupted = False
        self.code = 0
        #: The signal that ended it.
        self.first = 0
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        loop.add_signal_handler(signal.SIGQUIT, self._quit, FORCED_QUIT)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGTTIN, engine.scale_by, 1)
        loop.add_signal_handler(signal.SIGTTOU, engine.scale_by, -1)
        loop.add_signal_handler(signal.SIGPWR, engine.show_stacks)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_logs)
        for name in _LATER:
            loop.add_signal_handler(getattr(signal, name), self._later, name)

    def _terminate(self) -> None:
        self.first = self.first or signal.SIGTERM
        self._engine.stop(Stop.GRACEFUL)

    def _interrupt(self) -> None:
        if self._interrupted:
            self._quit(FORCED_INT)
        self._interrupted = True
        # Behind a SIGTERM it is somebody who does not want to wait for --shutdown-delay.
        self._engine.stop(Stop.GRACEFUL, at_once=bool(self.first))
        self.first = self.first or signal.SIGINT

    def _quit(self, code: int) -> None:
        self.first = self.first or signal.SIGQUIT
        self.code = self.code or code
        self._engine.stop(Stop.QUICK)

    def _reopen_logs(self) -> None:
        # Of a --log-config; in a program that embeds us they are the program's.
        reopen_handlers()
        self._engine.reopen_logs()

    def _hang_up(self) -> None:
        # As gunicorn does, and as people have it in their logrotate files.
        self._reopen_logs()
        self.reload()

    def reload(self) -> None:
        """Read the configuration again, and replace the workers."""
        if self._reread is not None:
            try:
                found = compare(self._engine.settings, self._reread())
            except ClusterError as error:
                # Its workers would be of a configuration that is none.
                logger.error("Reload refused, nothing was done: %s", error)
                self._refused(error)
                return
            if found.changed:
                logger.info("The configuration has changed: %s", ", ".join(found.changed))
                self._engine.adopt(found.settings)
            if found.fixed:
                logger.warning("Changed too, but only from the next start on: %s", ", ".join(found.fixed))
        self._engine.reload().add_done_callback(self._reloaded)

    def _later(self, name: str) -> None:
        if name != "SIGWINCH":
            logger.warning("%s means nothing yet in this version; nothing was done", name)
