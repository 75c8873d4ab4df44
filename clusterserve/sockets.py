"""Sockets that ride with a message: which may, what becomes of the sender's own, what the receiver makes of them."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Final

#: Sockets that may ride with one message.
MAX_SOCKETS: Final = 16


def checked(sockets: Sequence[Any]) -> Sequence[Any]:
    """Themselves; raises TypeError for what is no socket, ValueError for one that is closed, or for too many."""
    if len(sockets) > MAX_SOCKETS:
        raise ValueError(f"at most {MAX_SOCKETS} sockets can ride with one message, not {len(sockets)}")
    for sock in sockets:
        if not (hasattr(sock, "fileno") and hasattr(sock, "getsockopt")):
            raise TypeError(f"what rides with a message is a socket, not {sock!r}")
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("a TLS connection cannot be sent: its keys would stay behind")
        if sock.fileno() < 0:
            raise ValueError("a socket that is closed cannot be sent")
    return sockets


def leaving(sockets: Sequence[Any], keep_open: bool | None) -> list[socket.socket]:
    """Those that the sender's side closes when they are on their way: connections, if nobody says otherwise.

    The socket of a transport is not ours to close, and not the program's.
    """
    own = [sock for sock in sockets if isinstance(sock, socket.socket)]
    return [sock for sock in own if (_stays(sock) if keep_open is None else keep_open) is False]


def _stays(sock: socket.socket) -> bool:
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(listens) or sock.type != socket.SOCK_STREAM


def copies(sockets: Sequence[Any]) -> list[int]:
    """Of all their descriptors.  Raises OSError at the limit of open files; none is left then."""
    made: list[int] = []
    try:
        for sock in sockets:
            made.append(os.dup(sock.fileno()))  # noqa: PERF401 - those made before it fails must be closed
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made


def adopted(fd: int) -> socket.socket:
    """The socket of a descriptor, which blocks or not as its sender's did: that is one for all copies."""
    blocking = os.get_blocking(fd)
    sock = socket.socket(fileno=fd)
    if not blocking:
        sock.setblocking(False)
    return sock
