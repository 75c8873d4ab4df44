"""Applications whose requests take as long as the client says: `/work?ms=MILLISECONDS`.

`block` holds the event loop that long without using the processor, `burning` uses the processor that long, `awaiting`
first awaits and then uses the processor, `post` reads the request's body and then is `block`.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.apps.common import END, START, Application, Receive, Scope, Send, lifespan, pid

AWAIT_SECONDS = 0.05


def seconds(scope: Scope) -> float:
    """How long the client wants this request to take."""
    return float(scope["query_string"].partition(b"ms=")[2] or 0) / 1000


def hold(duration: float) -> None:
    if duration:
        time.sleep(duration)


def burn(duration: float) -> None:
    """Use so much processor time, which takes longer when others want the processor too."""
    end = time.thread_time() + duration
    while time.thread_time() < end:
        pass


def application(serve: Application) -> Application:
    """`serve` for requests, and what the benchmarks ask beside them."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["path"] == "/pid":
            await pid(send)
        else:
            await serve(scope, receive, send)
            await send(START)
            await send(END)

    return call


@application
async def block(scope: Scope, receive: Receive, send: Send) -> None:
    hold(seconds(scope))


@application
async def burning(scope: Scope, receive: Receive, send: Send) -> None:
    burn(seconds(scope))


@application
async def awaiting(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(AWAIT_SECONDS)
    burn(seconds(scope))


@application
async def post(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    hold(seconds(scope))
