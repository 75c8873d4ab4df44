"""`Emitter`: handlers by the name of an event, as Node's EventEmitter has them, for `Cluster` and both kinds of worker.

Handlers run on one event loop, the *home*, which its owner names with `settle`.  A handler that raises is logged with
its traceback and harms nobody; a coroutine function is started as a task, so that it may wait for later events.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from .pending import Pending

logger = logging.getLogger("clusterserve")

Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)


class Emitter:
    """Registering is for any thread; `emit` for the home loop alone.

    A handler is called with as many of the event's arguments as it takes: `on("exit")` may be `lambda worker: …`.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._handlers: Mapping[str, tuple[tuple[Handler, int | None, bool], ...]] = {}
        self._waiting: list[tuple[str, Pending[Any]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._home: asyncio.AbstractEventLoop | None = None

    def settle(self, home: asyncio.AbstractEventLoop) -> None:
        """Handlers run on this loop from now on."""
        self._home = home

    # -- registering ----------------------------------------------------------------------------------------------

    def on(self, name: str, handler: H | None = None) -> Any:
        """Call `handler` at every event of this name; without one, a decorator.  Raises ValueError for no event."""
        return self._register(name, handler, once=False)

    def once(self, name: str, handler: H | None = None) -> Any:
        """Call `handler` at the next event of this name only; without a handler, a decorator."""
        return self._register(name, handler, once=True)

    def off(self, name: str, handler: Handler) -> None:
        """Call it no more; nothing happens if it was not registered."""
        kept = tuple(entry for entry in self._handlers.get(name, ()) if entry[0] is not handler)
        self._handlers = {**self._handlers, name: kept}

    def listens(self, name: str) -> bool:
        """Whether anybody would hear of this event."""
        return bool(self._handlers.get(name)) or any(each == name for each, _ in self._waiting)

    def wait_for(self, name: str, timeout: float | None = None) -> Pending[Any]:
        """The next event of this name: its argument, or a tuple if it has several.  Fails with TimeoutError."""
        self._check(name)
        pending: Pending[Any] = Pending()
        entry = (name, pending)
        self._waiting.append(entry)
        if timeout is not None and self._home is not None:
            self._home.call_soon_threadsafe(self._home.call_later, timeout, self._give_up, entry, timeout)
        return pending

    def _give_up(self, entry: tuple[str, Pending[Any]], timeout: float) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
            entry[1].set_exception(TimeoutError(f"no {entry[0]!r} within {timeout:g} s"))

    def _register(self, name: str, handler: H | None, *, once: bool) -> Any:
        self._check(name)
        if handler is None:
            return lambda function: self._register(name, function, once=once)
        if not callable(handler):
            raise TypeError(f"a handler of {name!r} is a function, not {handler!r}")
        self._handlers = {**self._handlers, name: (*self._handlers.get(name, ()), (handler, _arity(handler), once))}
        return handler

    def _check(self, name: str) -> None:
        if name not in self._names:
            raise ValueError(f"there is no event {name!r}; there are {', '.join(self._names)}")

    # -- telling --------------------------------------------------------------------------------------------------

    def emit(self, name: str, *arguments: Any) -> bool:
        """Tell of an event, now and on this thread; whether anybody heard."""
        handlers = self._handlers.get(name, ())
        if any(once for _, _, once in handlers):
            self._handlers = {**self._handlers, name: tuple(entry for entry in handlers if not entry[2])}
        waiting = [entry for entry in self._waiting if entry[0] == name]
        for entry in waiting:
            self._waiting.remove(entry)
            entry[1].set_result(arguments[0] if len(arguments) == 1 else arguments)
        for handler, arity, _ in handlers:
            self._call(name, handler, arguments[:arity])
        return bool(handlers or waiting)

    def _call(self, name: str, handler: Handler, arguments: tuple[Any, ...]) -> Any:
        try:
            result = handler(*arguments)
        except Exception as exc:  # noqa: BLE001 - other people's code
            _log(name, handler, exc)
            return None
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(lambda done: self._ended(name, handler, done))
            return task
        return result

    def _ended(self, name: str, handler: Handler, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(exc := task.exception(), Exception):
            _log(name, handler, exc)


def _log(name: str, handler: Handler, exc: Exception) -> None:
    who = f"{getattr(handler, '__qualname__', repr(handler))} of {getattr(handler, '__module__', '')}"
    # The first frame is this file's.
    trace = exc.__traceback__ and (exc.__traceback__.tb_next or exc.__traceback__)
    logger.error("The %r handler %s raised", name, who, exc_info=(type(exc), exc, trace))


def _arity(handler: Handler) -> int | None:
    """How many arguments it takes at most; None for as many as there are."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except ValueError:
        # Some of those written in C do not tell.
        return None
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return None
    return sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters)
