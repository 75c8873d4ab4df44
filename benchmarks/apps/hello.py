"""The least an ASGI application can do: what is measured with it is the server."""

from __future__ import annotations

from benchmarks.apps.common import END, START, Receive, Scope, Send, lifespan, pid


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        await send(START)
        await send(END)
