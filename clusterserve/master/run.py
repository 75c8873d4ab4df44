"""`clusterserve APP`: a cluster as a program of its own, that listens to signals and answers with an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvloop

from ..core.envelope import Kind, declined
from ..core.events import Event, Messaged
from ..errors import ClusterError
from ..launch import make_places
from ..log_files import LogFiles
from ..logs import configure
from ..settings import Settings
from ..succession import Claim, claim
from ..surroundings import Reading
from .engine import Engine
from .first_signals import Ended, FirstSignals
from .heritage import Heritage
from .hooks import told_of_events
from .household import House, household
from .notify import Notifier, notifier
from .orphans import Orphans
from .parent import Parent
from .signals import HEARD, Signals
from .succession import Succession
from .upgrade import Upgrade

logger = logging.getLogger("clusterserve")


def run(app: str, **settings: Any) -> int:
    """Serve `app` until a signal ends it; returns the exit code.  For the main thread: it handles signals.

    The program's own signal handlers are in place again when it returns.  Raises `SettingsError`, `BindError` or
    `BootError` if it never came to serve.
    """
    created = Settings.create(app=app, **settings)
    make_places(created)
    return run_settings(created)


def run_settings(settings: Settings, *, exits: bool = False, reread: Callable[[], Reading] | None = None) -> int:
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
    except Ended as end:
        return end.code
    except ClusterError as error:
        if settings.log_format == "json" or settings.error_logfile != "-":
            # For people, whoever called us says it on stderr; a file, and a machine, hear it from us.
            text = getattr(error, "traceback", "")
            logger.critical("%s", error.args[0] if text else error, extra={"exception": text} if text else None)
            error.told = settings.error_logfile == "-"
        raise


def _run(settings: Settings, files: LogFiles, exits: bool, reread: Callable[[], Reading] | None) -> int:
    claimed = claim()
    inheritance = None if claimed is None else (claimed, Heritage.receive(claimed))
    if settings.app_dir is not None:
        # For a policy of the application's own, and its hooks; a program that embeds us has its path in order.
        sys.path.insert(0, os.path.abspath(settings.app_dir))
    loop = uvloop.new_event_loop()
    with _handlers_put_back(ignore=exits):
        first_signals = FirstSignals(own=exits)
        try:
            # Its end may take a moment: the loop still has the signals then, and makes nothing of them.
            with (
                household(settings, None if inheritance is None else inheritance[1]) as house,
                notifier(settings, loop, silent=inheritance is not None) as teller,
                told_of_events(settings) as hooks,
            ):

                def emit(event: Event) -> None:
                    house(event)
                    teller.on_event(event)
                    hooks(event)

                if exits:
                    # A process of our own: what lives as long as it does (12 ms to look at) is not looked at again
                    # whenever the garbage collector does, while requests wait.
                    gc.freeze()
                return loop.run_until_complete(
                    _serve(settings, loop, emit, teller, house, reread, files, inheritance, first_signals)
                )
        finally:
            # The loop leaves the default behind for every signal it has handled, which for most of them is death.
            signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
            loop.close()


@contextlib.contextmanager
def _handlers_put_back(*, ignore: bool) -> Iterator[None]:
    """Signals that come while the handlers change are held back, and are for those that are there afterwards."""
    before = {number: signal.SIG_IGN if ignore else signal.getsignal(number) for number in HEARD}
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
    house: House,
    reread: Callable[[], Reading] | None,
    files: LogFiles,
    inheritance: tuple[Claim, Heritage] | None,
    first_signals: FirstSignals,
) -> int:
    def told(event: Event) -> None:
        if not isinstance(event, Messaged):
            emit(event)
        elif event.envelope.kind is Kind.REQUEST:
            # Nobody is here who could; whoever asks must not wait for ever.
            engine.outbox.post(event.worker.id, declined(event.envelope), [], lambda sent: None)

    def take_over() -> None:
        house.take_over()
        teller.take_over(settings)

    with contextlib.ExitStack() as undo:
        engine = Engine(settings, loop, told, None if inheritance is None else inheritance[1], files)
        succession = None
        if inheritance is not None:
            succession = Succession(loop, *inheritance, engine, take_over)
            undo.callback(succession.close)
        upgrade = Upgrade(loop, engine, teller, house.pid_file, succession)
        parent = Parent(loop, upgrade) if os.getpid() == 1 else None
        if parent is not None:
            upgrade.on_yield = lambda: parent.forward(HEARD)
        signals = Signals(engine, upgrade, loop, teller.on_reloaded, reread, teller.on_refused)
        first_signals.pass_on()
        undo.enter_context(_watching(settings, loop, engine, signals))
        engine.start()
        if succession is not None:
            succession.start()
        teller.watch(loop, engine.healthy)
        orphans = Orphans(loop, lambda: [*engine.pids(), *upgrade.pids(), *([] if parent is None else parent.pids())])
        if parent is not None or settings.templated:
            # Under a template too, because for moments orphans come to us (subreaper.py).
            undo.callback(orphans.close)
            orphans.start()
        error = await engine.finished
        await upgrade.over()
        if upgrade.yielded:
            logger.info("Process %d has left everything to process %d", os.getpid(), upgrade.pid)
            if parent is None:
                return upgrade.exit_code
            house.entitle("replaced, passing signals on")
            return await parent.wait()
        failure = error or (None if succession is None else succession.failure)
        if failure is not None:
            raise failure
        if succession is not None and not signals.code:
            await succession.left_alone()
        logger.info("Stopped, master process %d", os.getpid())
        if not engine.served:
            # Nobody is to take this for a success; and it is what a signal makes of a program that does not handle it,
            # as this one does not in its first moments.
            return signals.code or 128 + signals.first
        return signals.code


def _watching(
    settings: Settings, loop: asyncio.AbstractEventLoop, engine: Engine, signals: Signals
) -> contextlib.AbstractContextManager[None]:
    if not settings.reload:
        return contextlib.nullcontext()
    # watchfiles is an extra, and takes its time to import.
    from .watcher import described, watching

    def changed(paths: list[str]) -> None:
        # Who leaves has none to replace, the old master of an upgrade neither; the new one watches as well.
        if not signals.first and not engine.stopping:
            logger.info("Changed: %s", described(paths))
            signals.reload()

    return watching(settings, loop, changed)
