"""A line of the access log: as a record of Python's logging, and as text in uvicorn's look."""

from __future__ import annotations

import http
import logging
import time
from contextvars import ContextVar
from typing import Any, Final

import click

from .core.atoms import Template
from .core.exchange import Exchange

#: What the request is called that the current task serves, where that is known.
request_id: Final[ContextVar[str | None]] = ContextVar("clusterserve_request_id", default=None)

#: The logger's name, and what a record of uvicorn's says: its formatter, and those of other people's, read the latter.
LOGGER: Final = "uvicorn.access"
MESSAGE: Final = '%s - "%s %s HTTP/%s" %d'

_COLOURS: Final = {1: "bright_white", 2: "green", 3: "yellow", 4: "red", 5: "bright_red"}
_PHRASES: Final = {status.value: status.phrase for status in http.HTTPStatus}


class AccessRecord(logging.LogRecord):
    """One request that is over.  Its arguments are those of uvicorn's records, its message is the template's line."""

    def __init__(self, exchange: Exchange, line: Line | None) -> None:
        method, target = exchange.method or "-", exchange.target or "-"
        args = (exchange.client, method, target, exchange.protocol[5:], exchange.status)
        super().__init__(LOGGER, logging.INFO, __file__, 0, MESSAGE, args, None)
        self.exchange = exchange
        self._line = line

    def getMessage(self) -> str:  # noqa: N802 - logging's
        return super().getMessage() if self._line is None else self._line.of(self.exchange)

    def fields(self) -> dict[str, Any]:
        """What the JSON log says of it besides what it says of every record."""
        exchange = self.exchange
        queue, service = exchange.queue_time, exchange.service_time
        known = bool(exchange.method)
        fields: dict[str, Any] = {
            "request_id": exchange.request_id or None,
            "client": exchange.client or None,
            "method": exchange.method if known else None,
            "path": exchange.path if known else None,
            "query": exchange.query.decode("latin-1") if known else None,
            "protocol": exchange.protocol if known else None,
            "status": exchange.status,
            "bytes": exchange.sent,
            "queue_time": None if queue is None else round(queue, 6),
            "service_time": None if service is None else round(service, 6),
            "referer": exchange.header(b"referer"),
            "user_agent": exchange.header(b"user-agent"),
        }
        if exchange.scope["type"] == "websocket":
            fields["close_code"] = exchange.close_code
        return fields


class Line:
    """A template of gunicorn's, and the time it is filled in with."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._second = 0
        self._time = ""

    def of(self, exchange: Exchange) -> str:
        if self._template.timed and (now := int(time.time())) != self._second:
            self._second, self._time = now, time.strftime("[%d/%b/%Y:%H:%M:%S %z]")
        return self._template.filled(exchange, self._time)


class AccessFormatter(logging.Formatter):
    """uvicorn's look, at a third of the time: `INFO:     127.0.0.1:5000 - "GET / HTTP/1.1" 200 OK`."""

    def __init__(self, use_colors: bool) -> None:
        super().__init__()
        self._prefix = click.style("INFO", fg="green") if use_colors else "INFO"
        self._use_colors = use_colors

    def format(self, record: logging.LogRecord) -> str:
        arguments: Any = record.args
        client, method, target, version, status = arguments
        request, answer = f"{method} {target} HTTP/{version}", f"{status} {_PHRASES.get(status, '')}"
        if self._use_colors:
            request = click.style(request, bold=True)
            colour = _COLOURS.get(status // 100)
            answer = click.style(answer, fg=colour) if colour else answer
        return f'{self._prefix}:     {client} - "{request}" {answer}'
