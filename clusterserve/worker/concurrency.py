"""`--limit-concurrency`: what exceeds it, over all workers together, is answered 503.

Counted is what the application has not returned from: requests, their background tasks included, and WebSockets.  As an
application around the application it holds for every HTTP implementation, under every policy.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from ..channel.tally import Crowd

logger = logging.getLogger("uvicorn.error")

#: As uvicorn says it.
MESSAGE: Final = "Exceeded concurrency limit."
_BODY: Final = b"Service Unavailable"
_HEADERS: Final = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(_BODY)),
    (b"connection", b"close"),
]


def limited(app: Any, crowd: Crowd) -> Any:
    """The application, for as many at a time as `crowd` lets in."""

    async def limit(scope: Any, receive: Any, send: Any) -> Any:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            return await app(scope, receive, send)
        if not crowd.enter():
            logger.warning(MESSAGE)
            return await _refuse(scope, receive, send)
        try:
            return await app(scope, receive, send)
        finally:
            crowd.leave()

    return limit


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            # 403: this WebSocket implementation has no other answer.
            await send({"type": "websocket.close", "code": 1013})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": 503, "headers": _HEADERS})
    await send({"type": f"{kind}.body", "body": _BODY})
