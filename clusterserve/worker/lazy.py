"""The lives of a handed-over connection outside of the event loop: what is served within a turn, and what waits.

Most requests are over as soon as the application has run once: the bytes are there before the descriptor arrives, and
the response fits the socket's buffer.  For those the loop never learns of the descriptor: one read, one write, and at
the end of the turn (`settle`) a close, or a way back to the master.  What goes on waits in a `watch`, which is much
cheaper than a transport of the loop for every request:

    LAZY -settle, ended-----------------> CLOSED
     ^ |--settle, request unfinished----> BUSY -client or application says something-> LAZY
     | |--settle, idle and worth keeping> KEPT -next request claimed------------------> LAZY
     | |                                    `--taken back by the master--> CLOSED
     | `--settle, anything else---------> PENDING -the loop's connection_made-> REAL -connection_lost-> CLOSED

It becomes real (`real.py`) when a write did not fit, another protocol took over (an upgrade), or there is no `watch`
and it is not over after one turn.  Where a connection is for one worker (the watch is not shared) it is BUSY between
two requests as well.
"""

from __future__ import annotations

import asyncio
import os
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from ..channel.board import IDLE, READING, RESPONDING

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

#: What both parsers send, in one piece, to a client that waits for leave to send its body.
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

#: Whom a transport that is over has for a protocol.  They refer to each other, and thousands that wait for the garbage
#: collector make a worker three times as large as it need be.
GONE: Final = asyncio.BaseProtocol()


class Phase(IntEnum):
    LAZY = 0
    PENDING = 1
    REAL = 2
    CLOSED = 3
    BUSY = 4
    KEPT = 5


# For the hot path: until Python 3.12, reading a member from its class costs ten times as much as a global.
LAZY: Final = Phase.LAZY
PENDING: Final = Phase.PENDING
REAL: Final = Phase.REAL
CLOSED: Final = Phase.CLOSED
BUSY: Final = Phase.BUSY
KEPT: Final = Phase.KEPT


