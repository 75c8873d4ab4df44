"""An application that wants to know whether its worker leaves; plain ASGI, and nothing between it and the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

logger = logging.getLogger("uvicorn.error")


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    draining = scope["extensions"]["clusterserve"]["draining"]
    if scope["type"] == "lifespan":
        await _lifespan(draining, receive, send)
    elif scope["type"] == "websocket":
        await _websocket(draining, scope, receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"waiting ", "more_body": True})
        await draining.wait()
        await send({"type": "http.response.body", "body": b"told", "more_body": False})


async def _lifespan(draining: asyncio.Event, receive: Any, send: Any) -> None:
    assert not draining.is_set()
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    assert draining.is_set()
    await send({"type": "lifespan.shutdown.complete"})


async def _websocket(draining: asyncio.Event, scope: dict[str, Any], receive: Any, send: Any) -> None:
    async def tell() -> None:
        await draining.wait()
        logger.info("The WebSocket was told")

    assert "websocket.http.response" in scope["extensions"]
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "waiting"})
    telling = asyncio.create_task(tell())
    while (await receive())["type"] != "websocket.disconnect":
        pass
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(telling, 1)
