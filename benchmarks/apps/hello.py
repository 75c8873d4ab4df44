"""The least an ASGI application can do: what is measured with it is the server."""

from __future__ import annotations

from benchmarks.apps.common import Receive, Scope, Send, lifespan, pid

BODY = b"hello world\n"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["path"] == "/pid":
        await pid(send)
    else:
        await send(START)
        await send(END)
