"""Connections whose client must speak first: which they are, and until when each may be silent."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from operator import itemgetter
from typing import Final

from .connection import Connection

#: How long a connection that was given back may be idle (seconds), unless told otherwise.
KEEP_ALIVE: Final = 5.0


class Parking:
    """The parked connections, by id.  Their state is the distributor's business.

    `keep_alive` is how long one that was served before may be idle, and `head` how long a new client may take to its
    first word (seconds; 0: for ever).  Both are the same for all, so that who came first is due first.
    """

    def __init__(self, keep_alive: float, head: float) -> None:
        self._keep_alive = keep_alive
        self._head = head
        self.connections: dict[int, Connection] = {}
        #: When those that were served before are closed, by id, soonest first.
        self._expiries: dict[int, float] = {}
        #: The same of those that were another master's: there may be thousands, and ours come in between.
        self._inherited: dict[int, float] = {}
        #: The same of those that have never said anything.
        self._silent: dict[int, float] = {}

    def idle(self, connection: Connection, now: float) -> None:
        """It was served, and its client may ask for more."""
        self.connections[connection.id] = connection
        self._expiries[connection.id] = now + self._keep_alive

    def silent(self, connection: Connection) -> None:
        """Its client has never said anything."""
        self.connections[connection.id] = connection
        if self._head:
            self._silent[connection.id] = connection.since + self._head

    def inherited(self, connection: Connection, since: float) -> None:
        """It was another master's, is idle, and has been since then."""
        self.connections[connection.id] = connection
        expiry = since + self._keep_alive
        latest = next(reversed(self._inherited.values()), expiry)
        self._inherited[connection.id] = expiry
        if expiry < latest:
            # They come in the order in which they are due, unless that master has kept some back.
            self._inherited = dict(sorted(self._inherited.items(), key=itemgetter(1)))

    def since(self, id: int, now: float) -> tuple[bool, float]:
        """Whether it is idle, or else has never said anything; and for how long (seconds)."""
        connection, expiry = self.connections[id], self._expiries.get(id, self._inherited.get(id))
        if expiry is not None:
            return True, max(0.0, now - expiry + self._keep_alive)
        return False, max(0.0, now - connection.since)

    def leave(self, id: int) -> Connection:
        """It is parked no longer."""
        self._forget(id)
        return self.connections.pop(id)

    def clear(self, listener: int) -> list[Connection]:
        """All that came from this listener leave."""
        return [self.leave(one.id) for one in tuple(self.connections.values()) if one.listener == listener]

    def expired(self, now: float) -> list[Connection]:
        """Those whose time is over, each named once; they stay, for what they send may be under way to the shell."""
        ids = []
        for deadlines in (self._expiries, self._inherited, self._silent):
            for id, deadline in deadlines.items():
                if deadline > now:
                    break
                ids.append(id)
        for id in ids:
            self._forget(id)
        return [self.connections[id] for id in ids]

    def longest_idle(self, count: int) -> list[Connection]:
        """So many of those that were served before, longest idle first: who goes when room is short."""
        idle = heapq.merge(self._expiries.items(), self._inherited.items(), key=itemgetter(1))
        return [self.connections[id] for id, _ in itertools.islice(idle, count)]

    def deadlines(self) -> Iterator[float]:
        """When `expired` should be asked again; nothing if never."""
        yield from itertools.islice(self._expiries.values(), 1)
        yield from itertools.islice(self._inherited.values(), 1)
        yield from itertools.islice(self._silent.values(), 1)

    def _forget(self, id: int) -> None:
        self._expiries.pop(id, None)
        self._inherited.pop(id, None)
        self._silent.pop(id, None)
