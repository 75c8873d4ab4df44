"""A listener as the distributor knows it: its policy, its workers, and the queues its connections wait in."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Final

from .connection import Connection
from .policies import Policy
from .worker import Worker

#: Lanes of a handle beyond which the empty ones are dropped: a policy may have one for every client it ever saw.
MANY_LANES: Final = 1024


class Handle:
    """A listener whose connections the master hands out: Node's RoundRobinHandle, without the socket."""

    def __init__(self, key: int, policy: Policy, client_speaks_first: bool, tls: bool = False) -> None:
        self.key = key
        self.policy = policy
        self.client_speaks_first = client_speaks_first
        self.tls = tls
        #: Whether its clients understand an answer of the master's: not within TLS, whose end is in a worker.
        self.plain_http = client_speaks_first and not tls
        self.lanes: dict[Hashable, deque[Connection]] = {}
        self.workers: dict[int, Worker] = {}
        self._lane = getattr(policy, "lane", None)
        #: Its connections wait for one worker and no other: taking them back from it would only delay them.
        self.sticky = bool(getattr(policy, "sticky", False))

    def resize(self, slots: int) -> None:
        """The cluster has `slots` slots from now on: who waits may have to wait elsewhere."""
        resize = getattr(self.policy, "resize", None)
        if resize is not None:
            resize(slots)
            waiting = sorted((one for lane in self.lanes.values() for one in lane), key=lambda one: one.ticket)
            self.lanes = {}
            for connection in waiting:
                self.lane(connection).append(connection)

    def lane(self, connection: Connection) -> deque[Connection]:
        """The queue this connection waits in."""
        name = None if self._lane is None else self._lane(connection)
        lane = self.lanes.get(name)
        if lane is None:
            if len(self.lanes) >= MANY_LANES:
                self.lanes = {name: lane for name, lane in self.lanes.items() if lane}
            lane = self.lanes[name] = deque()
        return lane
