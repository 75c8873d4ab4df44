"""What the tests of the log ask for; plain ASGI, and nothing between it and the server."""

from __future__ import annotations

import logging
import os
import time
from typing import Any
from urllib.parse import parse_qs

logger = logging.getLogger("uvicorn.error")
unconfigured = logging.getLogger("the.applications.own")


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await _websocket(scope, receive, send)
    else:
        await _http(scope, receive, send)


async def _http(scope: dict[str, Any], receive: Any, send: Any) -> None:
    path, query = scope["path"], parse_qs(scope["query_string"].decode())
    name = scope["extensions"]["clusterserve"].get("request_id", "none")
    if path == "/raise":
        raise RuntimeError("the handler's own trouble")
    if path == "/nothing":
        return
    if path == "/wait":
        logger.info("It waits")
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if path == "/hold":
        logger.info("The loop is held")
        _hold(query["until"][0])
    elif path == "/say":
        unconfigured.warning("said for %s", name)
    body = name.encode()
    status = int(query.get("status", ["200"])[0])
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _websocket(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await receive()
    if scope["path"] == "/refused":
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["text"] == "end":
            await send({"type": "websocket.close", "code": 4001})
            return
        await send({"type": "websocket.send", "text": message["text"]})


def _hold(until: str) -> None:
    while not os.path.exists(until):
        time.sleep(0.01)