class LazyTransport(asyncio.Transport):
    """What `HandedTransport` is outside of the event loop.

    Owns `fd` until the loop's transport does.  Tells `receiver.ended(id)` exactly once, after `connection_lost`'s
    moment: everything is flushed and the descriptor closed, or about to be closed by the loop.
    """

    # There are thousands.  The dictionary is made when one becomes real.
    __slots__ = (
        "__dict__", "__weakref__", "_abort", "_armed", "_closing", "_eof", "_error", "_fd", "_full", "_handed", "_id",
        "_in_busy", "_in_kept", "_known", "_limits", "_made", "_old", "_paused", "_peername", "_phase", "_pieces",
        "_place", "_protocol", "_reading", "_real", "_receiver", "_resting", "_returning", "_running", "_size",
        "_sockname", "_taken_back", "_tls", "_upgraded", "_watch",
    )  # fmt: skip

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
        self._phase = LAZY
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
        self._tls = False

    def become_real(self, **ssl: Any) -> None:
        """Hand the descriptor to the loop's own transport; `ssl` is for `loop.connect_accepted_socket`."""
        raise NotImplementedError

    # -- within a turn --------------------------------------------------------------------------------------------

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
        if self._phase is not LAZY:
            # It was over before the turn was, by the master's hand.
            return
        if not self._abort and self._pieces:
            self._flush()
        if self._paused and not self._pieces and not self._abort:
            # The kernel has taken by now what was too much before, and no transport of the loop's will ever say so.
            self.resume()
        if self._abort or self._error is not None or (self._closing and not self._pieces):
            self._finish(self._error)
        elif self._watch is None or self._pieces or self._upgraded or self._eof:
            if self._resting and self._receiver.keeping.returns_real(self._watch):
                # As soon as all is flushed.
                self._returning = self._closing = True
            self.become_real()
        elif self._resting and not self._receiver.keeping.keeps:
            self._returning = True
            self._finish(None)
        elif self._resting and self._watch.shared:
            self._keep(self._watch)
        else:
            self._stay(self._watch)

    def _stay(self, watch: Watch) -> None:
        """Wait for the client, or the application, to say more."""
        self._phase = BUSY
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

    # -- between turns --------------------------------------------------------------------------------------------

    def _keep(self, watch: Watch) -> None:
        """Wait for the next request where the master can take it back."""
        self._phase = KEPT
        self._receiver.marks[self._place] = IDLE
        if self._armed:
            watch.pause(self._fd)
            self._armed = False
        if self._known:
            self._ran()
            self.arm_kept()
        else:
            # Armed when the master has been told: it must know what it may claim.
            self._known = True
            self._receiver.keep(self._id, self)
            self._receiver.answers.kept(self._id, self._fd, self)

    def arm_kept(self) -> None:
        """The master has been told, or may have disarmed it by mistake."""
        if self._phase is KEPT and self._watch is not None:
            try:
                self._watch.keep(self._fd, self, self._in_kept)
            except OSError:
                # No room for its entry: the master can wait for it.
                self.give_back()
            else:
                self._in_kept = True

    def claimed(self) -> None:
        """The next request is here, and nobody else's."""
        if self._phase is not KEPT:
            # It is on its way back to the master, and the request with it: reading it now would lose it.
            return
        receiver = self._receiver
        if receiver.keeping.crowds and not receiver.keeping.has_room():
            self.give_back()
            return
        self._running = True
        self._old = False
        receiver.running += 1
        receiver.marks[self._place] = READING
        self._phase = LAZY
        receiver.settle_later(self)
        self._read()

    def readable(self) -> None:
        """The client says more, or leaves."""
        watch = self._watch
        assert watch is not None
        if watch.shared:
            self._armed = False
        # A turn that ends it may be on its way: what is to be read then is for whoever has it next.
        if self._phase is BUSY:
            if self._reading:
                if self._resting:
                    if self._receiver.keeping.crowds and not self._receiver.keeping.has_room():
                        # Somebody else may have a free thread, or will have one first.
                        self.give_back()
                        return
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
            if self._resting:
                self._receiver.marks[self._place] = IDLE
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
        if self._phase is BUSY or self._phase is KEPT:
            self._phase = LAZY
            self._receiver.settle_later(self)

    def rest(self) -> None:
        """The response is complete and nothing beyond its request was read: keep the connection, or give it back."""
        watch = self._watch
        if watch is None or self._phase is PENDING or self._phase is REAL:
            if self._receiver.keeping.returns_real(watch):
                self.give_back()
        else:
            self._resting = True
            if self._phase is not LAZY:
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
        if self._phase is KEPT:
            self.give_back()

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

    def lost(self) -> None:
        """The master has taken it back, with the request that lay unread: close our copy, it is over for us."""
        self._taken_back = True
        self._finish(None)

    # -- the descriptor -------------------------------------------------------------------------------------------

    def _leave_watch(self) -> None:
        if self._in_kept or self._in_busy:
            assert self._watch is not None
            self._watch.forget(self._fd, self._in_kept, self._in_busy)
            self._in_kept = self._in_busy = self._armed = False

    def _ran(self) -> None:
        """No request is in progress any more, of those on connections that are kept."""
        if self._running:
            self._running = False
            self._receiver.running -= 1

    def _flush(self) -> None:
        """Write what the kernel takes now."""
        pieces = self._pieces
        self._receiver.marks[self._place] = RESPONDING
        interim = pieces[0] == CONTINUE and len(pieces) == 1
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
            if interim:
                # No answer yet, should this worker die while the client sends the body.
                self._receiver.marks[self._place] = READING
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
        """Nobody else can do anything for it any more; said after the last mark, whose place is another's then.

        One of a server that is not HTTP, which has no watch, was taken when its protocol got it.
        """
        if self._watch is not None:
            self._ran()
            self._receiver.taken(self._id)

    def resume(self) -> None:
        """There is room again for what the protocol writes."""
        self._full = False
        if self._paused:
            self._paused = False
            try:
                self._protocol.resume_writing()
            except Exception as exc:  # noqa: BLE001 - the user's protocol; the other connections of this turn must go on
                self._receiver.fault(exc, "protocol")

    def _finish(self, error: Exception | None) -> None:
        self._phase = CLOSED
        self._closing = True
        self._leave_watch()
        self._ran()
        os.close(self._fd)
        if self._taken_back:
            self._receiver.dropped(self._id)
        else:
            self._receiver.ended(self._id, returned=self._returning and error is None)
        try:
            self._protocol.connection_lost(error)
        except Exception as exc:  # noqa: BLE001 - the user's protocol; the other connections of this turn must go on
            self._receiver.fault(exc, "protocol")
        self._protocol = GONE
