"""The same work under starlette: `thread` in a `def` endpoint, `middleware` behind a BaseHTTPMiddleware."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from benchmarks.apps.common import BODY, PID, hold_the_event_loop
from benchmarks.apps.work import hold, seconds


async def tell_pid(request: Request) -> Response:
    hold_the_event_loop()
    return PlainTextResponse(PID)


def in_a_thread(request: Request) -> Response:
    hold(seconds(request.scope))
    return PlainTextResponse(BODY)


async def on_the_loop(request: Request) -> Response:
    hold(seconds(request.scope))
    return PlainTextResponse(BODY)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


thread = Starlette(routes=[Route("/pid", tell_pid), Route("/work", in_a_thread, methods=["GET", "POST"])])
middleware = Starlette(
    routes=[Route("/pid", tell_pid), Route("/work", on_the_loop, methods=["GET", "POST"])],
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)],
)
