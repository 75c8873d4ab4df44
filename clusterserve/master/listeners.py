"""Listening sockets: opening what a `Bind` names, and keeping each for as long as its kind lives.

Two lifetimes.  A *pinned* listener (`--bind`) is opened before any worker starts and lives as long as the master.  One
that a worker asked for lives until its last worker closes it or is disconnected; if the last one crashed, it is kept a
while for the next.  Only the master touches socket files, and only those it made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

from .. import faults
from ..binds import Bind
from ..core.endpoint import Endpoint
from ..errors import BindError
from .opening import open_socket

#: How long TCP_DEFER_ACCEPT holds a silent client back (seconds; the kernel rounds up to its retransmissions).
DEFER: int = 1


class Access(NamedTuple):
    """Who may connect to a unix socket: the mode of its file (uvicorn's), and its owner, -1 for whoever we are.

    And whether other programs may listen on the same TCP and UDP addresses, if they ask for it too.
    """

    mode: int = 0o666
    uid: int = -1
    gid: int = -1
    shared: bool = False


@dataclass
class Listener:
    """One listening socket.  Owns it, and the file of a unix socket it made."""

    key: int
    bind: Bind
    sock: socket.socket
    pinned: bool
    backlog: int
    #: Path, device and inode of the socket file, if we made one.
    file: tuple[str, int, int] | None = None
    reuse_address: bool = True
    keep_alive: bool = False
    #: Workers that asked for it.
    workers: set[int] = field(default_factory=set)
    #: What the first of them sent for all.
    data: str = ""
    #: Its key with the old master, whose it is until that has yielded; 0: it was always ours.
    inherited: int = 0
    #: Whether it is served with TLS.
    tls: bool = False

    def __post_init__(self) -> None:
        # Remembered: while a cluster stops, its listeners are closed and its last workers may still be starting.
        self.family = self.sock.family
        self.datagram = self.sock.type == socket.SOCK_DGRAM
        name = self.sock.getsockname()
        #: What getsockname() says, as JSON can carry it: [host, port, …], or a path, "@" first if it is abstract.
        self.sockname: list[object] | str
        #: What is really bound; None for a unix socket.
        self.endpoint: Endpoint | None = None
        if isinstance(name, tuple):
            self.sockname = list(name)
            v6only = self.family == socket.AF_INET6 and self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            self.endpoint = Endpoint("udp" if self.datagram else "tcp", name[0], name[1], bool(v6only))
        elif self.bind.kind == "unix" and not self.bind.path.startswith("@"):
            # A long path is not bound by its own name.
            self.sockname = self.bind.path
        else:
            self.sockname = name if isinstance(name, str) else "@" + os.fsdecode(name[1:])

    @property
    def is_open(self) -> bool:
        return self.sock.fileno() >= 0

    @property
    def address(self) -> str:
        """What it listens on, for the log."""
        return self._url({})

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        return self._url({"0.0.0.0": "127.0.0.1", "::": "::1"})

    def _url(self, instead: dict[str, str]) -> str:
        if isinstance(self.sockname, str):
            return f"unix:{self.sockname}"
        host = str(self.sockname[0])
        host = instead.get(host, host)
        scheme = "udp" if self.datagram else "https" if self.tls else "http"
        return f"{scheme}://[{host}]:{self.sockname[1]}" if ":" in host else f"{scheme}://{host}:{self.sockname[1]}"

    def listen(self, backlog: int) -> None:
        """Listen with the largest backlog anyone asked for."""
        self.backlog = max(backlog, self.backlog)
        if self.is_open and not self.datagram:
            self.sock.listen(self.backlog)

    def defer(self, on: bool) -> bool:
        """Let the kernel keep clients that say nothing; False where it cannot (unix sockets)."""
        if self.sock.family == socket.AF_UNIX:
            return False
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER if on else 0)
        return on

    def leave(self) -> None:
        """Close our copy of what another master has too."""
        self.file = None
        self.sock.close()

    def close(self) -> None:
        """Close it, and remove its file if it is still the one we made."""
        self.sock.close()
        if self.file is not None:
            path, *ours = self.file
            self.file = None
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path)
                if [found.st_dev, found.st_ino] == ours:
                    os.unlink(path)


def open_listener(
    key: int,
    bind: Bind,
    backlog: int,
    *,
    pinned: bool,
    datagram: bool = False,
    v6only: bool = False,
    reuse_address: bool = True,
    keep_alive: bool = False,
    access: Access = Access(),  # noqa: B008 - frozen
    inherited: socket.socket | None = None,
    tls: bool = False,
) -> Listener:
    """Open what `bind` names and listen; raises `BindError`.  `datagram`: UDP; `tls` is for its name.

    `inherited` is the socket of another master, which is taken over, and its file left alone.
    """
    try:
        sock = inherited or open_socket(
            bind, datagram=datagram, v6only=v6only, reuse_address=reuse_address, reuse_port=access.shared
        )
    except OSError as exc:
        raise _explain(exc, bind) from None
    file = None
    try:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX and bind.kind == "fd" and faults.on("owns-inherited"):
            bind = Bind("unix", path=sock.getsockname())
        if inherited is None and bind.kind == "unix" and not bind.path.startswith("@"):
            file = identity(bind.path)
            set_access(bind.path, access)
        if sock.family != socket.AF_UNIX and not datagram:
            # Accepted sockets inherit both: no system call for each of them.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if keep_alive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener = Listener(key, bind, sock, pinned, backlog, file, reuse_address, keep_alive, tls=tls)
        listener.listen(backlog)
    except OSError as exc:
        Listener(key, bind, sock, pinned, backlog, file).close()
        raise _explain(exc, bind) from None
    return listener


def identity(path: str) -> tuple[str, int, int]:
    """What a socket file is known by, wherever the program that embeds us goes.  Raises OSError."""
    made = os.stat(path)
    return os.path.abspath(path), made.st_dev, made.st_ino


def set_access(path: str, access: Access) -> None:
    """Let those connect who may.  Raises OSError."""
    # By a descriptor: the directory may be the workers', and what is put in the place of our file meanwhile is not ours
    # to give away.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        file = f"/proc/self/fd/{fd}"
        if (access.uid, access.gid) != (-1, -1):
            os.chown(file, access.uid, access.gid)
        os.chmod(file, access.mode)
    finally:
        os.close(fd)


def _explain(exc: OSError, bind: Bind) -> BindError:
    reason = (exc.strerror or str(exc)).lower()
    advice = {
        errno.EADDRINUSE: "; stop the program that uses it, or choose another address",
        errno.EACCES: "; choose a port of at least 1024, or a directory you may write to",
        errno.EPERM: "; choose an address you may use",
        errno.EADDRNOTAVAIL: "; this machine has no such address",
        errno.EBADF: "; pass the descriptor of a listening socket",
        errno.ENOENT: "; create the directory first",
    }.get(exc.errno or 0, "")
    if isinstance(exc, socket.gaierror):
        return BindError(errno.EADDRNOTAVAIL, f"cannot listen on {bind}: {reason}", str(bind))
    return BindError(exc.errno or errno.EINVAL, f"cannot listen on {bind}: {reason}{advice}", str(bind))
