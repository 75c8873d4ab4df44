"""A UDP endpoint on a socket that all workers share.

Every worker's loop wakes up for a datagram, and each reads one at most: who read until nothing is left, as uvloop's own
transport does, would leave nothing to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

#: The longest datagram there is, and then some.
_LONGEST: Final = 256 * 1024

#: Bytes that wait to be sent, above which the protocol is told to pause (asyncio's own default).
_HIGH: Final = 64 * 1024

_JOINS: Final = frozenset(
    {(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP), (socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP)}
)


class SharedSocket(socket.socket):
    """A UDP socket that other processes have too: joining a multicast group that another has joined is no error."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        try:
            super().setsockopt(level, option, *value)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or (level, option) not in _JOINS:
                raise


class SharedDatagramTransport(asyncio.DatagramTransport):
    """As asyncio's transport of a socket that is bound and not connected.

    Owns `sock`.  `on_close()` is called once, when it reads no more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: SharedSocket,
        protocol: asyncio.DatagramProtocol,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__({"socket": sock, "sockname": sock.getsockname()})
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._protocol: Any = protocol
        self._on_close = on_close
        self._closing = False
        self._lost = False
        self._reading = False
        self._waiting: deque[tuple[bytes, Any]] = deque()
        self._size = 0
        self._paused = False
        self._high, self._low = _HIGH, _HIGH // 4
        loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._protocol.connection_made(self)
        if not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            data, address = self._sock.recvfrom(_LONGEST)
        except (BlockingIOError, InterruptedError):
            # Another worker was quicker.
            return
        except OSError as exc:
            self._protocol.error_received(exc)
            return
        self._protocol.datagram_received(data, address)

    # -- sending --------------------------------------------------------------------------------------------------

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send to `addr`, now or when there is room; never waits."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if addr is None:
            raise ValueError("this endpoint has no remote address: say where to send to")
        if self._lost:
            return
        if not self._waiting:
            try:
                self._sock.sendto(data, addr)
                return
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._fd, self._writable)
            except OSError as exc:
                self._protocol.error_received(exc)
                return
        # A copy: what the caller does with its buffer is its own affair.
        self._waiting.append((bytes(data), addr))
        self._size += len(data)
        if self._size > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        while self._waiting:
            data, address = self._waiting[0]
            try:
                self._sock.sendto(data, address)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                self._protocol.error_received(exc)
            # What `error_received` has aborted is empty.
            if self._waiting:
                self._waiting.popleft()
                self._size -= len(data)
        if self._paused and self._size <= self._low:
            self._paused = False
            self._protocol.resume_writing()
        if not self._waiting and not self._lost:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._end()

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Read no more; what waits is sent."""
        if self._closing:
            return
        self._stop()
        if not self._waiting:
            self._end()

    def abort(self) -> None:
        """Read no more, and drop what waits."""
        if not self._closing:
            self._stop()
        if not self._lost:
            if self._waiting:
                self._loop.remove_writer(self._fd)
                self._waiting.clear()
                self._size = 0
            self._end()

    def withdraw(self) -> None:
        """Read no more, though the program goes on: it may still send."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _stop(self) -> None:
        self._closing = True
        self.withdraw()
        self._on_close()

    def _end(self) -> None:
        self._lost = True
        self._loop.call_soon(self._call_lost)

    def _call_lost(self) -> None:
        try:
            self._protocol.connection_lost(None)
        finally:
            self._sock.close()

    def is_closing(self) -> bool:
        return self._closing

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_write_buffer_size(self) -> int:
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = _HIGH if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._sock.close()

    def __repr__(self) -> str:
        return f"<SharedDatagramTransport {self._extra['sockname']}{' closing' if self._closing else ''}>"  # type: ignore[attr-defined]  # not in typeshed
