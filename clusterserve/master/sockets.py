"""What is done to an accepted connection by its descriptor: there is no socket object for each."""

from __future__ import annotations

import contextlib
import os
import socket

from ..core.connection import Connection


def hang_up(connection: Connection) -> None:
    """Close it, though a worker that it was taken back from may still have a copy, and hold its loop for long."""
    if connection.relics:
        sock = socket.socket(fileno=connection.fd)
        # The client may be gone already.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.detach()
    os.close(connection.fd)


def has_data(fd: int) -> bool:
    """Whether there is something to read."""
    return bool(peeked(fd))


def peeked(fd: int) -> bool | None:
    """Whether there is something to read (True), the client has left (False), or neither (None)."""
    # Borrowed, not copied: that works at the descriptor limit too.
    sock = socket.socket(fileno=fd)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return None
    except OSError:
        return False
    finally:
        sock.detach()
