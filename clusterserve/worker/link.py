"""The worker's link to its master: listen requests and their answers, the order to drain, the end of the master.

One per process, made before the event loop; `attach` binds it to the loop that will run.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from ..channel.connection import WorkerEnd
from ..channel.message import MessageChannel
from ..core.messages import Closed, Drain, Leave, Listen, Listened, Listening, Message
from ..errors import ProtocolError
from .receiver import Receiver
from .server import FauxServer

#: What a worker exits with when its master is gone: nobody reads it.
MASTER_GONE: Final = 1


class Link:
    """Both channels of this worker.  Owns the two sockets."""

    def __init__(self, messages: socket.socket, connections: socket.socket) -> None:
        self._messages = messages
        self._connections = connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: MessageChannel | None = None
        self._receiver: Receiver | None = None
        self._requests: dict[int, asyncio.Future[tuple[Listened, list[int]]]] = {}
        self._number = 0
        self._seen: Counter[str] = Counter()
        #: Called with (grace seconds, quick, keep) when the master wants this worker to finish.
        self.on_drain: Callable[[float, bool, bool], None] = lambda grace, quick, keep: None
        #: Called when a server is in place.
        self.on_listening: Callable[[], None] = lambda: None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the channels on `loop` from now on."""
        self._loop = loop
        self._channel = MessageChannel(loop, self._messages, self._on_message, self._on_closed)
        self._receiver = Receiver(loop, WorkerEnd(self._connections), lambda: self._on_closed(None))

    @property
    def receiver(self) -> Receiver:
        assert self._receiver is not None, "not attached to a loop"
        return self._receiver

    def send(self, message: Message) -> None:
        """Send to the master; nothing happens if it is gone."""
        if self._channel is not None:
            self._channel.send(message)

    async def listen(self, bind: str, *, backlog: int, client_speaks_first: bool) -> tuple[Listened, list[int]]:
        """Ask the master for a listener on `bind`; raises OSError with the kernel's errno if it cannot be had.

        Call `serve` (or, if the answer is `shared`, `listening`) once the server is in place.
        """
        assert self._loop is not None
        self._number += 1
        index = self._seen[bind]
        self._seen[bind] += 1
        answer = self._requests[self._number] = self._loop.create_future()
        self.send(Listen(self._number, bind, index, backlog, client_speaks_first))
        listened, descriptors = await answer
        if listened.errno:
            self._seen[bind] -= 1
            raise OSError(listened.errno, listened.reason)
        return listened, descriptors

    def serve(
        self,
        answer: Listened,
        protocol_factory: Callable[[], asyncio.Protocol],
        ssl: dict[str, Any],
        client_speaks_first: bool,
    ) -> FauxServer:
        """Put a faux server in place for a listener and let its connections come."""
        assert self._loop is not None
        key = answer.listener
        server = FauxServer(self._loop, key, answer, protocol_factory, ssl, client_speaks_first, self._server_closed)
        self.receiver.servers[key] = server
        self.listening(key)
        return server

    def listening(self, key: int) -> None:
        """Tell the master that the server on listener `key` is in place."""
        # First, so that whatever it prepares is in place when the first connection comes, and the first signal.
        self.on_listening()
        self.send(Listening(key))

    def ask_to_leave(self) -> None:
        """Ask the master to be drained.  May be called from a signal handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.send, Leave())

    def _server_closed(self, server: FauxServer) -> None:
        self.receiver.servers.pop(server.key, None)
        self.send(Closed(server.key))

    def _on_message(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Listened):
            answer = self._requests.pop(message.request, None)
            if answer is not None and not answer.done():
                answer.set_result((message, descriptors))
                return
            if not message.errno:
                # Whoever asked has given up meanwhile: let go of what came too late.
                self.send(Closed(message.listener))
        elif isinstance(message, Drain):
            # Every offer was sent before this message: none is left behind when the servers close.
            self.receiver.drain()
            self.on_drain(message.grace, message.quick, message.keep)
        else:
            raise ProtocolError(f"a worker does not expect {type(message).__name__}")
        for fd in descriptors:
            os.close(fd)

    def _on_closed(self, error: ProtocolError | None) -> None:
        """The master is gone, and with it the reason to live: what the kernel's parent-death signal does, for sure."""
        os._exit(MASTER_GONE)
