"""A response that begins with the worker's process id and then stays open until the client leaves."""

from __future__ import annotations

from benchmarks.apps.common import PID, Receive, Scope, Send, lifespan, pid

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        await send(START)
        await send({"type": "http.response.body", "body": PID, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
