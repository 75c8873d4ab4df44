"""Accepts: from which listeners, how many connections at a time, and when none at all."""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
from collections.abc import Callable
from typing import Final

from ..core.connection import Connection
from ..core.distributor import Distributor
from ..core.records import IPV4, IPV6, NO_ADDRESS
from .complaint import Complaint
from .listeners import Listener
from .parked import Parked

logger = logging.getLogger("clusterserve.dispatch")

#: Connections accepted from one listener before the others get their turn.
_ACCEPTS: Final = 64

#: Out of descriptors or memory: accept nothing for this long (seconds).
_EXHAUSTED_PAUSE: Final = 0.1
#: So many idle connections are closed at a time to make room for new ones.
_SHED: Final = 16
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


class Acceptor:
    """Borrows the listeners, and owns their entries in `epoll`; what it accepts is `parked`'s to begin with.

    At most `max_pending` connections wait for a worker.  `on_pause_over()` follows a time without descriptors.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        epoll: select.epoll,
        distributor: Distributor,
        parked: Parked,
        max_pending: int,
        on_pause_over: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._epoll = epoll
        self._distributor = distributor
        self._parked = parked
        self._max_pending = max_pending
        self._on_pause_over = on_pause_over
        #: By descriptor.
        self.listeners: dict[int, Listener] = {}
        self._silent: dict[int, bool] = {}
        self._ids = 0
        self._accepting = True
        #: Another master accepts what we could, until it has yielded.
        self._held = False
        self._pause: asyncio.TimerHandle | None = None
        self._complaint = Complaint()

    def next_id(self) -> int:
        """A connection's: never used again."""
        self._ids += 1
        return self._ids

    def accept(self, fd: int, now: float) -> None:
        """What has come to this listener, as far as there is room for it in the queue."""
        self._accept(fd, now, min(_ACCEPTS, self._max_pending - self._distributor.queued))

    def _accept(self, fd: int, now: float, limit: int) -> None:
        listener = self.listeners[fd]
        accept = listener.sock._accept  # type: ignore[attr-defined]  # without a socket object for each
        family, silent = listener.sock.family, self._silent[fd]
        for _ in range(limit):
            try:
                new, address = accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._exhausted(exc, now)
                    return
                if exc.errno == errno.EINVAL:
                    # Whoever shares an inherited socket can shut it down for all: it would be readable for ever.
                    logger.error("Nobody listens on %s any more: it was shut down by another process", listener.address)
                    self.remove(listener)
                    return
                # The client's connection is already broken, or its network is: accept(2) says to treat it as EAGAIN.
                continue
            self._ids += 1
            if family == socket.AF_INET:
                connection = Connection(
                    self._ids, new, listener.key, _MAPPED + socket.inet_aton(address[0]), address[1], IPV4, now
                )
            elif family == socket.AF_INET6:
                host = socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
                connection = Connection(self._ids, new, listener.key, host, address[1], IPV6, now)
            else:
                connection = Connection(self._ids, new, listener.key, b"", 0, NO_ADDRESS, now)
            self._parked.arrived(connection, silent=silent)

    # -- when, and when not ---------------------------------------------------------------------------------------

    def balance(self) -> None:
        """Accept if there is room in the queue; otherwise the kernel's backlog fills, which pushes back."""
        room = self._distributor.queued < self._max_pending
        if self._pause is None and not self._held and self._accepting != room:
            self._set_accepting(room)

    def hold(self) -> None:
        """Accept nothing before `release`."""
        self._held = True
        self._set_accepting(False)

    def release(self) -> None:
        """Accept from now on, as soon as `balance` says so."""
        self._held = False

    def _set_accepting(self, accepting: bool) -> None:
        self._accepting = accepting
        for fd in self.listeners:
            self._epoll.modify(fd, select.EPOLLIN if accepting else 0)

    def _exhausted(self, exc: OSError, now: float) -> None:
        idle = self._distributor.parking.longest_idle(_SHED)
        what = f"closing the {len(idle)} connections idle longest" if idle else "waiting"
        self._complaint.warn("Cannot accept: %s; %s", exc.strerror, what)
        self._parked.end_idle(idle, now)
        if idle or self._pause is not None:
            return
        self._set_accepting(False)
        self._pause = self._loop.call_later(_EXHAUSTED_PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._on_pause_over()

    # -- listeners ------------------------------------------------------------------------------------------------

    def add(self, listener: Listener, *, client_speaks_first: bool) -> None:
        """Accept from it from now on.  Clients that must speak first are parked until they do, if the kernel cannot."""
        fd = listener.sock.fileno()
        deferred = client_speaks_first and listener.defer(True)
        self.listeners[fd] = listener
        self._silent[fd] = client_speaks_first and not deferred
        self._epoll.register(fd, select.EPOLLIN if self._accepting else 0)

    def remove(self, listener: Listener) -> None:
        """Accept nothing more from it; what was accepted stays.  The caller closes it."""
        fd = listener.sock.fileno()
        if self.listeners.pop(fd, None) is not None:
            del self._silent[fd]
            self._epoll.unregister(fd)

    def accept_rest(self, now: float) -> None:
        """Accept what the kernel has accepted: closing a listener resets the clients in its backlog."""
        if self._held:
            return
        for fd, listener in tuple(self.listeners.items()):
            listener.defer(False)
            # More than `max_pending` if need be: the kernel has let them in, and the backlog bounds them.
            self._accept(fd, now, listener.backlog + 1)

    def close(self) -> None:
        """Cancel what is timed."""
        if self._pause is not None:
            self._pause.cancel()
