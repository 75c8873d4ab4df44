"""`Heritage`: the listening sockets that a new master finds, before it opens any of its own."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from ..binds import Bind
from ..channel.handover import first
from ..core.handover import Estate, HeldListener
from ..errors import ClusterError, ProtocolError
from ..succession import Claim
from .opening import ANY, any_host, resolve


@dataclass
class Inherited:
    """A listening socket of the old master's, and what it said of it."""

    held: HeldListener
    sock: socket.socket

    def serves(self, bind: Bind, *, datagram: bool, v6only: bool) -> bool:
        """Whether it is what this address means, whatever the old master called it."""
        if self.held.datagram != datagram:
            return False
        if bind.kind == "unix":
            if bind.path.startswith("@"):
                return self.held.bind == str(bind)
            # A file that was removed, or replaced, leads nobody to this socket any more.
            with contextlib.suppress(OSError):
                found = os.stat(bind.path)
                return self.held.file is not None and self.held.file[1:] == (found.st_dev, found.st_ino)
            return False
        if self.held.bind == str(bind):
            return True
        if bind.kind == "fd" or not bind.port or self.sock.family == socket.AF_UNIX:
            return False
        with contextlib.suppress(OSError):
            kind = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
            family, address = resolve(any_host() if bind.host == ANY else bind.host, bind.port, kind, 0)
            if self.sock.family != family or self.sock.getsockname()[:2] != address[:2]:
                return False
            wide = family == socket.AF_INET6
            return not wide or bool(self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) == v6only
        return False


class Heritage:
    """What the old master has left.  Owns the sockets that nobody has claimed yet."""

    def __init__(self, predecessor: int, listeners: list[Inherited], pid_file: str) -> None:
        self.predecessor = predecessor
        self.pid_file = pid_file
        self.listeners = listeners

    @classmethod
    def receive(cls, claim: Claim) -> Heritage:
        """Read it.  Raises `ClusterError` if this version does not understand the old one."""
        sock = socket.socket(fileno=os.dup(claim.fd))
        found: list[Inherited] = []
        pid_file, more = "", True
        try:
            with sock:
                while more:
                    message, fds = first(sock)
                    sockets = [socket.socket(fileno=fd) for fd in fds]
                    if not isinstance(message, Estate) or len(sockets) != len(message.listeners):
                        raise ProtocolError(f"a {type(message).__name__} with {len(sockets)} descriptors")
                    found += map(Inherited, message.listeners, sockets)
                    pid_file, more = message.pid_file, message.more
        except ProtocolError as error:
            raise ClusterError(
                f"cannot take over from process {claim.predecessor}, which may be of another version of clusterserve: "
                f"{error}; stop it, and start this one"
            ) from None
        return cls(claim.predecessor, found, pid_file)

    def claim(self, bind: Bind, *, datagram: bool, v6only: bool) -> Inherited | None:
        """The socket for this address, which is the caller's from now on; None if there is none."""
        for each in self.listeners:
            if each.serves(bind, datagram=datagram, v6only=v6only):
                self.listeners.remove(each)
                return each
        return None

    def drop(self, *, pinned: bool) -> None:
        """Close what nobody has claimed: of `--bind`, or of the rest."""
        for each in tuple(self.listeners):
            if each.held.pinned == pinned:
                self.listeners.remove(each)
                each.sock.close()
