"""What a dead worker had done to a connection: as its board says, confirmed by the kernel."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios
from enum import Enum
from typing import Final

from ..channel.board import IDLE, READING, RESPONDING, UNTOUCHED

# linux/tcp.h, struct tcp_info: state; bytes acknowledged by the client, bytes received from it.
_TCP_INFO: Final = struct.Struct("<B119xQQ")
_CLOSE_WAIT: Final = 8
_SIOCOUTQ: Final = termios.TIOCOUTQ


#: How often the kernel is asked again while a client goes on sending.
_LOOKS: Final = 16


class Fate(Enum):
    #: Not a byte was read: somebody else may serve it.
    UNTOUCHED = "untouched"
    #: Between two requests.
    IDLE = "idle"
    #: Read, and not a byte answered.
    READ = "read"
    #: A response was begun, or the kernel cannot tell (unix sockets).
    BEGUN = "begun"


def fate_of(fd: int, mark: int) -> Fate:
    """The fate of a connection whose dead worker has left this mark on its board.

    It marks before it reads and before it writes: what it says it has not done, it has not.
    """
    if mark == UNTOUCHED:
        return Fate.UNTOUCHED
    if mark == IDLE:
        return Fate.IDLE
    if mark == RESPONDING:
        return Fate.BEGUN
    seen = _seen_by_the_kernel(fd)
    if mark == READING:
        # It was about to read at least.  On a connection that has been used before the kernel sees old responses.
        return Fate.UNTOUCHED if seen is Fate.UNTOUCHED else Fate.READ
    return seen


def _seen_by_the_kernel(fd: int) -> Fate:
    """The same of a connection that its worker held from its first byte on, without marks (TCP(7), TCP_INFO)."""
    sock = socket.socket(fileno=fd)
    try:
        if sock.family == socket.AF_UNIX:
            return Fate.BEGUN
        # Before what is acknowledged: an answer on its way must be seen on one side or the other.
        unsent = _queued(fd, _SIOCOUTQ)
        for _ in range(_LOOKS):
            unread = _queued(fd, termios.FIONREAD)
            state, acked, received = _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136))
            # Bytes that arrive in between belong to one sum only: the two fit when nothing has.
            if _queued(fd, termios.FIONREAD) == unread:
                break
        # A client that never pauses looks as if more had been read than was: rather a 502 than a request served twice.
    except OSError:
        return Fate.BEGUN
    finally:
        # Borrowed, not copied: at the descriptor limit a dead worker's clients are helped all the same.
        sock.detach()
    # First of all: a server may speak before it has read anything, and must not do so twice.
    if acked or unsent:
        return Fate.BEGUN
    # The client's FIN counts as one byte received.
    return Fate.UNTOUCHED if received - (state == _CLOSE_WAIT) <= unread else Fate.READ


def _queued(fd: int, request: int) -> int:
    buffer = array.array("i", [0])
    fcntl.ioctl(fd, request, buffer)
    return buffer[0]
