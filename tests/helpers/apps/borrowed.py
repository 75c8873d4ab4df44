"""The application of the tests with what is awkward for whoever takes connections back after every response."""

from __future__ import annotations

import os
import time

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from examples import asgi_app
from tests.helpers.apps import full


class Midway:
    """Raises when the response has begun; its client has had 4 bytes of 10."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("the handler's own trouble")


class Early:
    """Answers without having read anything."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("early")(scope, receive, send)


def _background() -> None:
    asgi_app.logger.info("The background is done")


async def background(request: Request) -> PlainTextResponse:
    return PlainTextResponse("foreground", background=BackgroundTask(_background))


async def empty(request: Request) -> Response:
    return Response(status_code=204)


async def until(request: Request) -> PlainTextResponse:
    """Holds the event loop until there is such a file."""
    asgi_app.logger.info("The loop is held")
    _hold(request.query_params["path"])
    return PlainTextResponse("released")


def _hold(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


app = Starlette(
    routes=[
        *full.app.routes,
        Route("/midway", Midway()),
        Route("/early", Early(), methods=["POST"]),
        Route("/background", background),
        Route("/empty", empty),
        Route("/until", until),
    ]
)
