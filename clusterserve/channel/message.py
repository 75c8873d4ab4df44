"""The message channel: a SOCK_STREAM socketpair with framed messages, both ends alike.

Reads and writes when its event loop says so; never blocks.  What does not fit the kernel's buffer waits here, and a
descriptor that waits is a copy of ours.  EOF and ECONNRESET are the same event: the end, reported once, after
everything that had arrived before it.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..core.messages import Decoder, Message, decode, encode
from ..errors import ProtocolError

#: Descriptors that may ride with one message.
MAX_DESCRIPTORS: Final = 16

_CHUNK: Final = 65536
_SPACE: Final = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)

#: Reads in one turn of the loop: more than the kernel keeps of a sender that is gone, and an end with one that goes on.
_READS: Final = 64

#: What says that the kernel has no room now, although the socket may be writable: memory, or too many descriptors that
#: are under way between processes.
_SCARCE: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})

#: Nobody tells when there is room again: it is tried after so long (seconds).
RETRY: Final = 0.05

#: What says that a descriptor cannot be copied.
_NO_COPY: Final = frozenset({errno.EMFILE, errno.ENFILE})

#: Among the descriptors that have arrived: here some were lost at our descriptor limit, all of one message.
_LOST: Final = -1

OnMessage = Callable[[Message, list[int]], None]
OnClosed = Callable[[ProtocolError | None], None]


class MessageChannel:
    """One end.  Owns its socket.

    `on_message(message, descriptors)` gets each message; the descriptors are the callee's to
    close.  `on_closed(error)` is called once, on EOF (None) or on a frame that cannot be (the error); not after
    `close`.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, on_message: OnMessage, on_closed: OnClosed
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder = Decoder()
        self._arrived: deque[int] = deque()
        self._waiting: deque[tuple[memoryview, list[int]]] = deque()
        self._scarce = False
        self._retry: asyncio.TimerHandle | None = None
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
        if not self._open:
            return False
        frame = memoryview(encode(message, len(descriptors)))
        if not self._waiting:
            sent = self._write(frame, list(descriptors))
            if sent == len(frame):
                return self._open
            if sent:
                # The descriptors travelled with the first byte.
                frame, descriptors = frame[sent:], ()
            self._await_room()
        copies = _copies(descriptors)
        if len(copies) < len(descriptors):
            # Announcing them would claim those of the next message.
            frame = memoryview(encode(message))
        self._waiting.append((frame, copies))
        return self._open

    def close(self) -> None:
        """Close now; what waits is dropped, and nobody is told."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        if self._retry is not None:
            self._retry.cancel()
        self._sock.close()
        for fd in (*self._arrived, *(fd for _, copies in self._waiting for fd in copies)):
            if fd != _LOST:
                os.close(fd)
        self._arrived.clear()
        self._waiting.clear()

    def drain(self) -> None:
        """Deliver everything that has arrived: its sender has exited, and what it said last counts."""
        while self._open and self._receive():
            pass

    def _read(self) -> None:
        # Not one read a turn: uvloop looks away from a socket after telling once of an error, and a sender that went
        # without reading everything is one (ECONNRESET, behind what it had sent).
        for _ in range(_READS):
            if not self._open or not self._receive():
                return

    def _receive(self) -> bool:
        """One read; False if nothing was there."""
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(_CHUNK, _SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            self._end(None)
            return True
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds: array.array[int] = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._arrived.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self._arrived.append(_LOST)
        if not data:
            self._end(None)
            return True
        try:
            for body, count in self._decoder.feed(data):
                message = decode(body)
                self._on_message(message, self._claim(count))
                if not self._open:
                    return True
            if len(self._arrived) > MAX_DESCRIPTORS:
                raise ProtocolError(f"{len(self._arrived)} descriptors that no message announces")
        except ProtocolError as exc:
            self._end(exc)
        return True

    def _claim(self, count: int) -> list[int]:
        """The descriptors of a message; fewer than announced if our limit was hit, which the receiver sees."""
        claimed: list[int] = []
        while len(claimed) < count and self._arrived:
            fd = self._arrived.popleft()
            if fd == _LOST:
                break
            claimed.append(fd)
        return claimed

    def _write(self, frame: memoryview, descriptors: list[int]) -> int:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            return self._sock.sendmsg([frame], ancillary)
        except BlockingIOError:
            return 0
        except (BrokenPipeError, ConnectionResetError):
            # The reader finds out, after it has drained what is still there to read.
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
        while self._waiting:
            frame, copies = self._waiting[0]
            sent = self._write(frame, copies)
            if not sent:
                self._await_room()
                return
            for fd in copies:
                os.close(fd)
            if sent < len(frame):
                self._waiting[0] = (frame[sent:], [])
                self._await_room()
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._sock)

    def _end(self, error: ProtocolError | None) -> None:
        if self._open:
            self.close()
            self._on_closed(error)


def _copies(descriptors: Sequence[int]) -> list[int]:
    """Copies of them all, or none if there is no room for them."""
    copies: list[int] = []
    try:
        for fd in descriptors:
            copies.append(os.dup(fd))  # noqa: PERF401 - those that were made before it fails must be closed
    except OSError as exc:
        for fd in copies:
            os.close(fd)
        if exc.errno not in _NO_COPY:
            raise
        return []
    return copies
