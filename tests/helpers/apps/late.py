"""The example application, whose start takes until the file named by GO_FILE exists, in every slot but the first.

WAIT_IN says where it waits: in the import, which holds the process, or in the lifespan, which does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from examples import asgi_app

late = os.environ.get("CLUSTERSERVE_WORKER_SLOT") != "0"


def _may_go() -> bool:
    return os.path.exists(os.environ["GO_FILE"])


def _announce() -> None:
    asgi_app.logger.info("The start takes its time")


if late and os.environ["WAIT_IN"] == "import":
    _announce()
    while not _may_go():
        time.sleep(0.005)


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    if late and os.environ["WAIT_IN"] == "lifespan":
        _announce()
        while not _may_go():  # noqa: ASYNC110 - a file is what a test can make
            await asyncio.sleep(0.005)
    async with asgi_app.lifespan(app):
        yield


app = Starlette(routes=asgi_app.app.routes, lifespan=_lifespan)
