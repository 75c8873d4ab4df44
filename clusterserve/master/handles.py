"""The cluster's listeners by name, and which worker is on which: Node's RoundRobinHandle and SharedHandle.

A handle is known by the address as it was asked for, whether it is a `--bind`, and a count: a worker's second server
on port 0 is a second listener, the same for all workers.  Under a policy the master accepts and the distributor has a
handle of the same key; under `none` (`shared`) the workers get the listening socket itself.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from ..binds import Bind
from ..checks import MAX_INT
from ..core.address import Address
from ..core.messages import Listen
from ..core.policies import Policy
from ..errors import BindError, ProtocolError, SettingsError
from .dispatcher import Dispatcher
from .listeners import Listener, open_listener

#: How long a listener that no worker is left on is kept for the next one, if the last crashed (seconds).
ORPHAN_TIME: Final = 30.0


class Handles:
    """Owns the listeners.  `make_policy` gives each its own policy object; None: the workers accept."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, dispatcher: Dispatcher, make_policy: Callable[[], Policy] | None
    ) -> None:
        self._loop = loop
        self._dispatcher = dispatcher
        self._distributor = dispatcher.distributor
        self._make_policy = make_policy
        self._listeners: dict[int, Listener] = {}
        self._names: dict[tuple[str, bool, int], int] = {}
        self._orphans: dict[int, asyncio.TimerHandle] = {}
        self._keys = 0
        self._closed = False

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners.values())

    @property
    def shared(self) -> bool:
        """Whether workers get the listening sockets themselves."""
        return self._make_policy is None

    @property
    def open(self) -> bool:
        """Whether any listener is still open."""
        return any(listener.is_open for listener in self)

    @property
    def pinned(self) -> set[int]:
        """The keys of the listeners that live as long as the master."""
        return {key for key, listener in self._listeners.items() if listener.pinned}

    def address(self, key: int) -> Address:
        """What this listener listens on."""
        listener = self._listeners[key]
        if isinstance(listener.sockname, str):
            return Address(listener.sockname)
        host, port = listener.sockname[:2]
        return Address(str(host), int(str(port)), 6 if listener.family == socket.AF_INET6 else 4)

    def open_pinned(self, binds: Iterable[Bind], backlog: int) -> list[Listener]:
        """Open the listeners of `--bind`; raises `BindError`, and `close` closes those that were opened before."""
        seen: Counter[str] = Counter()
        for bind in binds:
            self._open(bind, seen[str(bind)], backlog, pinned=True)
            seen[str(bind)] += 1
        return list(self)

    def listen(self, worker: int, request: Listen) -> Listener:
        """The listener a worker asks for, opened if nobody had.

        Raises `BindError`, and the next try starts clean; `ProtocolError` for a `--bind` that never was.
        """
        bind, backlog = _parse(request.bind), min(request.backlog, MAX_INT)
        key = self._names.get((str(bind), request.pinned, request.index))
        if key is None and request.pinned:
            raise ProtocolError(f"it asks for a listener on {request.bind}, which is no --bind")
        if key is None:
            listener = self._open(bind, request.index, backlog, pinned=False)
        else:
            listener = self._listeners[key]
            if self.shared and not listener.is_open:
                raise _stopping(request.bind)
            if backlog > listener.backlog:
                listener.listen(backlog)
        listener.workers.add(worker)
        orphan = self._orphans.pop(listener.key, None)
        if orphan is not None:
            orphan.cancel()
        if self._make_policy is not None and listener.key not in self._distributor.handles:
            first = request.client_speaks_first
            self._distributor.add_handle(listener.key, self._make_policy(), client_speaks_first=first)
            if listener.is_open:
                self._dispatcher.add_listener(listener, client_speaks_first=first)
        return listener

    def attach(self, worker: int, key: int) -> None:
        """The worker's server on listener `key` is in place.  Raises `ProtocolError` if it never asked for it."""
        listener = self._listeners.get(key)
        if listener is None or worker not in listener.workers:
            raise ProtocolError(f"it says it listens on listener {key}, which it did not ask for")
        if not self.shared:
            self._dispatcher.attach(worker, key)

    def leave(self, worker: int, key: int, *, crashed: bool) -> None:
        """The worker no longer listens there; a listener that was only the workers' goes with the last of them."""
        listener = self._listeners.get(key)
        if listener is None or worker not in listener.workers:
            return
        listener.workers.discard(worker)
        if worker in self._distributor.workers and key in self._distributor.handles:
            self._distributor.detach(worker, key)
        if not listener.pinned and not listener.workers:
            if crashed:
                self._orphans[key] = self._loop.call_later(ORPHAN_TIME, self._release, key)
            else:
                self._release(key)

    def leave_all(self, worker: int, *, crashed: bool) -> None:
        """The worker is dead."""
        for key in tuple(self._listeners):
            self.leave(worker, key, crashed=crashed)

    def close(self) -> None:
        """Close every listener and open none again; what was accepted stays with the dispatcher."""
        self._closed = True
        for listener in self:
            self._dispatcher.remove_listener(listener)
            listener.close()

    def _open(self, bind: Bind, index: int, backlog: int, *, pinned: bool) -> Listener:
        if self._closed:
            raise _stopping(str(bind))
        self._keys += 1
        listener = open_listener(self._keys, bind, backlog, pinned=pinned)
        self._listeners[listener.key] = listener
        self._names[str(bind), pinned, index] = listener.key
        return listener

    def _release(self, key: int) -> None:
        listener = self._listeners.pop(key)
        self._orphans.pop(key, None)
        self._dispatcher.remove_listener(listener)
        if key in self._distributor.handles:
            self._dispatcher.forget(key)
        listener.close()
        self._names = {name: number for name, number in self._names.items() if number != key}


def _parse(text: str) -> Bind:
    """The address a worker asks for; what cannot be one is that worker's error."""
    try:
        return Bind.parse(text)
    except SettingsError as exc:
        raise BindError(errno.EINVAL, str(exc), text) from None


def _stopping(address: str) -> BindError:
    return BindError(errno.ESHUTDOWN, f"cannot listen on {address}: the cluster is stopping", address)
