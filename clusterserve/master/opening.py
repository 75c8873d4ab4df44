"""Opening the socket that a `Bind` names: bound, not yet listening.  Raises OSError with the kernel's errno."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Any, Final

from .. import faults
from ..binds import Bind

#: The host that is every address of both families on one socket; where there is no IPv6, of IPv4.
ANY: Final = "*"

#: The longest path that fits a `sockaddr_un`, in bytes.
_PATH_MAX: Final = 107


def any_host() -> str:
    """The host of `*`."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError as exc:
        if exc.errno == errno.EAFNOSUPPORT:
            return "0.0.0.0"
    return "::"


def open_socket(
    bind: Bind,
    *,
    datagram: bool = False,
    v6only: bool = False,
    reuse_address: bool = True,
    reuse_port: bool = False,
) -> socket.socket:
    """The socket of `bind`, the caller's to close.  `v6only` is about IPv6 addresses alone."""
    if bind.kind == "tcp":
        return _open_inet(bind, datagram, v6only, reuse_address, reuse_port)
    if bind.kind == "unix":
        return _open_unix(bind.path)
    return _open_inherited(bind.fd, datagram)


def _open_inet(bind: Bind, datagram: bool, v6only: bool, reuse_address: bool, reuse_port: bool) -> socket.socket:
    kind = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
    proto = socket.IPPROTO_UDP if datagram else socket.IPPROTO_TCP
    # `proto` is spelled out: asyncio sets TCP_NODELAY only on sockets that say TCP.
    family, address = resolve(any_host() if bind.host == ANY else bind.host, bind.port, kind, proto)
    sock = socket.socket(family, kind, proto)
    try:
        if reuse_address and not datagram:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def resolve(host: str, port: int, kind: socket.SocketKind, proto: int) -> tuple[int, Any]:
    """The family and the address that a host and a port mean.  Raises OSError (`gaierror`)."""
    # As uvicorn: a name means IPv4 where it has that, so that `localhost` is one address.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.getaddrinfo(host, port, family, kind, proto)
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "not the name of a host") from None
    except socket.gaierror:
        found = socket.getaddrinfo(host, port, socket.AF_UNSPEC, kind, proto)
    return found[0][0], found[0][4]


def _open_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = -1
    try:
        address: str | bytes = path
        if path.startswith("@"):
            address = b"\0" + os.fsencode(path[1:])
        elif len(os.fsencode(path)) > _PATH_MAX:
            # Only the last part has to fit: the kernel finds the directory by its descriptor.
            directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
            address = f"/proc/self/fd/{directory}/{os.path.basename(path)}"
        if not path.startswith("@") and not faults.on("stale-files"):
            _remove_stale(address)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    finally:
        if directory >= 0:
            os.close(directory)
    return sock


def _remove_stale(path: str | bytes) -> None:
    """Remove a socket file nobody listens on.  Raises OSError(EADDRINUSE) for one that is in use, or no socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "a file that is no socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            # Its backlog is full: somebody is there.
            pass
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _open_inherited(fd: int, datagram: bool) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise OSError(errno.ENOTSOCK, "it is not a socket")
    sock = socket.socket(fileno=os.dup(fd))
    try:
        if datagram:
            if sock.type != socket.SOCK_DGRAM or sock.family == socket.AF_UNIX:
                raise OSError(errno.EINVAL, "it is not a UDP socket")
        elif sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, "it is not a listening socket")
    except OSError:
        sock.close()
        raise
    return sock
