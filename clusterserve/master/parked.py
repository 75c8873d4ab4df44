"""The connections that the master waits with for their clients: each has an entry in the hot path's epoll.

Idle ones, those whose client has not said a word yet, and those of a proxy that has not said whose they are.  How long
they may wait is the distributor's to know (`core.parking`).
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..core.connection import Connection
from ..core.distributor import Distributor
from .complaint import Complaint
from .sockets import hang_up, has_data, peeked

if TYPE_CHECKING:
    from .introductions import Introductions

_WAITING: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
#: Told of each arrival, and not again and again of what was there and is not enough.
_UNKNOWN: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


class Parked:
    """Owns their entries in `epoll`; the descriptors are the dispatcher's, and closed here when their client leaves."""

    def __init__(self, epoll: select.epoll, distributor: Distributor, introductions: Introductions | None) -> None:
        self._epoll = epoll
        self._distributor = distributor
        self._introductions = introductions
        self._complaint = Complaint()
        self._connections: dict[int, Connection] = {}

    def arrived(self, connection: Connection, *, silent: bool) -> None:
        """It was accepted.  `silent`: the kernel has not waited for its client's first word, so that is for us."""
        if self._introductions is not None and self._introductions.expects(connection):
            self._distributor.accepted(connection, waiting=False)
            self.get_to_know(connection, connection.since)
            return
        self._distributor.accepted(connection, waiting=not silent)
        if silent:
            self.park(connection)

    def get_to_know(self, connection: Connection, now: float) -> bool:
        """Its proxy may say whose it is, before anybody gets it; False if nobody listens to proxies."""
        if self._introductions is None:
            return False
        connection.unknown = True
        self._meet(self._introductions, connection, now)
        return True

    def park(self, connection: Connection) -> None:
        """Wait until its client says something, or leaves; end it if the kernel has no room for one more entry."""
        self._wait(connection, _WAITING)

    def _wait(self, connection: Connection, events: int) -> None:
        try:
            self._epoll.register(connection.fd, events)
        except OSError as exc:
            # The kernel bounds how many entries a user's epolls may have in all.
            self._complaint.warn("Cannot watch an idle connection, it is closed: %s", exc.strerror)
            hang_up(self._distributor.hung_up(connection.id))
        else:
            self._connections[connection.fd] = connection

    def woken(self, fd: int, event: int, now: float) -> None:
        """The epoll has told of it."""
        connection = self._connections.get(fd)
        if connection is None:
            # Closed by an event before it in the same batch.
            return
        if connection.unknown and self._introductions is not None:
            self._meet(self._introductions, connection, now, last=bool(event & ~select.EPOLLIN))
            return
        del self._connections[fd]
        # A worker gets its own copy, which would keep the entry alive behind our back.
        self._epoll.unregister(fd)
        there = peeked(fd) if event & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP) else True
        if there is None:
            # The event was another's, whose number this one has got since the epoll was asked.
            self.park(connection)
        elif not there:
            hang_up(self._distributor.hung_up(connection.id))
        else:
            connection.since = now
            self._distributor.readable(connection.id)

    def _meet(self, introductions: Introductions, connection: Connection, now: float, *, last: bool = False) -> None:
        """Learn whose it is, if its proxy has said so; `last`: it has no more time for that."""
        fd, known = connection.fd, introductions.read(connection)
        if known is False and not last:
            if fd not in self._connections:
                self._wait(connection, _UNKNOWN)
            return
        connection.unknown = False
        self.leave(connection)
        handle = self._distributor.handles.get(connection.listener)
        if not known:
            hang_up(self._distributor.hung_up(connection.id))
        elif (handle is not None and not handle.client_speaks_first) or has_data(fd):
            # What its proxy has taken until now is not waiting for a worker.
            connection.since = now
            self._distributor.readable(connection.id)
        else:
            self.park(connection)

    def leave(self, connection: Connection) -> None:
        """Wait with it no longer, if we did."""
        if self._connections.pop(connection.fd, None) is not None:
            self._epoll.unregister(connection.fd)

    def end_all(self, now: float) -> None:
        """Close them, as `end_idle` does; whose client has asked for more wait for a worker from now on."""
        everyone = tuple(self._connections.values())
        self.end_idle(everyone, now)
        for connection in everyone:
            # Those who are to be introduced have asked nothing yet.
            if self._connections.get(connection.fd) is connection and not connection.unknown:
                self.leave(connection)
                connection.since = now
                self._distributor.readable(connection.id)

    def end_idle(self, connections: Sequence[Connection], now: float) -> None:
        """Close these, but none whose client has asked for more: the epoll will tell of it."""
        for connection in connections:
            if connection.unknown and self._introductions is not None:
                # A part of its header is no question.
                self._meet(self._introductions, connection, now, last=True)
            if self._connections.get(connection.fd) is connection and not has_data(connection.fd):
                self.leave(connection)
                hang_up(self._distributor.hung_up(connection.id))
