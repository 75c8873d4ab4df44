"""The example application and what only tests want to ask for."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from examples import asgi_app


def pattern(size: int) -> bytes:
    """`size` bytes in which no piece looks like another, so that a lost or doubled piece is seen."""
    return hashlib.shake_128(b"clusterserve").digest(size)


class Bytes:
    """`?n=` bytes in messages of `?chunk=` bytes each (all in one without it); with `?length=1` their number first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        size = asgi_app.number(request, "n", 0, 1 << 28)
        step = asgi_app.number(request, "chunk", 0, 1 << 28) or size
        data = pattern(size)
        headers = [(b"content-type", b"application/octet-stream")]
        if asgi_app.number(request, "length", 1, 1):
            headers.append((b"content-length", str(size).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, size, step or 1):
            await send({"type": "http.response.body", "body": data[start : start + step], "more_body": True})
        await send({"type": "http.response.body"})


async def scope(request: Request) -> JSONResponse:
    """What the server says of the request."""
    names = ("http_version", "method", "scheme", "path", "root_path", "client", "server")
    return JSONResponse(
        {name: request.scope.get(name) for name in names}
        | {"query": request.scope["query_string"].decode(), "headers": [[k, v] for k, v in request.headers.items()]}
    )


async def fail(request: Request) -> PlainTextResponse:
    raise RuntimeError("the handler's own trouble")


async def hold(request: Request) -> PlainTextResponse:
    """Says so, and then holds the event loop for good."""
    asgi_app.logger.info("Holding the event loop of pid %d", os.getpid())
    threading.Event().wait()
    return PlainTextResponse("")


class Obstinate:
    """A stream that does not end by itself, whatever happens to its worker."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
            await asyncio.sleep(0.01)


async def deaf(websocket: WebSocket) -> None:
    """A WebSocket that does not hear of its end."""
    await websocket.accept()
    await asyncio.Event().wait()


app = Starlette(
    routes=[
        *asgi_app.app.routes,
        Route("/bytes", Bytes()),
        Route("/scope", scope),
        Route("/fail", fail),
        Route("/hold", hold),
        Route("/obstinate", Obstinate()),
        WebSocketRoute("/deaf", deaf),
    ],
    lifespan=asgi_app.lifespan,
)


def create_app() -> Starlette:
    """For `--factory`."""
    return app
