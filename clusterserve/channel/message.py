"""The message channel: a SOCK_STREAM socketpair with framed messages, both ends alike.

Reads and writes when its event loop says so; never blocks.  What does not fit the kernel's buffer waits here, and a
descriptor that waits is a copy of ours.  EOF and ECONNRESET are the same event: the end, reported once, after
everything that had arrived before it.

The program's own messages go the same way in pieces, and what master and worker say to each other overtakes them
between two pieces.  Nobody here looks into them.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ..core.envelope import Assembler, Envelope, cut
from ..core.messages import Decoder, Message, decode, encode
from ..errors import ProtocolError
from .descriptors import MAX_DESCRIPTORS, SPACE, Arrived, Riders, copied

_CHUNK: Final = 65536

#: Reads in one turn of the loop: more than the kernel keeps of a sender that is gone, and an end with one that goes on.
_READS: Final = 64

#: Reads when the sender has exited.
_LAST_READS: Final = 4096

#: Bytes read, or written, in one turn of the loop: a message of the program's may be long, and nobody waits for it.
_TURN: Final = 1 << 19

#: What says that the kernel has no room now, although the socket may be writable: memory, or too many descriptors that
#: are under way between processes.
_SCARCE: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})

#: Nobody tells when there is room again: it is tried after so long (seconds).
RETRY: Final = 0.05

OnMessage = Callable[[Message, list[int]], None]
OnClosed = Callable[[ProtocolError | None], None]
OnEnvelope = Callable[[Envelope, Riders], None]


class _Parcel:
    """A message of the program's on its way out.  Owns its descriptors until they are sent."""

    __slots__ = ("done", "fds", "frames", "next")

    def __init__(self, frames: Iterator[bytes], fds: list[int], done: Callable[[bool], None]) -> None:
        self.frames = frames
        self.fds = fds
        self.done = done
        #: Its next frame; None when all are sent.
        self.next = next(frames, None)


def _ignore(sent: bool) -> None:
    """Who sends one of ours does not ask."""


