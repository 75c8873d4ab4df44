"""Applications whose requests take as long as the client says: `/work?ms=MILLISECONDS`.

`block` holds the event loop that long without using the processor, `awaiting` first awaits and then uses the processor
that long, `post` reads the request's body and then is `block`.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.apps.common import Receive, Scope, Send, lifespan, pid

BODY = b"hello world\n"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}
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


async def answer(send: Send) -> None:
    await send(START)
    await send(END)


async def block(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        hold(seconds(scope))
        await answer(send)


async def awaiting(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        await asyncio.sleep(AWAIT_SECONDS)
        burn(seconds(scope))
        await answer(send)


async def post(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        while (await receive()).get("more_body"):
            pass
        hold(seconds(scope))
        await answer(send)
