"""The example application, and `/grow?mib=`, which keeps so much memory for good and tells the process's id."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from examples import asgi_app

_kept: list[bytes] = []


async def grow(request: Request) -> PlainTextResponse:
    # Not zeros: those the kernel gives only when they are touched.
    _kept.append(b"\1" * (asgi_app.number(request, "mib", 1, 1024) << 20))
    return PlainTextResponse(str(os.getpid()))


app = Starlette(routes=[*asgi_app.app.routes, Route("/grow", grow)])