class MessageChannel:
    """One end.  Owns its socket.

    `on_message(message, descriptors)` gets each message; the descriptors are the callee's to
    close.  `on_envelope(envelope, riders)` gets those of the program; without it, they cannot be.
    `on_closed(error)` is called once, on EOF (None) or on a frame that cannot be (the error); not after `close`.
    All of it is for the loop's thread, but for `post` and `finish`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_message: OnMessage,
        on_closed: OnClosed,
        on_envelope: OnEnvelope | None = None,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._on_envelope = on_envelope
        self._decoder = Decoder()
        self._assembler = Assembler()
        #: Descriptors that no frame has claimed, and those of a message of the program's that is not whole yet.
        self._arrived = Arrived()
        self._riders = Riders([])
        # What waits, by the order in which it leaves: the rest of a frame, our messages, the program's.  The lock is
        # over all writing, because a program may `post` from any thread, and end right after.
        self._lock = threading.RLock()
        self._rest: memoryview | None = None
        self._waiting: deque[tuple[memoryview, list[int]]] = deque()
        self._parcels: deque[_Parcel] = deque()
        #: Nobody reads any more.
        self._broken = False
        self._scarce = False
        self._retry: asyncio.TimerHandle | None = None
        self._again: asyncio.Handle | None = None
        self._open = True
        sock.setblocking(False)
        loop.add_reader(sock, self._read)

    @property
    def is_open(self) -> bool:
        return self._open

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send or queue; False if the channel is closed.  The caller keeps its descriptors.

        At our own descriptor limit a message that must wait goes without the descriptors, of which no copy can be kept:
        its receiver sees that they are missing, as at its own limit.
        """
        with self._lock:
            if not self._open:
                return False
            frame = memoryview(encode(message, len(descriptors)))
            if not self._waiting and self._rest is None:
                sent = self._write(frame, list(descriptors))
                if sent == len(frame):
                    return self._open
                self._await_room()
                if sent:
                    # The descriptors travelled with the first byte.
                    self._rest = frame[sent:]
                    return self._open
            copies = copied(descriptors)
            if len(copies) < len(descriptors):
                # Announcing them would claim those of the next message.
                frame = memoryview(encode(message))
            self._waiting.append((frame, copies))
            return self._open

    def send_in_line(self, message: Message) -> bool:
        """Send it behind everything that was posted, instead of before; False if the channel is closed."""
        if self._open:
            self._queue(_Parcel(iter([encode(message)]), [], _ignore))
        return self._open

    def post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None] = _ignore) -> None:
        """Send a message of the program's; any thread may.  Takes the descriptors over.

        `done(True)` is called when the kernel has all of it, `done(False)` if the channel closes before, on any thread.
        """
        self._queue(_Parcel(cut(envelope, len(descriptors)), descriptors, done))

    def _queue(self, parcel: _Parcel) -> None:
        with self._lock:
            if self._open:
                idle = not self._parcels and not self._waiting and self._rest is None
                self._parcels.append(parcel)
                finished = self._push() if idle else []
                if idle and self._parcels:
                    # We may be on another thread; if the loop is closed, it waits for `finish`.
                    with contextlib.suppress(RuntimeError):
                        self._loop.call_soon_threadsafe(self._flush)
            else:
                finished = [(parcel, False)]
        _tell(finished)

    def finish(self, within: float) -> None:
        """Send what waits, also when the loop does not run any more; blocks for so many seconds at most."""
        deadline = time.monotonic() + within
        while True:
            with self._lock:
                finished = self._push() if self._open else []
                left = deadline - time.monotonic()
                waits = self._open and not self._broken and self._waits and left > 0
                scarce, self._scarce = self._scarce, False
            _tell(finished)
            if not waits:
                return
            if scarce:
                time.sleep(min(RETRY, left))
            else:
                select.select([], [self._sock], [], left)

    @property
    def _waits(self) -> bool:
        return bool(self._rest is not None or self._waiting or self._parcels)

    def close(self) -> None:
        """Close now; what waits is dropped, and nobody is told."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            for handle in (self._retry, self._again):
                if handle is not None:
                    handle.cancel()
            self._sock.close()
            for fd in (fd for _, copies in self._waiting for fd in copies):
                os.close(fd)
            self._riders.close()
            self._arrived.close()
            self._waiting.clear()
            self._rest = None
            dropped = self._drop_parcels()
        _tell(dropped)

    def _drop_parcels(self) -> list[tuple[_Parcel, bool]]:
        dropped = [(parcel, False) for parcel in self._parcels]
        self._parcels.clear()
        return dropped

    def drain(self) -> None:
        """Deliver everything that has arrived: its sender has exited, and what it said last counts."""
        # The kernel keeps some hundred pieces at most; what a grandchild goes on writing nobody waits for.
        for _ in range(_LAST_READS):
            if not self._open or not self._receive():
                return

    def _read(self) -> None:
        # Not one read a turn: uvloop looks away from a socket after telling once of an error, and a sender that went
        # without reading everything is one (ECONNRESET, behind what it had sent).
        self._again = None
        left = _TURN
        for _ in range(_READS):
            if not self._open or not (received := self._receive()):
                return
            left -= received
            if left <= 0:
                break
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def _receive(self) -> int:
        """One read: how much there was; 0 if nothing was there."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_CHUNK, SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            self._end(None)
            return 1
        self._arrived.add(ancillary, flags)
        if not data:
            self._end(None)
            return 1
        try:
            for kind, body, count in self._decoder.frames(data, users=self._on_envelope is not None):
                if kind:
                    self._assemble(kind, body, count)
                else:
                    message = decode(body)
                    self._on_message(message, self._arrived.claim(count))
                if not self._open:
                    return len(data)
            if len(self._arrived) > MAX_DESCRIPTORS:
                raise ProtocolError(f"{len(self._arrived)} descriptors that no message announces")
        except ProtocolError as exc:
            self._end(exc)
        return len(data)

    def _assemble(self, kind: int, body: bytes, count: int) -> None:
        """A piece of a message of the program's."""
        if self._assembler.between:
            claimed = self._arrived.claim(count)
            self._riders = Riders(claimed, count - len(claimed))
        elif count:
            raise ProtocolError("descriptors in the midst of a message")
        envelope = self._assembler.add(kind, body)
        if envelope is not None and self._on_envelope is not None:
            riders, self._riders = self._riders, Riders([])
            self._on_envelope(envelope, riders)

    def _write(self, frame: memoryview, descriptors: list[int]) -> int:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            return self._sock.sendmsg([frame], ancillary)
        except BlockingIOError:
            return 0
        except (BrokenPipeError, ConnectionResetError):
            # The reader finds out, after it has drained what is still there to read.
            self._broken = True
            return len(frame)
        except OSError as exc:
            if exc.errno not in _SCARCE:
                raise
            self._scarce = True
            return 0

    def _await_room(self) -> None:
        """Go on when there is room."""
        if self._scarce:
            # The loop would call at once, and again and again.
            self._scarce = False
            self._loop.remove_writer(self._sock)
            self._retry = self._loop.call_later(RETRY, self._flush)
        else:
            self._loop.add_writer(self._sock, self._flush)

    def _flush(self) -> None:
        with self._lock:
            if not self._open:
                return
            finished = self._push()
            if self._waits:
                self._await_room()
            else:
                self._loop.remove_writer(self._sock)
        _tell(finished)

    def _push(self) -> list[tuple[_Parcel, bool]]:
        """Write until the kernel has enough, or has had enough for one turn; returns the parcels that are done with."""
        finished: list[tuple[_Parcel, bool]] = []
        left = _TURN
        while left > 0:
            parcel = None
            copies: list[int] = []
            if self._rest is not None:
                frame = self._rest
            elif self._waiting:
                frame, copies = self._waiting[0]
            elif self._broken:
                finished += self._drop_parcels()
                break
            elif self._parcels:
                parcel = self._parcels[0]
                if parcel.next is None:
                    finished.append((self._parcels.popleft(), True))
                    continue
                frame, copies = memoryview(parcel.next), parcel.fds
            else:
                break
            sent = self._write(frame, copies)
            if not sent:
                break
            left -= sent
            rest = frame[sent:] if sent < len(frame) else None
            if self._rest is not None:
                self._rest = rest
                continue
            self._rest = rest
            for fd in copies:
                os.close(fd)
            if parcel is None:
                self._waiting.popleft()
            else:
                parcel.fds = []
                parcel.next = next(parcel.frames, None)
        return finished

    def _end(self, error: ProtocolError | None) -> None:
        if self._open:
            self.close()
            self._on_closed(error)


def _tell(finished: list[tuple[_Parcel, bool]]) -> None:
    """Not under the lock: whoever hears of it may send the next one."""
    for parcel, sent in finished:
        for fd in parcel.fds:
            os.close(fd)
        parcel.done(sent)
