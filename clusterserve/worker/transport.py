"""The transport of a handed-over connection, as protocols see it: an `asyncio.Transport` with two lives.

Lazy while it lasts (`lazy.py`), one of the event loop's when it must be (`real.py`).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import socket
import termios
from typing import Any

from ..core.records import waited
from .lazy import BUSY, CLOSED, HIGH_WATER, LAZY, PENDING, REAL, LazyTransport
from .real import become_real, wire


class Told(tuple[str, int]):
    """An address that does not belong to the socket: a proxy has told it.  Empty: there is none."""

    __slots__ = ()


class HandedTransport(LazyTransport):
    """An `asyncio.Transport` over a descriptor that the master handed over."""

    __slots__ = ()

    def become_real(self, **ssl: Any) -> None:
        become_real(self, **ssl)

    @property
    def loops_own(self) -> asyncio.Transport:
        """The loop's transport behind this one, for what only that can do.  Raises RuntimeError without one."""
        if self._real is None:
            raise RuntimeError(f"{self!r} has no transport of the event loop yet")
        return self._real

    @property
    def ours_alone(self) -> bool:
        """Whether nobody else could do anything for it, so that it is not given back: TLS, another protocol."""
        return self._tls or self._upgraded

    @property
    def has_unread(self) -> bool:
        """Whether the client has sent something that nobody has read, with TLS of whatever kind."""
        buffer = array.array("i", [0])
        if not self.is_closing():
            # The loop may have closed it, and tells us in its next turn.
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._fd, termios.FIONREAD, buffer)
        return bool(buffer[0])

    def serves(self, protocol: asyncio.BaseProtocol) -> bool:
        """Whether it is open, `protocol`'s, and not ours alone: in one call, as it is asked after every response."""
        closing = self._closing if self._real is None else self.is_closing()
        return self._protocol is protocol and not closing and not self._tls and not self._upgraded

    def handed_over(self, queued: int, now: float, turn: int) -> None:
        """Note when the master had it ready (see `core.records.waited`), and in which turn of the receiver it came."""
        self._handed: tuple[int, float, int] | None = (queued, now, turn)

    def queue_time(self, now: float) -> float | None:
        """How long the connection had waited for this worker (seconds), to be asked once by its first request.

        Until `now`, or until it was read, if the rest of that request was longer on its way.  None for every later
        request, which came to the worker directly, and if nobody has noted it.
        """
        handed = getattr(self, "_handed", None)
        if handed is None:
            return None
        self._handed = None
        queued, read, turn = handed
        return waited(queued, now if turn == self._receiver.counters[0] else read)

    #: `asyncio.BaseEventLoop.start_tls` asks for it.
    _start_tls_compatible = True

    def _force_close(self, exc: BaseException | None) -> None:
        """What asyncio's TLS does to the transport below it when something is beyond repair."""
        self.abort()

    # -- until it is real: after that, the loop's own methods stand in front of these ---------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not data or self._closing or self._eof:
            return
        # What may change under us is copied, as asyncio does.
        piece = data if isinstance(data, bytes) else bytes(data)
        self._pieces.append(piece)
        self._size += len(piece)
        if self._phase is BUSY:
            self._wake()
        if self._size > HIGH_WATER and not self._paused:
            if self._phase is LAZY:
                self._flush()
            if self._size > HIGH_WATER:
                self._paused = True
                self._protocol.pause_writing()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._wake()
        if self._phase is LAZY and self._pieces:
            # The client need not wait for the other requests of this turn.
            self._flush()

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
        if self._phase is BUSY and not self._armed and self._watch is not None:
            self._stay(self._watch)

    def is_reading(self) -> bool:
        return self._reading and not self.is_closing()

    # -- always ---------------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self._peername or default
        if name == "socket" and type(self._peername) is Told:
            # Who asks the socket itself, as uvicorn does, learns whose the connection to the proxy is.
            return default
        if name == "sockname":
            # Once it is closed, its number may be somebody else's.
            if self._sockname is None and self._phase is not CLOSED:
                self._sockname = _sockname(self._fd)
            return default if self._sockname is None else self._sockname
        return default if self._real is None else self._real.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if not self._upgraded:
            self._upgraded = True
            if self._phase is PENDING or self._phase is REAL:
                self._take()
        self._wake()
        self._protocol = protocol
        if self._real is not None:
            # A new wire, because loops remember the bound methods of the protocol they were given.
            self._real.set_protocol(wire(self))

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


def _sockname(fd: int) -> tuple[str, int] | str | None:
    """The local address of a connection to a wildcard listener, in the shape of `peername`."""
    # Borrowed, not copied: that works at the descriptor limit too.
    sock = socket.socket(fileno=fd)
    try:
        name = sock.getsockname()
    finally:
        sock.detach()
    return (name[0], name[1]) if isinstance(name, tuple) else name
