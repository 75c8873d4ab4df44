"""`Refusals`: the access log's lines of requests that uvicorn's protocols, or our limits, answer themselves.

400, 408, 414 and 431: uvicorn logs none of them, as the application has not answered.  What was asked is told as far as
it is known: nothing, if not even the first line is whole.  A request whose body was refused was the application's: its
own line (`Access`) says so where there is one, and where the access log is uvicorn's it has none yet, as nothing was
sent.  An `X-Forwarded-For` is not heeded before the application is called: the client is whoever has connected.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from ..access import LOGGER, AccessRecord, Line
from ..core.exchange import Exchange, request_id

#: What stands on a request of uvicorn's (its cycle) that was refused: the status, and the bytes of the answer's body.
REFUSAL: Final = "clusterserve_refusal"


class Refusals:
    """Writes to `logger`, as uvicorn does (`line` is None) or as `Access` does."""

    def __init__(self, logger: logging.Logger, line: Line | None = None, own: bool = False) -> None:
        self._logger = logger
        self._line = line
        self._own = own

    def of_head(self, asked: dict[str, Any], protocol: Any, answer: bytes) -> None:
        """The head was refused; `asked` is what `glance` makes of it."""
        asked.update(client=protocol.client, server=protocol.server, scheme=protocol.scheme)
        self._tell(asked, protocol.transport, *outline(answer))

    def of_body(self, cycle: Any, answer: bytes) -> None:
        """The body was refused before the application has begun its response."""
        if self._own:
            setattr(cycle, REFUSAL, outline(answer))
        else:
            self._tell(cycle.scope, cycle.transport, *outline(answer))

    def _tell(self, scope: dict[str, Any], transport: Any, status: int, sent: int) -> None:
        if not self._logger.isEnabledFor(logging.INFO) or not self._logger.hasHandlers():
            return
        now, waited = time.monotonic(), getattr(transport, "queue_time", None)
        exchange = Exchange(scope, request_id(scope["headers"]), None if waited is None else waited(now), now)
        exchange.status, exchange.sent = status, sent
        self._logger.handle(AccessRecord(exchange, self._line))


#: uvicorn's protocols ask its logger too whether anybody listens.
UVICORNS: Final = Refusals(logging.getLogger(LOGGER))


def outline(answer: bytes) -> tuple[int, int]:
    """Of a whole response: its status, and the length of its body."""
    return int(answer[9:12]), len(answer.partition(b"\r\n\r\n")[2])
