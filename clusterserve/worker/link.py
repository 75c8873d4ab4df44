"""The worker's link to its master: listen requests and their answers, the order to drain, the end of the master.

One per process, made before the event loop.  A worker with an application has one loop for everything (`attach`).  One
that runs a program reads its messages on a thread of ours (`attach_messages`), so that it can be told to go whatever
the program does, and has its connections on the loop that listens (`receive_on`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ..channel.board import Board
from ..channel.connection import WorkerEnd
from ..channel.descriptors import Riders
from ..channel.message import MessageChannel
from ..channel.tally import Tally
from ..core.address import Address
from ..core.envelope import Envelope
from ..core.messages import (
    Closed,
    Debug,
    Drain,
    Leave,
    Listen,
    Listened,
    Listening,
    Message,
    Renew,
    Reopen,
    Reopened,
    ShowStacks,
    Stacks,
    Stopping,
)
from ..current import current_worker
from ..errors import ClusterError, ProtocolError
from ..log_files import reopen_handlers
from . import debugging
from .receiver import Receiver
from .server import FauxServer
from .stacks import running_loops, tasks, thread_names

#: What a worker exits with when its master is gone: nobody reads it.
MASTER_GONE: Final = 1


class _Request(NamedTuple):
    """A listen request on its way."""

    bind: str
    datagram: bool
    #: A thread's future: whoever asks may run on another loop than the one that reads the channel.
    answer: concurrent.futures.Future[tuple[Listened, list[int]]]
    #: Done when the master has answered, whoever still wants to know.
    over: concurrent.futures.Future[None]


class Link:
    """Both channels of this worker, its board, and the epoll of what it keeps.  Owns them all."""

    def __init__(self, messages: socket.socket, connections: socket.socket, board: Board, kept: select.epoll) -> None:
        self._messages = messages
        self._connections = connections
        self._board = board
        self.kept = kept
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._channel: MessageChannel | None = None
        self._receiver: Receiver | None = None
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        #: The servers that are open: `FauxServer` or `SharedServer`.
        self.servers: set[Any] = set()
        #: Called with (grace seconds, quick, keep) when the master wants this worker to finish.
        self.on_drain: Callable[[float, bool, bool], None] = lambda grace, quick, keep: None
        #: Called when the cluster was told to stop; when this worker is to finish, it hears of that besides.
        self.on_stopping: Callable[[], None] = lambda: None
        #: Called with each message of the program that has the cluster.
        self.on_envelope: Callable[[Envelope, Riders], None] = lambda envelope, riders: riders.close()
        #: Called with the certificate and keys from now on, as `Credentials.to_json` has them.
        self.on_renew: Callable[[dict[str, Any]], None] = lambda tls: None
        #: Where this worker's listeners listen.
        self._addresses: dict[int, Address] = {}
        #: Called when a server is in place, on its loop.
        self.on_listening: Callable[[Address], None] = lambda address: None
        #: Where all workers count what they have in progress, and which cell is ours; None: nobody counts.
        self.tally: Tally | None = None
        self.place = 0
        #: Called with the descriptors of the log's new files, which stay the caller's; says what is wrong with them.
        self.on_reopen: Callable[[list[int]], str] = _reopen_handlers
        #: What this process exits with when the master has closed the channels.
        self.gone = MASTER_GONE

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the channels on `loop` from now on."""
        self.attach_messages(loop)
        self.receive_on(loop)

    def attach_messages(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the message channel on `loop`, in whose thread this is called, from now on."""
        self._loop, self._thread = loop, threading.get_ident()
        self._channel = MessageChannel(
            loop,
            self._messages,
            self._on_message,
            self._on_closed,
            lambda envelope, riders: self.on_envelope(envelope, riders),
        )

    def receive_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take connections on `loop`, in whose thread this is called, until it is closed.

        Raises OSError (EBUSY) while another loop does.
        """
        if self._receiver is not None:
            if self._receiver.loop is loop:
                return
            if not self._receiver.loop.is_closed():
                raise OSError(
                    errno.EBUSY, "another event loop of this worker listens already, and one at a time gets connections"
                )
        self._receiver = Receiver(loop, WorkerEnd(self._connections), self._board, lambda: self._on_closed(None))

    def loop_closes(self, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is about to be closed, by its own thread: what still listens on it does so no more."""
        receiver = self._receiver
        if receiver is not None and receiver.loop is loop:
            for server in tuple(self.servers):
                server.close()
            receiver.abandon()
            self._receiver = None

    @property
    def receives(self) -> bool:
        """Whether a loop takes connections."""
        return self._receiver is not None

    @property
    def receiver(self) -> Receiver:
        assert self._receiver is not None, "not attached to a loop"
        return self._receiver

    def send(self, message: Message) -> None:
        """Send to the master, from any thread; nothing happens if it is gone."""
        if self._channel is None or self._loop is None:
            return
        if threading.get_ident() == self._thread:
            self._channel.send(message)
        else:
            self._loop.call_soon_threadsafe(self._channel.send, message)

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

    def handle_connection(self, sock: socket.socket) -> None:
        """Have a server of this worker serve a connection, the one that listened first if there are several.

        From any thread.  Takes the socket over; raises `ClusterError` if there is no server, and leaves it then.
        """
        servers = [server for server in tuple(self.servers) if hasattr(server, "handle_connection")]
        if not servers:
            raise ClusterError("this worker has no server for a connection")
        min(servers, key=lambda server: min(server.keys)).handle_connection(sock)

    def finish(self, within: float) -> None:
        """Send what waits, the loop's time being over; blocks for so many seconds at most."""
        if self._channel is not None:
            self._channel.finish(within)

    def close(self) -> None:
        """Close the message channel, when everything is said.  On its loop."""
        if self._channel is not None:
            # A process that the program has forked may have a copy: it must not keep the master waiting.
            with contextlib.suppress(OSError):
                self._messages.shutdown(socket.SHUT_RDWR)
            self._channel.close()

    async def listen(self, request: Listen) -> tuple[Listened, list[int]]:
        """Ask the master for a listener; raises OSError with the kernel's errno if it cannot be had.

        `request.request` is ours to fill in.  Call `listening` once the server is in place, `leave` when it has gone.
        The descriptors are the caller's.
        """
        self.receive_on(asyncio.get_running_loop())
        for other in tuple(self._requests.values()):
            if (other.bind, other.datagram) == (request.bind, request.datagram) and other.answer.cancelled():
                # Given up, but not yet given back: the master would take this for a second server there.
                # Shielded: who gives up waiting must not cancel what others wait for, and the answer sets.
                await asyncio.shield(asyncio.wrap_future(other.over))
        number = next(self._numbers)
        asked = _Request(request.bind, request.datagram, concurrent.futures.Future(), concurrent.futures.Future())
        self._requests[number] = asked
        self.send(dataclasses.replace(request, request=number))
        try:
            listened, descriptors = await asyncio.wrap_future(asked.answer)
        except asyncio.CancelledError:
            if not asked.answer.cancel():
                # Answered and given up in the same turn.
                self._give_back(*asked.answer.result())
            raise
        if listened.errno:
            raise OSError(listened.errno, listened.reason)
        self._addresses[listened.listener] = _address(listened, request.datagram, request.tls)
        return listened, descriptors

    def serve(self, server: FauxServer) -> None:
        """Let the connections of this faux server come."""
        for entrance in server.entrances:
            self.receiver.servers[entrance.key] = entrance
        for entrance in server.entrances:
            self.listening(entrance.key)

    def listening(self, key: int) -> None:
        """Tell the master that the server on listener `key` is in place."""
        # First, so that whatever it prepares is in place when the first connection comes, and the first signal.
        self.on_listening(self._addresses[key])
        self.send(Listening(key))

    def leave(self, key: int) -> None:
        """The server on listener `key` has gone, or never came: the master may let go of it."""
        self.receiver.servers.pop(key, None)
        self._addresses.pop(key, None)
        self.send(Closed(key))

    def ask_to_leave(self) -> None:
        """Ask the master to be drained.  May be called from a signal handler."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._send_in_line, Leave())

    def _send_in_line(self, message: Message) -> None:
        if self._channel is not None:
            # Behind the messages that the program has sent before.
            self._channel.send_in_line(message)

    def _listened(self, message: Listened, descriptors: list[int]) -> None:
        request = self._requests.get(message.request)
        if request is None:
            raise ProtocolError(f"request {message.request} was never sent, or is answered already")
        if request.answer.set_running_or_notify_cancel():
            request.answer.set_result((message, descriptors))
        else:
            self._give_back(message, descriptors)
        del self._requests[message.request]
        request.over.set_result(None)

    def _give_back(self, answer: Listened, descriptors: list[int]) -> None:
        """Whoever asked has given up meanwhile: let go of what came too late."""
        for fd in descriptors:
            os.close(fd)
        if not answer.errno:
            self.send(Closed(answer.listener))

    def _on_message(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Listened):
            self._listened(message, descriptors)
            return
        if isinstance(message, Drain):
            if self._receiver is not None and self._receiver.loop is self._loop:
                # Every offer was sent before this message: none is left behind when the servers close.
                self._receiver.drain()
            self.on_drain(message.grace, message.quick, message.keep)
        elif isinstance(message, Stopping):
            self.on_stopping()
        elif isinstance(message, Debug):
            worker = current_worker()
            assert worker is not None
            self.send(debugging.listen(message.port, worker.slot))
        elif isinstance(message, Renew):
            self.on_renew(message.tls)
        elif isinstance(message, Reopen):
            self.send(Reopened(message.number, self.on_reopen(descriptors)))
        elif isinstance(message, ShowStacks):
            self.send(Stacks(thread_names(), tasks(running_loops())))
        else:
            raise ProtocolError(f"a worker does not expect {type(message).__name__}")
        for fd in descriptors:
            os.close(fd)

    def _on_closed(self, error: ProtocolError | None) -> None:
        """The master is gone, and with it the reason to live: what the kernel's parent-death signal does, for sure."""
        os._exit(self.gone)


def _reopen_handlers(descriptors: list[int]) -> str:
    """A program has no files of ours."""
    reopen_handlers()
    return ""


def _address(answer: Listened, datagram: bool, tls: bool) -> Address:
    if isinstance(answer.sockname, str):
        return Address(answer.sockname, tls=tls)
    version = 6 if answer.family == socket.AF_INET6 else 4
    kind: int | str = f"udp{version}" if datagram else version
    return Address(str(answer.sockname[0]), int(answer.sockname[1]), kind, tls=tls)
