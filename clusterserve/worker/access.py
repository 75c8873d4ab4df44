"""Around the application: what the access log says of a request beyond what uvicorn's does.

uvicorn logs when a response starts.  How long it took and how much was sent is known at its end, so where the log's
format wants such things (`Settings.own_access_log`) uvicorn's own lines are off and these come instead, one for each
request when its response is complete, and one for each WebSocket when it is closed.  Otherwise nothing of this exists.

Relied upon (tests/worker/test_access.py): `send` is a method of uvicorn's, whose object has `transport`, and
`disconnected` for a request; what uvicorn answers to a client whose application has raised, or has said nothing; the
lines it writes about WebSockets.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Container
from typing import Any, Final

from ..access import AccessRecord, Line, request_id
from ..core.atoms import Template, Who
from ..core.exchange import CLIENT_LEFT, Exchange
from ..core.exchange import request_id as given_id
from ..core.excluded import Excluded
from ..settings import Settings
from .deadline import GATEWAY_TIMEOUT
from .draining import EXTENSION
from .refusals import REFUSAL, Refusals

#: What uvicorn sends in the place of a response that never began.
SERVER_ERROR: Final = b"Internal Server Error"

#: What uvicorn says of WebSockets, as errors' neighbours; the access log has them instead.
WEBSOCKETS: Final = frozenset({'%s - "WebSocket %s" [accepted]', '%s - "WebSocket %s" 403', '%s - "WebSocket %s" %d'})

#: The close code of a WebSocket that ends without one (RFC 6455, 7.1.5).
NO_CODE: Final = 1006

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Access:
    """Writes to `logger`, which is not uvicorn's."""

    def __init__(self, logger: logging.Logger, settings: Settings, who: Who) -> None:
        self._logger = logger
        text = settings.access_logformat
        self._line = None if text is None else Line(Template(text, who))
        #: Who tells of the requests that no application has answered.
        self.refusals = Refusals(logger, self._line, own=True)
        self._excluded = Excluded(settings.access_log_exclude)
        #: The tasks that `Deadline` has ended, and answered for.
        self.overdue: Container[asyncio.Task[None]] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        """For uvicorn's other logger: leave out what stands in the access log."""
        return record.msg not in WEBSOCKETS

    def wrapped(self, app: Any) -> Any:
        """`app`, of whose requests each is logged.  Goes inside of what sets the extension."""

        def call(scope: dict[str, Any], receive: Receive, send: Send) -> Any:
            if scope["type"] == "http":
                return self._http(app, scope, receive, send)
            if scope["type"] == "websocket":
                return self._websocket(app, scope, receive, send)
            return app(scope, receive, send)

        return call

    async def _http(self, app: Any, scope: dict[str, Any], receive: Receive, send: Send) -> Any:
        exchange = self._began(scope, send)
        over = False

        async def told(message: Any) -> None:
            nonlocal over
            await send(message)
            if message["type"] == "http.response.start":
                exchange.status, exchange.headers = message["status"], message.get("headers", ())
            elif message["type"] == "http.response.body":
                exchange.sent += len(message.get("body", b""))
                if not message.get("more_body", False) and not over:
                    # Not when the application returns: it may have more to do.
                    over = True
                    self._answered(exchange, send)

        try:
            return await app(scope, receive, told)
        finally:
            if not over:
                self._unanswered(exchange, send)
                self._answered(exchange, send)

    async def _websocket(self, app: Any, scope: dict[str, Any], receive: Receive, send: Send) -> Any:
        exchange = self._began(scope, send)
        over = False

        def closed(code: int | None) -> None:
            nonlocal over
            if not over:
                over = True
                exchange.close_code = code if exchange.status == 101 else None
                self._over(exchange)

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "websocket.disconnect" and exchange.status:
                closed(message.get("code", NO_CODE))
            return message

        async def told(message: Any) -> None:
            await send(message)
            kind = message["type"]
            if kind == "websocket.accept":
                exchange.status, exchange.headers = 101, message.get("headers", ())
            elif kind == "websocket.send":
                exchange.sent += len(message.get("bytes") or (message.get("text") or "").encode())
            elif kind == "websocket.http.response.start":
                exchange.status, exchange.headers = message["status"], message.get("headers", ())
            elif kind == "websocket.http.response.body":
                exchange.sent += len(message.get("body", b""))
            elif kind == "websocket.close":
                exchange.status = exchange.status or 403
                closed(message.get("code", 1000))

        try:
            return await app(scope, heard, told)
        finally:
            exchange.status = exchange.status or 500
            closed(NO_CODE)

    def _began(self, scope: dict[str, Any], send: Send) -> Exchange:
        now = time.monotonic()
        name = given_id(scope["headers"]) or os.urandom(16).hex()
        # For every record that is made on behalf of this request, uvicorn's own of what it raises included.
        request_id.set(name)
        extensions = scope["extensions"]
        extensions[EXTENSION] = {**extensions[EXTENSION], "request_id": name}
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        waited = getattr(transport, "queue_time", None)
        return Exchange(scope, name, None if waited is None else waited(now), now)

    def _unanswered(self, exchange: Exchange, send: Send) -> None:
        """What becomes of a request whose application has ended, or raised, before its response has."""
        if exchange.status:
            return
        task = asyncio.current_task()
        if task is not None and task in self.overdue:
            exchange.status, exchange.sent = 504, len(GATEWAY_TIMEOUT.partition(b"\r\n\r\n")[2])
        elif getattr(getattr(send, "__self__", None), "disconnected", False):
            exchange.status = CLIENT_LEFT
        else:
            exchange.status, exchange.sent = 500, len(SERVER_ERROR)

    def _answered(self, exchange: Exchange, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if getattr(cycle, "disconnected", False):
            # Whatever the application has sent since nobody has heard.
            exchange.status, exchange.sent = getattr(cycle, REFUSAL, (exchange.status, exchange.sent))
        self._over(exchange)

    def _over(self, exchange: Exchange) -> None:
        if self._excluded(exchange.path, exchange.status):
            return
        exchange.service_time = time.monotonic() - exchange.began
        if exchange.method == "HEAD":
            exchange.sent = 0
        self._logger.handle(AccessRecord(exchange, self._line))
