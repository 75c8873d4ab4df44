"""Applications with a lifespan that fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from examples import asgi_app


@contextlib.asynccontextmanager
async def _fails(app: Starlette) -> AsyncIterator[None]:
    if app.routes == []:
        raise RuntimeError("the lifespan's own trouble")
    yield


@contextlib.asynccontextmanager
async def _fails_late(app: Starlette) -> AsyncIterator[None]:
    yield
    raise RuntimeError("the shutdown's own trouble")


fails_at_startup = Starlette(lifespan=_fails)
fails_at_shutdown = Starlette(routes=asgi_app.app.routes, lifespan=_fails_late)
