"""The socket between two masters, both ends alike: SOCK_SEQPACKET, one message and its descriptors a packet.

Reads and writes when its event loop says so; never blocks, but for `first`, before there is a loop.  What does not fit
the kernel's buffer waits here.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..core.handover import MAX_MESSAGE, MAX_RIDERS, Message, decode, encode
from ..errors import ProtocolError

#: The kernel has no room now, though the socket may be writable: nobody tells when it has, so it is tried again.
_SCARCE: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
_RETRY: Final = 0.05

_SPACE: Final = socket.CMSG_SPACE(4 * MAX_RIDERS)

#: Messages read in one turn of the loop.
_READS: Final = 16


def first(sock: socket.socket) -> tuple[Message, list[int]]:
    """The next message, of which the sender has said that it is there; the descriptors are the caller's.

    Raises `ProtocolError`, also if there is none, or not everything has arrived.
    """
    sock.setblocking(True)
    sock.settimeout(10.0)
    try:
        body, fds, flags = _receive(sock)
    except OSError as error:
        raise ProtocolError(f"nothing came: {error.strerror or error}") from None
    finally:
        sock.setblocking(False)
    try:
        if not body:
            raise ProtocolError("nothing came")
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("not all descriptors have arrived: the limit of open files is too low")
        return decode(body), fds
    except ProtocolError:
        for fd in fds:
            os.close(fd)
        raise


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """`socket.recv_fds`, which overlooks its flags: the processes we start would have the descriptors too."""
    body, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, _SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return body, list(fds), flags


class HandoverChannel:
    """One end.  Owns its socket.

    `on_message(message, descriptors)` gets each message; the descriptors are the callee's to close.  `on_closed(error)`
    is called once, at the end (None) or for a message that cannot be; not after `close`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_message: Callable[[Message, list[int]], None],
        on_closed: Callable[[ProtocolError | None], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._on_message = on_message
        self._on_closed = on_closed
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._flushed: list[asyncio.Future[None]] = []
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self.read)

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def fileno(self) -> int:
        """For who inherits this end."""
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send it; takes the descriptors over.  They are closed when it is sent, or cannot be."""
        self._unsent.append((encode(message), list(descriptors)))
        if len(self._unsent) == 1:
            self._write()

    async def flush(self) -> None:
        """Return when all is sent, or the other end is gone."""
        if self._unsent:
            flushed = self._loop.create_future()
            self._flushed.append(flushed)
            await flushed

    def close(self) -> None:
        """Say nothing more, and hear nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if self.is_open:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        while self._unsent:
            self._sent()
        self._is_flushed()

    def _sent(self) -> None:
        for fd in self._unsent.popleft()[1]:
            os.close(fd)

    def _is_flushed(self) -> None:
        for flushed in self._flushed:
            if not flushed.done():
                flushed.set_result(None)
        self._flushed.clear()

    def _write(self) -> None:
        self._timer = None
        if not self.is_open:
            self.close()
            return
        while self._unsent:
            try:
                socket.send_fds(self._socket, [self._unsent[0][0]], self._unsent[0][1])
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._write)
                return
            except OSError as error:
                if error.errno in _SCARCE:
                    self._loop.remove_writer(self._socket.fileno())
                    self._timer = self._loop.call_later(_RETRY, self._write)
                    return
                # The other end is gone, of which reading tells.
            self._sent()
        self._loop.remove_writer(self._socket.fileno())
        self._is_flushed()

    def read(self) -> None:
        """Read what is there; done whenever there is something."""
        for _ in range(_READS):
            if not self.is_open:
                return
            try:
                body, fds, _ = _receive(self._socket)
            except BlockingIOError:
                return
            except OSError:
                body, fds = b"", []
            if not body:
                self._end(None)
                return
            try:
                message = decode(body)
            except ProtocolError as error:
                for fd in fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                self._end(error)
                return
            self._on_message(message, fds)

    def _end(self, error: ProtocolError | None) -> None:
        self.close()
        self._on_closed(error)
