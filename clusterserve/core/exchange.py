"""`Exchange`: one request and its response, or one WebSocket, as the access log tells it.

Filled in while it is served, read once when it is over.  Times are seconds.  What the client chose (path, headers) is
kept as it came; whoever writes it into a line makes it harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import quote

#: The header in which a proxy says how it calls the request.
REQUEST_ID: Final = b"x-request-id"

#: What is taken for such a name: what UUIDs, ULIDs, trace ids and proxies' own consist of, and nothing that could be
#: more than one word of a line.
_ACCEPTABLE: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.:+/=@-]{0,127}")

#: Nobody was left to answer: nginx's number for it.
CLIENT_LEFT: Final = 499


class Exchange:
    """`scope` is ASGI's, of which the target is read at once (frameworks move it), and the client at the end, when the
    headers of a proxy have been heeded."""

    __slots__ = (
        "began",
        "close_code",
        "headers",
        "path",
        "query",
        "queue_time",
        "request_id",
        "scope",
        "sent",
        "service_time",
        "status",
    )  # fmt: skip

    def __init__(self, scope: dict[str, Any], request_id: str, queue_time: float | None, began: float) -> None:
        self.scope = scope
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.request_id = request_id
        #: How long the connection waited for a worker before this request; None: it was with the worker already.
        self.queue_time = queue_time
        #: When the application was called, on a clock of the caller's.
        self.began = began
        #: From there to the end of the response; None: nobody knows.
        self.service_time: float | None = 0.0
        #: Of the response; of a WebSocket 101, once it is accepted.  0: none yet.
        self.status = 0
        self.headers: Iterable[tuple[bytes, bytes]] = ()
        #: Of the response's body, or of a WebSocket's messages, in bytes.
        self.sent = 0
        #: Of a WebSocket that was accepted.
        self.close_code: int | None = None

    @property
    def method(self) -> str:
        """Empty: nobody knows what was asked."""
        # A WebSocket's scope has none.
        return str(self.scope.get("method", "GET"))

    @property
    def line(self) -> str | None:
        """The first line of the request; None if nobody knows it."""
        return f"{self.method} {self.target} {self.protocol}" if self.method else None

    @property
    def protocol(self) -> str:
        return f"HTTP/{self.scope.get('http_version', '1.1')}"

    @property
    def target(self) -> str:
        """The path and the query as uvicorn's access log has them."""
        return f"{quote(self.path)}?{self.query.decode('latin-1')}" if self.query else quote(self.path)

    @property
    def client(self) -> str:
        """HOST:PORT; empty for one without an address (unix sockets)."""
        client = self.scope.get("client")
        return f"{client[0]}:{client[1]}" if client else ""

    def header(self, name: bytes) -> str | None:
        """Of the request; several of the name are joined."""
        return value_of(self.scope["headers"], name)


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The value of a header, `name` being in lower case; None without one."""
    found = [value for key, value in headers if key.lower() == name]
    return b", ".join(found).decode("latin-1") if found else None


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """What the client, or a proxy, calls the request; empty if it says nothing, or nothing acceptable."""
    for key, value in headers:
        if key == REQUEST_ID:
            return value.decode("ascii") if _ACCEPTABLE.fullmatch(value) else ""
    return ""
