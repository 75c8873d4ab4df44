"""`--proxy-protocol`: takes the header off a new connection and notes whose it is, before anybody gets it.

Peeked at until it is whole, then consumed, and not a byte more.  Only trusted peers are listened to; what others send
is what they ask for.  As with gunicorn a trusted peer may also come without a header.
"""

from __future__ import annotations

import socket
from ipaddress import IPv6Address

from ..core.connection import Connection
from ..core.proxy import MAX_V2, Header, More, ProxyError, Trust, parse
from ..core.records import PROXIED
from .complaint import Complaint


class Introductions:
    """`mode` and `allowed` as in the settings; `mode` is not off."""

    def __init__(self, mode: str, allowed: str) -> None:
        self._mode = mode
        self._trust = Trust(allowed)
        self._complaint = Complaint()

    def expects(self, connection: Connection) -> bool:
        """Whether its peer may say whose it is."""
        return connection.client in self._trust

    def read(self, connection: Connection) -> bool | None:
        """Whether it is known now whose it is; False: what is there may become a header.  None: it is to be closed."""
        # Borrowed, not copied.
        sock = socket.socket(fileno=connection.fd)
        try:
            header = self._header(sock)
        except BlockingIOError:
            return False
        except OSError:
            return None
        except ProxyError as exc:
            self._complain(connection, exc)
            return None
        finally:
            sock.detach()
        if isinstance(header, More):
            return False
        if header is not None and header.family is not None:
            connection.family = PROXIED | header.family
            connection.client, connection.port = header.client, header.port
            connection.server, connection.server_port = header.server, header.server_port
        return True

    def _header(self, sock: socket.socket) -> Header | More | None:
        """What there is of one; taken off if it is whole."""
        data = sock.recv(MAX_V2, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionResetError("it has ended")
        header = parse(data, self._mode)
        if isinstance(header, Header):
            left = header.length
            while left:
                left -= len(sock.recv(left, socket.MSG_DONTWAIT))
        return header

    def _complain(self, connection: Connection, error: ProxyError) -> None:
        where = "a unix socket"
        if connection.client:
            address = IPv6Address(connection.client)
            where = str(address.ipv4_mapped or address)
        self._complaint.warn("Closed a connection of the proxy %s, whose PROXY header is %s", where, error)
