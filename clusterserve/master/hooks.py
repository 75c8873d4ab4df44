"""`--hooks package.module`: a module whose functions called `on_…` listen to the cluster's events (docs/hooks.md)."""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

from ..checks import near_match
from ..core.events import EVENTS, Event, Messaged
from ..errors import SettingsError
from ..settings import Settings
from .events import EventThread, Listeners

logger = logging.getLogger("clusterserve")

PREFIX: Final = "on_"

_IN_THE_WORKER: Final = "; what must run in the worker belongs into the application's lifespan"
_MIDDLEWARE: Final = "an ASGI middleware is the place for it"

#: gunicorn's hooks under names that mean nothing here, and what to use instead.
GUNICORNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "on_starting": "the module's own code runs at that moment",
        "when_ready": "use on_ready()",
        "pre_fork": "use on_fork(worker), which comes right after",
        "post_fork": f"use on_fork(worker){_IN_THE_WORKER}",
        "post_worker_init": f"use on_listening(worker, address){_IN_THE_WORKER}",
        "worker_int": f"use on_draining(worker){_IN_THE_WORKER}",
        "worker_abort": "use on_kill(worker, reason)",
        "worker_exit": f"use on_exit(worker, code, signal){_IN_THE_WORKER}",
        "child_exit": "use on_exit(worker, code, signal)",
        "nworkers_changed": "use on_scale(workers, before)",
        "pre_request": _MIDDLEWARE,
        "post_request": _MIDDLEWARE,
        "pre_exec": "there is no such moment: the master does not replace itself",
        "ssl_context": "there is no TLS in this version",
    }
)


@contextlib.contextmanager
def told_of_events(settings: Settings) -> Iterator[Callable[[Event], None]]:
    """What an engine's events are given to, inside the block; at its end the hooks hear what they have not heard yet.

    Raises `SettingsError` if the hooks cannot be used.
    """
    if settings.hooks is None:
        yield lambda event: None
        return
    name = settings.hooks
    thread = EventThread(lambda: load_hooks(name))
    thread.start()

    def emit(event: Event) -> None:
        if not isinstance(event, Messaged):
            thread.emit(event)

    try:
        yield emit
    finally:
        thread.finish()


def load_hooks(name: str) -> Listeners:
    """The functions of the module `name`, by event; raises `SettingsError`, one line, if it cannot be used."""
    try:
        module = import_module(name)
    except (Exception, SystemExit) as exc:
        raise SettingsError(f"the hooks {name!r} cannot be imported: {_reason(exc)}") from exc
    found = {
        event: [_checked(name, function, event)]
        for event in EVENTS
        if (function := getattr(module, PREFIX + event, None)) is not None
    }
    for other, value in vars(module).items():
        if callable(value) and other not in GUNICORNS and other.startswith(PREFIX) and other[3:] not in EVENTS:
            near = near_match(other, [PREFIX + event for event in EVENTS])
            logger.warning("Hooks %s: %s is not called, there is no such event%s", name, other, near)
        elif callable(value) and other in GUNICORNS:
            logger.warning("Hooks %s: %s is gunicorn's and not called; %s", name, other, GUNICORNS[other])
    if not found:
        names = ", ".join(PREFIX + event for event in EVENTS)
        raise SettingsError(f"the hooks {name!r} have none of the functions {names}")
    return found


def _checked(name: str, function: object, event: str) -> Callable[..., Any]:
    wanted = EVENTS[event]
    if not callable(function):
        raise SettingsError(f"the hook {PREFIX}{event} of {name!r} is no function")
    try:
        inspect.signature(function).bind(*wanted)
    except TypeError:
        hint = "; gunicorn's on_exit(server) is on_stopped() here" if event == "exit" else ""
        raise SettingsError(f"the hook {PREFIX}{event} of {name!r} must take ({', '.join(wanted)}){hint}") from None
    except ValueError:
        # Some of those written in C do not tell.
        pass
    return function


def _reason(exc: BaseException) -> str:
    """What was raised, in one line, and where."""
    text = " ".join((str(exc) if isinstance(exc, ImportError) else f"{type(exc).__name__}: {exc}").split())
    frames = [each for each in traceback.extract_tb(exc.__traceback__) if "importlib" not in each.filename]
    # The first is ours.
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else text
