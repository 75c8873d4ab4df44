"""The transport of a handed-over connection: lazy while it lasts, one of the event loop's when it must be.

Most requests are over as soon as the application has run once: the bytes are there before the descriptor arrives, and
the response fits the socket's buffer.  For those the loop never learns of the descriptor: one read, one write, and at
the end of the turn (`settle`) a close, or a way back to the master.  What goes on becomes a transport of the event
loop, and from then on this object only passes on: what the loop's transport does best, it does.

With a `watch` (HTTP where connections are borrowed) a connection that goes on may wait in an epoll instead, which is
much cheaper than a transport of the loop for every request:

    LAZY -settle, ended-----------------> CLOSED
     ^ |--settle, request unfinished----> BUSY -client or application says something-> LAZY
     | |--settle, idle and worth keeping> KEPT -next request claimed------------------> LAZY
     | |                                    `--taken back by the master--> CLOSED
     | `--settle, anything else---------> PENDING -the loop's connection_made-> REAL -connection_lost-> CLOSED

It becomes real when a write did not fit, another protocol took over (an upgrade), or there is no `watch` and it is not
over after one turn.  Where a connection is for one worker (the watch is not shared) it is BUSY between two requests as
well.
"""

from __future__ import annotations

import asyncio
import os
import socket
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, cast

from ..channel.board import IDLE, READING, RESPONDING, UNKNOWN

if TYPE_CHECKING:
    from .receiver import Receiver
    from .watch import Watch

#: What is read at once.
CHUNK: Final = 65536

#: Bytes written but not yet taken by the kernel, above which the protocol is told to pause (asyncio's own default).
HIGH_WATER: Final = 65536

#: Up to this many bytes a copy is cheaper than a `writev`.
_JOINED: Final = 16384

#: One `writev` takes at most this many pieces (IOV_MAX on Linux is 1024).
_MAX_PIECES: Final = 512


class Phase(IntEnum):
    LAZY = 0
    PENDING = 1
    REAL = 2
    CLOSED = 3
    BUSY = 4
    KEPT = 5


