"""The example application with a lifespan whose shutdown never ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from examples import asgi_app


@contextlib.asynccontextmanager
async def _never_ends(app: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.Event().wait()


app = Starlette(routes=asgi_app.app.routes, lifespan=_never_ends)
