"""The worker's link to its master: listen requests and their answers, the order to drain, the end of the master.

One per process, made before the event loop; `attach` binds it to the loop that will run.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import select
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ..channel.board import Board
from ..channel.connection import WorkerEnd
from ..channel.message import MessageChannel, Riders
from ..core.envelope import Envelope
from ..core.messages import Closed, Debug, Drain, Leave, Listen, Listened, Listening, Message, ShowStacks, Stacks
from ..current import current_worker
from ..errors import ProtocolError
from . import debugging
from .receiver import Receiver
from .server import FauxServer
from .stacks import tasks, thread_names

#: What a worker exits with when its master is gone: nobody reads it.
MASTER_GONE: Final = 1


class _Request(NamedTuple):
    """A listen request on its way, and the name of the listener it asks for."""

    name: tuple[str, bool, int]
    answer: asyncio.Future[tuple[Listened, list[int]]]


class Link:
    """Both channels of this worker, its board, and the epoll of what it keeps.  Owns them all."""

    def __init__(self, messages: socket.socket, connections: socket.socket, board: Board, kept: select.epoll) -> None:
        self._messages = messages
        self._connections = connections
        self._board = board
        self.kept = kept
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: MessageChannel | None = None
        self._receiver: Receiver | None = None
        self._requests: dict[int, _Request] = {}
        self._number = 0
        # The indexes in use for each address, and which one belongs to which listener.
        self._indexes: defaultdict[tuple[str, bool], set[int]] = defaultdict(set)
        self._names: dict[int, tuple[str, bool, int]] = {}
        #: Called with (grace seconds, quick, keep) when the master wants this worker to finish.
        self.on_drain: Callable[[float, bool, bool], None] = lambda grace, quick, keep: None
        #: Called with each message of the program that has the cluster.
        self.on_envelope: Callable[[Envelope, Riders], None] = lambda envelope, riders: riders.close()
        #: Called when a server is in place.
        self.on_listening: Callable[[], None] = lambda: None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the channels on `loop` from now on."""
        self._loop = loop
        self._channel = MessageChannel(
            loop,
            self._messages,
            self._on_message,
            self._on_closed,
            lambda envelope, riders: self.on_envelope(envelope, riders),
        )
        self._receiver = Receiver(loop, WorkerEnd(self._connections), self._board, lambda: self._on_closed(None))

    @property
    def receiver(self) -> Receiver:
        assert self._receiver is not None, "not attached to a loop"
        return self._receiver

    def send(self, message: Message) -> None:
        """Send to the master; nothing happens if it is gone."""
        if self._channel is not None:
            self._channel.send(message)

    def post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        """Send a message of this program's, from any thread; takes the descriptors over.

        `done` is called once, on any thread, with whether the kernel has all of it.
        """
        if self._channel is not None:
            self._channel.post(envelope, descriptors, done)
            return
        for fd in descriptors:
            os.close(fd)
        done(False)

    def finish(self, within: float) -> None:
        """Send what waits, the loop's time being over; blocks for so many seconds at most."""
        if self._channel is not None:
            self._channel.finish(within)

    async def listen(
        self, bind: str, *, backlog: int, client_speaks_first: bool, pinned: bool = False
    ) -> tuple[Listened, list[int]]:
        """Ask the master for a listener on `bind`; raises OSError with the kernel's errno if it cannot be had.

        Call `serve` (or, if the answer is `shared`, `listening`) once the server is in place.
        """
        assert self._loop is not None
        self._number += 1
        used = self._indexes[bind, pinned]
        # The first that is free: who closes a server and listens again comes back to where the other workers are.
        index = next(number for number in itertools.count() if number not in used)
        used.add(index)
        request = self._requests[self._number] = _Request((bind, pinned, index), self._loop.create_future())
        self.send(Listen(self._number, bind, index, backlog, client_speaks_first, pinned))
        try:
            listened, descriptors = await request.answer
        except asyncio.CancelledError:
            if not request.answer.cancelled():
                # Answered and given up in the same turn.
                self._give_back(*request.answer.result())
            raise
        if listened.errno:
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
        self._leave(server.key)

    def _leave(self, key: int) -> None:
        self._free(self._names.pop(key))
        self.send(Closed(key))

    def _free(self, name: tuple[str, bool, int]) -> None:
        bind, pinned, index = name
        self._indexes[bind, pinned].discard(index)

    def _listened(self, message: Listened, descriptors: list[int]) -> None:
        request = self._requests.pop(message.request, None)
        if request is None:
            raise ProtocolError(f"request {message.request} was never sent, or is answered already")
        if message.errno:
            self._free(request.name)
        else:
            self._names[message.listener] = request.name
        if request.answer.done():
            self._give_back(message, descriptors)
        else:
            request.answer.set_result((message, descriptors))

    def _give_back(self, answer: Listened, descriptors: list[int]) -> None:
        """Whoever asked has given up meanwhile: let go of what came too late."""
        for fd in descriptors:
            os.close(fd)
        if not answer.errno:
            self._leave(answer.listener)

    def _on_message(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Listened):
            self._listened(message, descriptors)
            return
        if isinstance(message, Drain):
            # Every offer was sent before this message: none is left behind when the servers close.
            self.receiver.drain()
            self.on_drain(message.grace, message.quick, message.keep)
        elif isinstance(message, Debug):
            worker = current_worker()
            assert worker is not None
            self.send(debugging.listen(message.port, worker.slot))
        elif isinstance(message, ShowStacks):
            self.send(Stacks(thread_names(), tasks([self._loop] if self._loop is not None else [])))
        else:
            raise ProtocolError(f"a worker does not expect {type(message).__name__}")
        for fd in descriptors:
            os.close(fd)

    def _on_closed(self, error: ProtocolError | None) -> None:
        """The master is gone, and with it the reason to live: what the kernel's parent-death signal does, for sure."""
        os._exit(MASTER_GONE)