class HandedTransport(asyncio.Transport):
    """An `asyncio.Transport` over a descriptor that the master handed over.

    Owns `fd` until the loop's transport does.  Tells `receiver.ended(id)` exactly once, after `connection_lost`'s
    moment: everything is flushed and the descriptor closed, or about to be closed by the loop.
    """

    def __init__(
        self,
        receiver: Receiver,
        id: int,
        fd: int,
        protocol: asyncio.Protocol,
        peername: tuple[str, int] | None,
        sockname: tuple[str, int] | str | None,
        place: int = 0,
        watch: Watch | None = None,
    ) -> None:
        # Not calling BaseTransport.__init__: it makes a dictionary that get_extra_info below does without.
        self._receiver = receiver
        self._id = id
        self._fd = fd
        self._protocol: asyncio.BaseProtocol = protocol
        self._peername = peername
        self._sockname = sockname
        self._phase = Phase.LAZY
        self._made = False
        self._closing = False
        self._abort = False
        self._returning = False
        self._taken_back = False
        self._reading = True
        self._eof = False
        self._paused = False
        self._full = False
        self._limits: tuple[int | None, int | None] | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._error: OSError | None = None
        self._real: asyncio.Transport | None = None
        # With a watch: whether it has been in either epoll, and whether it is to be told there of what is readable.
        self._place = place
        self._watch = watch
        self._in_kept = False
        self._in_busy = False
        self._armed = False
        #: The last response is complete and nothing beyond its request was read.
        self._resting = False
        #: The master knows that it is kept; of those, it serves a request now.
        self._known = False
        self._running = False
        #: Idle at the last look for such.
        self._old = False
        self._upgraded = False

    @property
    def loops_own(self) -> asyncio.Transport:
        """The loop's transport behind this one, for what only that can do.  Raises RuntimeError without one."""
        if self._real is None:
            raise RuntimeError(f"{self!r} has no transport of the event loop yet")
        return self._real

    #: `asyncio.BaseEventLoop.start_tls` asks for it.
    _start_tls_compatible = True

    def _force_close(self, exc: BaseException | None) -> None:
        """What asyncio's TLS does to the transport below it when something is beyond repair."""
        self.abort()

    # -- the lazy life --------------------------------------------------------------------------------------------

    def begin(self, data: bytes) -> None:
        """Give the protocol its connection and the first bytes."""
        self._made = True
        self._protocol.connection_made(self)
        if not self._closing:
            # Also if it has paused reading, which no HTTP protocol does here: they are read already.
            protocol: Any = self._protocol
            protocol.data_received(data)

    def settle(self) -> None:
        """The turn is over: end what is finished, give the loop what is not."""
        if self._phase is not Phase.LAZY:
            # It was over before the turn was, by the master's hand.
            return
        if not self._abort and self._pieces:
            self._flush()
        if self._paused and not self._pieces and not self._abort:
            # The kernel has taken by now what was too much before, and no transport of the loop's will ever say so.
            self._resume()
        if self._abort or self._error is not None or (self._closing and not self._pieces):
            self._finish(self._error)
        elif self._watch is None or self._pieces or self._upgraded or self._eof:
            if self._resting and (self._watch is None or self._watch.shared or not self._receiver.keeps):
                # As soon as all is flushed.
                self._returning = self._closing = True
            self.become_real()
        elif self._resting and not self._receiver.keeps:
            self._returning = True
            self._finish(None)
        elif self._resting and self._watch.shared:
            self._keep(self._watch)
        else:
            self._stay(self._watch)

    def _stay(self, watch: Watch) -> None:
        """Wait for the client, or the application, to say more."""
        self._phase = Phase.BUSY
        self._receiver.keep(self._id, self)
        if self._resting:
            self._receiver.marks[self._place] = IDLE
        if self._reading and not self._armed:
            try:
                watch.watch(self._fd, self, self._in_busy)
            except OSError:
                # No room for its entry: the loop may have more luck, or ends it.
                self.become_real()
            else:
                self._in_busy = self._armed = True

    # -- between turns, without the loop --------------------------------------------------------------------------

    def _keep(self, watch: Watch) -> None:
        """Wait for the next request where the master can take it back."""
        self._phase = Phase.KEPT
        self._receiver.marks[self._place] = IDLE
        if self._armed:
            watch.pause(self._fd)
            self._armed = False
        if self._known:
            if self._running:
                self._running = False
                self._receiver.counters[1] -= 1
            self.arm_kept()
        else:
            # Armed when the master has been told: it must know what it may claim.
            self._known = True
            self._receiver.keep(self._id, self)
            self._receiver.tell_kept(self._id, self._fd, self)

    def arm_kept(self) -> None:
        """The master has been told, or may have disarmed it by mistake."""
        if self._phase is Phase.KEPT and self._watch is not None:
            try:
                self._watch.keep(self._fd, self, self._in_kept)
            except OSError:
                # No room for its entry: the master can wait for it.
                self.give_back()
            else:
                self._in_kept = True

    def claimed(self) -> None:
        """The next request is here, and nobody else's."""
        if self._phase is not Phase.KEPT:
            # It is on its way back to the master, and the request with it: reading it now would lose it.
            return
        self._running = True
        self._old = False
        self._receiver.counters[1] += 1
        self._receiver.marks[self._place] = READING
        self._wake()
        self._read()

    def readable(self) -> None:
        """The client says more, or leaves."""
        watch = self._watch
        assert watch is not None
        if watch.shared:
            self._armed = False
        # A turn that ends it may be on its way: what is to be read then is for whoever has it next.
        if self._phase is Phase.BUSY:
            if self._reading:
                if self._resting:
                    # Before it is read, as the board wants it.
                    self._receiver.marks[self._place] = READING
                self._wake()
                self._read()
            elif self._armed:
                watch.pause(self._fd)
                self._armed = False

    def _read(self) -> None:
        """Read once and tell the protocol."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            # There was nothing after all.
            return
        except OSError as exc:
            self._error = exc
            return
        protocol: Any = self._protocol
        resting, self._resting = self._resting, False
        try:
            if data:
                protocol.data_received(data)
                return
            if resting:
                # Between two requests the client has left: nothing was asked that a dead worker would owe an answer.
                self._receiver.marks[self._place] = IDLE
            if protocol.eof_received():
                self._reading = False
            else:
                self.close()
        except Exception as exc:  # noqa: BLE001 - the user's protocol; as a loop's transport does
            self._receiver.fault(exc, "protocol")
            self.abort()

    def _wake(self) -> None:
        """Back to the lazy life, if it waits outside of it: what happens now is settled at the end of the turn."""
        if self._phase is Phase.BUSY or self._phase is Phase.KEPT:
            self._phase = Phase.LAZY
            self._receiver.settle_later(self)

    def rest(self) -> None:
        """The response is complete and nothing beyond its request was read: keep the connection, or give it back."""
        watch = self._watch
        if watch is None or self._phase is Phase.PENDING or self._phase is Phase.REAL:
            if watch is None or watch.shared or not self._receiver.keeps:
                self.give_back()
        else:
            self._resting = True
            self._wake()
            if self._pieces and not self._abort:
                # The client need not wait for what else the loop has to run before this turn ends.
                self._flush()
                if not self._pieces and self._error is None:
                    # Nor need it fear for its next request, should this worker die meanwhile.
                    self._receiver.marks[self._place] = IDLE

    def grow_old(self) -> None:
        """Called from time to time: what has had no request since the last time goes back to the master."""
        if self._old:
            self.give_back_if_kept()
        else:
            self._old = True

    def give_back_if_kept(self) -> None:
        """Give it back if it is between two requests."""
        if self._phase is Phase.KEPT:
            self.give_back()

    def lost(self) -> None:
        """The master has taken it back, with the request that lay unread: close our copy, it is over for us."""
        self._taken_back = True
        self._finish(None)

    def _leave_watch(self) -> None:
        if self._in_kept or self._in_busy:
            assert self._watch is not None
            self._watch.forget(self._fd, self._in_kept, self._in_busy)
            self._in_kept = self._in_busy = self._armed = False
        if self._running:
            self._running = False
            self._receiver.counters[1] -= 1

    def _flush(self) -> None:
        """Write what the kernel takes now."""
        pieces = self._pieces
        self._receiver.marks[self._place] = RESPONDING
        try:
            if len(pieces) > 1 and self._size > _JOINED:
                sent = os.writev(self._fd, pieces[:_MAX_PIECES])
            else:
                sent = os.write(self._fd, b"".join(pieces) if len(pieces) > 1 else pieces[0])
        except BlockingIOError:
            return
        except OSError as exc:
            self._error = exc
            pieces.clear()
            self._size = 0
            return
        self._size -= sent
        if not self._size:
            pieces.clear()
            return
        whole = 0
        for piece in pieces:
            if sent < len(piece):
                break
            sent -= len(piece)
            whole += 1
        del pieces[:whole]
        if sent:
            pieces[0] = pieces[0][sent:]

    def _take(self) -> None:
        """Nobody else can do anything for it any more; said after the last mark, whose place is another's then."""
        if self._watch is not None:
            self._receiver.taken(self._id)

    def _finish(self, error: Exception | None) -> None:
        self._phase = Phase.CLOSED
        self._closing = True
        self._leave_watch()
        os.close(self._fd)
        if self._taken_back:
            self._receiver.dropped(self._id)
        else:
            self._receiver.ended(self._id, returned=self._returning and error is None)
        try:
            self._protocol.connection_lost(error)
        except Exception as exc:  # noqa: BLE001 - the user's protocol; the other connections of this turn must go on
            self._receiver.fault(exc, "protocol")

    # -- becoming real --------------------------------------------------------------------------------------------

    def become_real(self, **ssl: Any) -> None:
        """Hand the descriptor to the loop's own transport; `ssl` is for `loop.connect_accepted_socket`."""
        self._phase = Phase.PENDING
        self._leave_watch()
        self._receiver.marks[self._place] = UNKNOWN
        self._receiver.keep(self._id, self)
        if self._upgraded:
            self._take()
        # All three are asked from the kernel: asyncio sets TCP_NODELAY only on a socket whose `proto` says TCP.
        sock = socket.socket(fileno=self._fd)
        loop = self._receiver.loop
        wires: list[_Wire] = []

        def factory() -> Any:
            wires.append(_wire(self))
            return wires[0]

        def connected(task: asyncio.Task[Any]) -> None:
            if not wires:
                # The loop never got to making a transport, which would own it.
                sock.close()
            self._connected(task)

        loop.create_task(loop.connect_accepted_socket(factory, sock, **ssl)).add_done_callback(connected)

    def _connected(self, task: asyncio.Task[Any]) -> None:
        """The loop is done with connecting: only failures (a TLS handshake, a loop that is closing) are news."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, OSError):
            # Not the client's fault: what the factory has made is no protocol.
            self._receiver.fault(error, "protocol")
        if task.cancelled() or error is not None:
            self._lost(error if isinstance(error, Exception) else None)

    def _adopt(self, real: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
        """The loop's transport is there: what happened meanwhile happens to it now, then it takes over."""
        self._phase = Phase.REAL
        self._real = real
        if protocol is not self._protocol:
            real.set_protocol(_wire(self))
        if self._limits is not None:
            real.set_write_buffer_limits(*self._limits)
        # Instance attributes in front of the methods: from here on a call goes straight to the loop's transport.
        for name in ("is_closing", "close", "abort"):
            setattr(self, name, getattr(real, name))
        if not self._closing:
            # Else what is written is dropped here, whatever the loop's transport does with it after `close`.
            for name in ("write", "writelines", "write_eof", "can_write_eof"):
                setattr(self, name, getattr(real, name))
        if not self._made:
            self._made = True
            self._receiver.made(self._id)
            try:
                self._protocol.connection_made(self)
            except Exception as exc:  # noqa: BLE001 - the user's protocol; uvloop would leave it there, never read
                self._receiver.fault(exc, "protocol")
                self._abort = True
        if self._pieces:
            real.write(b"".join(self._pieces))
            self._pieces.clear()
        if not self._full:
            # The loop's transport has taken it all: what the protocol writes now goes behind it.
            self._resume()
        if self._abort:
            real.abort()
        elif self._closing:
            real.close()
        else:
            if self._eof:
                real.write_eof()
            if self._reading:
                self._adopt_reading()
            else:
                # A turn later: uvloop begins to read behind `connection_made`, whatever that has said.
                self._receiver.loop.call_soon(self._adopt_reading)

    def _adopt_reading(self) -> None:
        real = cast("asyncio.Transport", self._real)
        for name in ("pause_reading", "resume_reading", "is_reading"):
            setattr(self, name, getattr(real, name))
        if not self._reading and not real.is_closing():
            real.pause_reading()

    def _pause(self) -> None:
        """The loop's transport has too much to write; the protocol may have been told already."""
        self._full = True
        if not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _resume(self) -> None:
        self._full = False
        if self._paused:
            self._paused = False
            self._protocol.resume_writing()

    def _lost(self, error: Exception | None) -> None:
        if self._phase is Phase.CLOSED:
            return
        self._phase = Phase.CLOSED
        self._closing = True
        self._receiver.ended(self._id, returned=self._returning and error is None and not self._upgraded)
        if self._made:
            self._protocol.connection_lost(error)

    # -- asyncio.Transport, until it is real ----------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data or self._closing or self._eof:
            return
        # What may change under us is copied, as asyncio does.
        self._pieces.append(data if isinstance(data, bytes) else bytes(data))
        self._size += len(data)
        if self._phase is Phase.BUSY:
            self._wake()
        if self._size > HIGH_WATER and not self._paused:
            if self._phase is Phase.LAZY:
                self._flush()
            if self._size > HIGH_WATER:
                self._paused = True
                self._protocol.pause_writing()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake()
        if self._phase is Phase.LAZY and self._pieces:
            # The client need not wait for the other requests of this turn.
            self._flush()

    def give_back(self) -> None:
        """Close our descriptor only, when everything is flushed: the connection stays open in the master.

        For a connection that is idle: nothing was read beyond its last response.
        """
        self._returning = True
        self.close()

    def cut(self) -> None:
        """Abort, also what is being given back: what is not flushed never will be, so the connection is over."""
        self._returning = False
        self.abort()

    def abort(self) -> None:
        self._closing = self._abort = True
        self._pieces.clear()
        self._size = 0
        self._wake()

    def is_closing(self) -> bool:
        return self._closing

    def write_eof(self) -> None:
        self._eof = True
        self._wake()

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        if self._phase is Phase.BUSY and not self._armed and self._watch is not None:
            self._stay(self._watch)

    def is_reading(self) -> bool:
        return self._reading and not self.is_closing()

    # -- asyncio.Transport, always --------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return default if self._peername is None else self._peername
        if name == "sockname":
            # Once it is closed, its number may be somebody else's.
            if self._sockname is None and self._phase is not Phase.CLOSED:
                self._sockname = _sockname(self._fd)
            return default if self._sockname is None else self._sockname
        return default if self._real is None else self._real.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if not self._upgraded:
            self._upgraded = True
            if self._phase is Phase.PENDING or self._phase is Phase.REAL:
                self._take()
        self._wake()
        self._protocol = protocol
        if self._real is not None:
            # A new wire, because loops remember the bound methods of the protocol they were given.
            self._real.set_protocol(_wire(self))

    def get_write_buffer_size(self) -> int:
        return self._size if self._real is None else self._real.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return (HIGH_WATER // 4, HIGH_WATER) if self._real is None else self._real.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._real is None:
            self._limits = (high, low)
        else:
            self._real.set_write_buffer_limits(high, low)

    def __repr__(self) -> str:
        return f"<HandedTransport connection {self._id} {self._phase.name}>"


class _Wire(asyncio.BaseProtocol):
    """Between the loop's transport and the user's protocol, out of the way of the data."""

    #: What goes straight to the user's protocol.
    straight: tuple[str, ...]

    def __init__(self, handed: HandedTransport) -> None:
        self._handed = handed
        self._protocol = handed.get_protocol()
        for name in self.straight:
            setattr(self, name, getattr(self._protocol, name))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._handed._adopt(cast("asyncio.Transport", transport), self._protocol)

    def pause_writing(self) -> None:
        self._handed._pause()

    def resume_writing(self) -> None:
        self._handed._resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handed._lost(exc)


class _StreamWire(_Wire, asyncio.Protocol):
    straight = ("data_received", "eof_received")


class _BufferedWire(_Wire, asyncio.BufferedProtocol):
    straight = ("get_buffer", "buffer_updated", "eof_received")


def _wire(handed: HandedTransport) -> _Wire:
    return (_BufferedWire if isinstance(handed.get_protocol(), asyncio.BufferedProtocol) else _StreamWire)(handed)


def _sockname(fd: int) -> tuple[str, int] | str | None:
    """The local address of a connection to a wildcard listener, in the shape of `peername`."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        name = sock.getsockname()
    return (name[0], name[1]) if isinstance(name, tuple) else name
