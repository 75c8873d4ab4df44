"""`Succession`: the new master's side of an upgrade.  The old one's is `Upgrade`.

Until the old master has yielded, this one listens but does not accept, and owns nothing: neither the files of unix
sockets, nor the pid file, nor systemd's ear.  If the old one is gone before that, this one goes too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from ..channel.handover import HandoverChannel
from ..core.handover import Hello, Left, Message, Passed, Ready, Yielded
from ..core.reconcile import Stop
from ..errors import BootError, ClusterError, ProtocolError
from ..succession import Claim
from .engine import Engine
from .handles import ORPHAN_TIME
from .heritage import Heritage

logger = logging.getLogger("clusterserve")

#: What the old master may take beyond the grace that it has given its workers (seconds).
_MARGIN = 5.0


class Succession:
    """On the engine's loop, from `start` on.  Owns the socket to the old master.  `on_yielded` is called once."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        claim: Claim,
        heritage: Heritage,
        engine: Engine,
        on_yielded: Callable[[], None],
    ) -> None:
        self.yielded = False
        #: Why it has come to nothing.
        self.failure: ClusterError | None = None
        #: The way to a process 1 that stays for our sake.
        self.parent: HandoverChannel | None = None
        self._loop = loop
        self._claim = claim
        self._heritage = heritage
        self._spoken = {each.held.key: (each.held.client_speaks_first, each.held.tls) for each in heritage.listeners}
        self._engine = engine
        self._on_yielded = on_yielded
        self._left = loop.create_future()
        self._until = 0.0
        self._channel = HandoverChannel(loop, socket.socket(fileno=claim.fd), self._heard, self._hung_up)
        if claim.predecessor == 1:
            self.parent = self._channel
        elif claim.parent_fd >= 0:
            parent = socket.socket(fileno=claim.parent_fd)
            self.parent = HandoverChannel(loop, parent, lambda message, fds: None, lambda error: None)

    def start(self) -> None:
        """The engine has started: say when it is ready."""
        self._channel.send(Hello(self._engine.settings.timeout_start))
        self._engine.settled.add_done_callback(self._settled)

    @property
    def alone(self) -> bool:
        """Whether the old master has left."""
        return self._left.done()

    async def left_alone(self) -> None:
        """Return when the old master's last worker has gone, or should have."""
        if self.yielded:
            within = self._until - self._loop.time()
            await asyncio.wait([self._left], timeout=max(0.0, within))

    def close(self) -> None:
        """Hear nothing more."""
        self._channel.close()

    def _settled(self, settled: asyncio.Future[None]) -> None:
        error = settled.exception()
        if error is not None:
            self._give_up(BootError(*error.args))
        elif not self._engine.stopping:
            taken = self._engine.handles.taken()
            kept = [each.held.key for each in self._heritage.listeners if not each.held.pinned]
            continued = [
                key for key, listener in taken.items() if self._engine.handles.speech(listener.key) == self._spoken[key]
            ]
            self._channel.send(Ready(tuple(taken), tuple(kept), tuple(continued)))

    def _give_up(self, error: ClusterError) -> None:
        self.failure = self.failure or error
        self._engine.stop(Stop.GRACEFUL, at_once=True)

    def _heard(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Passed) and len(descriptors) == len(message.connections):
            fds, descriptors = descriptors, []
            for fd, handed in zip(fds, message.connections, strict=True):
                self._engine.inherit(fd, handed)
        elif isinstance(message, Yielded) and not self.yielded and not self._engine.stopping:
            self.yielded = True
            self._until = self._loop.time() + message.grace + _MARGIN
            self._heritage.drop(pinned=True)
            self._loop.call_later(ORPHAN_TIME, lambda: self._heritage.drop(pinned=False))
            self._on_yielded()
            self._engine.take_over()
        elif isinstance(message, Left):
            self._is_alone()
        for fd in descriptors:
            # Some did not arrive, at the limit of open files: nobody can tell which of them these are.
            os.close(fd)

    def _hung_up(self, error: ProtocolError | None) -> None:
        if not self.yielded:
            why = "" if error is None else f": {error}"
            self._give_up(ClusterError(f"process {self._claim.predecessor} is not to be succeeded any more{why}"))
        self._is_alone()

    def _is_alone(self) -> None:
        if not self._left.done():
            self._left.set_result(None)
