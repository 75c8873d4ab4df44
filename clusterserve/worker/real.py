"""Becoming real: a handed-over connection's descriptor goes to a transport of the event loop.

From then on the `HandedTransport` only passes on: what the loop's transport does best, it does.  The functions here are
that class's own, and know its insides.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from ..channel.board import UNKNOWN
from .lazy import CLOSED, GONE, PENDING, REAL

if TYPE_CHECKING:
    from .transport import HandedTransport


#: How long a TLS client that was told of the end has to confirm it (seconds).
FAREWELL: Final = 1.0


def become_real(handed: HandedTransport, **ssl: Any) -> None:
    """Hand the descriptor to the loop's own transport; `ssl` is for `loop.connect_accepted_socket`."""
    handed._phase = PENDING
    handed._tls = bool(ssl)
    handed._leave_watch()
    handed._receiver.marks[handed._place] = UNKNOWN
    handed._receiver.keep(handed._id, handed)
    if handed._upgraded:
        handed._take()
    # All three are asked from the kernel: asyncio sets TCP_NODELAY only on a socket whose `proto` says TCP.
    sock = socket.socket(fileno=handed._fd)
    loop = handed._receiver.loop
    wires: list[_Wire] = []

    def factory() -> Any:
        wires.append(wire(handed))
        return wires[0]

    def connected(task: asyncio.Task[Any]) -> None:
        if not wires:
            # The loop never got to making a transport, which would own it.
            sock.close()
        _connected(handed, task)

    loop.create_task(loop.connect_accepted_socket(factory, sock, **ssl)).add_done_callback(connected)


def _connected(handed: HandedTransport, task: asyncio.Task[Any]) -> None:
    """The loop is done with connecting: only failures (a TLS handshake, a loop that is closing) are news."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Exception) and not isinstance(error, OSError):
        # Not the client's fault: what the factory has made is no protocol.
        handed._receiver.fault(error, "protocol")
    if task.cancelled() or error is not None:
        _lost(handed, error if isinstance(error, Exception) else None)


def _adopt(handed: HandedTransport, real: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    """The loop's transport is there: what happened meanwhile happens to it now, then it takes over."""
    handed._phase = REAL
    handed._real = real
    if protocol is not handed._protocol:
        real.set_protocol(wire(handed))
    if handed._limits is not None:
        real.set_write_buffer_limits(*handed._limits)
    # Instance attributes in front of the methods: from here on a call goes straight to the loop's transport.
    for name in ("is_closing", "close", "abort"):
        setattr(handed, name, getattr(real, name))
    if handed._tls:
        setattr(handed, "close", partial(_close, handed, real))  # noqa: B010 - a method of its class to mypy
        # Its keys are here and nowhere else.
        handed._upgraded = True
        handed._receiver.taken(handed._id)
    if not handed._closing:
        # Else what is written is dropped here, whatever the loop's transport does with it after `close`.
        for name in ("write", "writelines", "write_eof", "can_write_eof"):
            setattr(handed, name, getattr(real, name))
    if not handed._made:
        handed._made = True
        handed._receiver.made(handed._id)
        try:
            handed._protocol.connection_made(handed)
        except Exception as exc:  # noqa: BLE001 - the user's protocol; uvloop would leave it there, never read
            handed._receiver.fault(exc, "protocol")
            handed._abort = True
    if handed._pieces:
        real.write(b"".join(handed._pieces))
        handed._pieces.clear()
    if not handed._full:
        # The loop's transport has taken it all: what the protocol writes now goes behind it.
        handed.resume()
    if handed._abort:
        real.abort()
    elif handed._closing:
        handed.close()
    else:
        if handed._eof:
            real.write_eof()
        if handed._reading:
            _adopt_reading(handed)
        else:
            # A turn later: uvloop begins to read behind `connection_made`, whatever that has said.
            handed._receiver.loop.call_soon(_adopt_reading, handed)


def _adopt_reading(handed: HandedTransport) -> None:
    real = cast("asyncio.Transport", handed._real)
    for name in ("pause_reading", "resume_reading", "is_reading"):
        setattr(handed, name, getattr(real, name))
    if not handed._reading and not real.is_closing():
        real.pause_reading()


def _close(handed: HandedTransport, real: asyncio.Transport) -> None:
    """Close a TLS connection.  The loops wait for the client to confirm the end, for half a minute; many never do."""
    real.close()
    handed._receiver.loop.call_later(FAREWELL, _part, handed, real)


def _part(handed: HandedTransport, real: asyncio.Transport) -> None:
    """Go without a confirmation, once the client's kernel has everything."""
    if handed._phase is not CLOSED:
        if real.get_write_buffer_size() or _unacknowledged(handed._fd):
            handed._receiver.loop.call_later(FAREWELL, _part, handed, real)
        else:
            real.abort()


def _unacknowledged(fd: int) -> int:
    buffer = array.array("i", [0])
    try:
        fcntl.ioctl(fd, termios.TIOCOUTQ, buffer)
    except OSError:
        # The loop has closed it, and tells us in its next turn.
        return 0
    return buffer[0]


def _pause(handed: HandedTransport) -> None:
    """The loop's transport has too much to write; the protocol may have been told already."""
    handed._full = True
    if not handed._paused:
        handed._paused = True
        handed._protocol.pause_writing()


def _lost(handed: HandedTransport, error: Exception | None) -> None:
    if handed._phase is CLOSED:
        return
    handed._phase = CLOSED
    handed._closing = True
    handed._ran()
    handed._receiver.show_running()
    handed._receiver.ended(handed._id, returned=handed._returning and error is None and not handed._upgraded)
    protocol, handed._protocol = handed._protocol, GONE
    if handed._made:
        protocol.connection_lost(error)


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
        _adopt(self._handed, cast("asyncio.Transport", transport), self._protocol)

    def pause_writing(self) -> None:
        _pause(self._handed)

    def resume_writing(self) -> None:
        self._handed.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        _lost(self._handed, exc)


class _StreamWire(_Wire, asyncio.Protocol):
    straight = ("data_received", "eof_received")


class _BufferedWire(_Wire, asyncio.BufferedProtocol):
    straight = ("get_buffer", "buffer_updated", "eof_received")


def wire(handed: HandedTransport) -> _Wire:
    return (_BufferedWire if isinstance(handed.get_protocol(), asyncio.BufferedProtocol) else _StreamWire)(handed)
