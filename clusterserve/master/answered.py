"""`AnswerLog`: the access log's lines of what the master has answered itself, in the format of all others.

What was asked is known of a request that was turned away (503): nobody has read it, so it can be looked at.  What a
worker has read is gone with it (502, 504).  An `X-Forwarded-For` is not heeded: the client is whoever has connected, or
who a PROXY header says.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any, Final

from ..access import AccessRecord, Line
from ..core.atoms import Template, Who
from ..core.connection import Connection
from ..core.exchange import Exchange, request_id
from ..core.glance import glance
from ..core.records import IPV4, IPV6, PROXIED
from ..log_files import Descriptors
from ..logs import answer_logger
from ..settings import Settings

#: What is looked at of a request (bytes): its line and its fields, if they are as usual.
_HEAD: Final = 16384


class AnswerLog:
    """On the engine's loop.  Writes to `logger`."""

    def __init__(self, logger: logging.Logger, format: str | None) -> None:
        self._logger = logger
        self._line = None if format is None else Line(Template(format, Who(None, None, os.getpid())))

    @classmethod
    def of(cls, settings: Settings, places: Descriptors) -> AnswerLog | None:
        """None if nobody wants to read it."""
        logger = answer_logger(settings, places)
        return None if logger is None else cls(logger, settings.access_logformat)

    def answered(self, connection: Connection, response: bytes, waited: float | None) -> None:
        """`response` is about to be sent, to a client that has waited in vain for so many seconds; None: a worker has
        read what it said."""
        scope = glance(b"" if waited is None else _seen(connection.fd))
        scope["client"] = _client(connection)
        exchange = Exchange(scope, request_id(scope["headers"]), waited, time.monotonic())
        exchange.status, exchange.service_time = int(response[9:12]), None if waited is None else 0.0
        head, _, body = response.partition(b"\r\n\r\n")
        exchange.sent = len(body)
        pairs = (field.partition(b": ") for field in head.split(b"\r\n")[1:])
        exchange.headers = [(name, value) for name, _, value in pairs]
        self._logger.handle(AccessRecord(exchange, self._line))


def _seen(fd: int) -> bytes:
    # Borrowed, not copied.
    sock = socket.socket(fileno=fd)
    try:
        return sock.recv(_HEAD, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return b""
    finally:
        sock.detach()


def _client(connection: Connection) -> tuple[str, Any] | None:
    family = connection.family & ~PROXIED
    if family == IPV4:
        return socket.inet_ntop(socket.AF_INET, connection.client[12:]), connection.port
    return (socket.inet_ntop(socket.AF_INET6, connection.client), connection.port) if family == IPV6 else None
