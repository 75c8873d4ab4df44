"""What the chaos clients ask: every response can be told from every other, and proves which request it belongs to.

`/KIND?id=ID&n=SIZE&ms=MILLISECONDS&chunk=BYTES`: the body is `content(ID, SIZE)`, the header `x-id` is the id, `x-sum`
the checksum of the request's body, and `x-from` whom the application takes for the client.  KIND is `plain`, `block`
(holds the event loop), `await`, or `early` (answers before it has read anything).  With `chunk` the response has no
length and comes in pieces.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def content(ident: str, size: int) -> bytes:
    """Bytes that no other id has."""
    return hashlib.shake_128(ident.encode()).digest(size)


def checksum(body: bytes) -> str:
    return f"{len(body)}-{zlib.crc32(body):08x}"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    kind, ident, size, seconds = scope["path"][1:], query["id"], int(query["n"]), float(query.get("ms", 0)) / 1000
    body = b""
    if kind != "early":
        pieces = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            pieces.append(message["body"])
            if not message["more_body"]:
                break
        body = b"".join(pieces)
    if kind == "block":
        hold(seconds)
    elif kind == "await":
        await asyncio.sleep(seconds)
    origin = b"%s:%d" % (scope["client"][0].encode(), scope["client"][1]) if scope.get("client") else b""
    await answer(send, ident, origin, checksum(body), content(ident, size), int(query.get("chunk", 0)))


def hold(seconds: float) -> None:
    time.sleep(seconds)


async def answer(send: Send, ident: str, origin: bytes, total: str, body: bytes, step: int) -> None:
    headers = [(b"x-id", ident.encode()), (b"x-sum", total.encode()), (b"x-pid", b"%d" % os.getpid())]
    headers.append((b"x-from", origin))
    if not step:
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body), step or len(body) or 1):
        piece = body[start : start + (step or len(body))]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if step:
            await asyncio.sleep(0)
    await send({"type": "http.response.body"})
