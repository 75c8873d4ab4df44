"""Event loops of a program that knows nothing of us: the classes themselves listen through the master.

What `ClusterLoopMixin` does for the loop class of an application it does here for every loop of asyncio's and uvloop's,
and of classes made of them: a loop's own method and an adapter around the loop change places.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..home import Home
from .link import Link
from .loop import ClusterLoopMixin

_METHODS: Final = ("create_server", "create_unix_server", "create_datagram_endpoint", "start_tls", "sendfile")


class Patches:
    """Applied once, before the program runs.  `ours` is the loop of our thread, which is none of the program's.

    `on_close` is called with a loop that is about to be closed, `on_exit` when a SystemExit has ended one.
    """

    def __init__(
        self,
        link: Link,
        home: Home,
        ours: asyncio.AbstractEventLoop,
        on_close: Callable[[asyncio.AbstractEventLoop], None],
        on_exit: Callable[[], None],
    ) -> None:
        self._link = link
        self._home = home
        self._ours = ours
        self._on_close = on_close
        self._on_exit = on_exit

    def apply(self) -> None:
        for loop_class in _loop_classes():
            methods = {name: getattr(loop_class, name) for name in (*_METHODS, "run_forever", "close")}
            adapter = _adapter(methods, self._link)
            for name in _METHODS:
                setattr(loop_class, name, _through(adapter, name, methods[name]))
            loop_class.run_forever = self._run_forever(methods["run_forever"])
            loop_class.close = self._close(methods["close"])

    def _run_forever(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def run_forever(loop: Any) -> None:
            if loop is self._ours or loop.is_running():
                original(loop)
                return
            self._home.enter(loop)
            try:
                original(loop)
            except SystemExit:
                self._on_exit()
                raise
            finally:
                self._home.leave(loop)

        return run_forever

    def _close(self, original: Callable[[Any], None]) -> Callable[[Any], None]:
        def close(loop: Any) -> None:
            if not loop.is_closed() and not loop.is_running():
                self._on_close(loop)
            original(loop)

        return close


def _loop_classes() -> Iterator[Any]:
    # The one class of asyncio's that has all of these methods.
    yield asyncio.SelectorEventLoop
    try:
        import uvloop
    except ImportError:
        return
    yield uvloop.Loop


def _adapter(methods: dict[str, Callable[..., Any]], link: Link) -> type[Any]:
    """What stands in for a loop as `self` of the mixin's methods: `super()` is the loop's own, all else the loop's."""

    class Base:
        def __init__(self, loop: Any) -> None:
            self._adapted = loop

        def __getattr__(self, name: str) -> Any:
            return getattr(self._adapted, name)

    for name in _METHODS:
        setattr(Base, name, _original(methods[name]))
    return type("Adapter", (ClusterLoopMixin, Base), {"link": link})


def _original(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda adapter, *args, **options: method(adapter._adapted, *args, **options)


def _through(adapter: type[Any], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    async def listen(loop: Any, *args: Any, **options: Any) -> Any:
        return await getattr(adapter(loop), name)(*args, **options)

    listen.__name__, listen.__doc__ = name, original.__doc__
    return listen
