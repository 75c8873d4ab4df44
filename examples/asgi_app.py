"""The example application: one route for each thing that web servers are asked to do.

    clusterserve examples.asgi_app:app --policy rr --workers 4

It also runs under plain uvicorn; then there is no worker id and no slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

import clusterserve

LONGEST_MS = 24 * 60 * 60 * 1000

# uvicorn configures this logger, so what an application says there is seen without any set-up.
logger = logging.getLogger("uvicorn.error")


def who() -> str:
    worker = clusterserve.current_worker()
    if worker is None:
        return f"no worker of a cluster (pid {os.getpid()})"
    return f"worker {worker.id} (slot {worker.slot}, pid {worker.pid})"


def number(connection: HTTPConnection, name: str, default: int, highest: int) -> int:
    """A query parameter as a whole number from 0 to `highest`; anything else is the client's fault: 400."""
    text = connection.query_params.get(name)
    if text is None:
        return default
    # isdecimal() alone lets other scripts' digits through, and int() alone signs, blanks and underscores.
    if not (text.isascii() and text.isdecimal() and len(text) <= 12 and int(text) <= highest):
        raise HTTPException(400, f"{name} must be a whole number from 0 to {highest}, not {text[:40]!r}\n")
    return int(text)


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"Hello from {who()}\n")


async def whoami(request: Request) -> JSONResponse:
    worker = clusterserve.current_worker()
    if worker is None:
        return JSONResponse({"id": None, "slot": None, "pid": os.getpid()})
    return JSONResponse({"id": worker.id, "slot": worker.slot, "pid": worker.pid})


async def sleep(request: Request) -> PlainTextResponse:
    """Waits as a well-behaved handler does: the worker goes on with other requests meanwhile."""
    milliseconds = number(request, "ms", 1000, LONGEST_MS)
    await asyncio.sleep(milliseconds / 1000)
    return PlainTextResponse(f"Slept {milliseconds} ms in {who()}\n")


async def block(request: Request) -> PlainTextResponse:
    """Waits as a handler must not: the worker can do nothing else meanwhile."""
    milliseconds = number(request, "ms", 1000, LONGEST_MS)
    time.sleep(milliseconds / 1000)  # noqa: ASYNC251 - holding the event loop is what this route is for
    return PlainTextResponse(f"Held the event loop {milliseconds} ms in {who()}\n")


class Echo:
    """Sends the body back chunk by chunk as it arrives, never holding more than one chunk.

    An ASGI application and not a Starlette endpoint, because a `StreamingResponse` reads the request's messages itself
    to learn of a disconnect, and so would swallow the body that is still to come.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        headers = [(b"content-type", request.headers.get("content-type", "application/octet-stream").encode("latin-1"))]
        if "content-length" in request.headers:
            headers.append((b"content-length", request.headers["content-length"].encode("latin-1")))
        started = False
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            # Only now: asking for the first chunk is what makes the server answer "Expect: 100-continue".
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            more = message.get("more_body", False)
            await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": more})
            if not more:
                return


async def pause(seconds: float, draining: asyncio.Event | None) -> bool:
    """Wait so long; False if the worker is to leave meanwhile."""
    if draining is None:
        await asyncio.sleep(seconds)
        return True
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(draining.wait(), seconds)
    return not draining.is_set()


async def stream(request: Request) -> StreamingResponse:
    """Server-sent events, for ever unless `n` says how many, or until the worker leaves.

    The client's EventSource comes back by itself, and to another worker.
    """
    seconds = number(request, "ms", 1000, LONGEST_MS) / 1000
    # An extension of clusterserve's; other servers have none.
    draining = request.scope.get("extensions", {}).get("clusterserve", {}).get("draining")
    ends = "n" in request.query_params
    ticks = range(1, number(request, "n", 0, 10**9) + 1) if ends else itertools.count(1)

    async def events() -> AsyncIterator[str]:
        for tick in ticks:
            if tick > 1 and not await pause(seconds, draining):
                return
            yield f"id: {tick}\ndata: {json.dumps({'tick': tick, 'from': who()})}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def websocket_echo(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("text") is not None:
            await websocket.send_text(message["text"])
        else:
            await websocket.send_bytes(message["bytes"])


async def crash(request: Request) -> PlainTextResponse:
    """Ends the process at once, with no answer, as a fault in a C extension would."""
    code = number(request, "code", 1, 255)
    os._exit(code)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    logger.info("The application starts in %s", who())
    yield
    logger.info("The application has ended in %s", who())


app = Starlette(
    routes=[
        Route("/", hello),
        Route("/whoami", whoami),
        Route("/sleep", sleep),
        Route("/block", block),
        Route("/echo", Echo(), methods=["POST"]),
        Route("/stream", stream),
        WebSocketRoute("/ws", websocket_echo),
        Route("/crash", crash),
    ],
    lifespan=lifespan,
)
