"""What every benchmark application answers besides its own job: the lifespan protocol, and `/pid`."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY = b"hello world\n"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))],
}
END = {"type": "http.response.body", "body": BODY}
PID = b"%d\n" % os.getpid()
HOLD_SECONDS = 0.05


async def lifespan(receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def pid(send: Send) -> None:
    """Tell which process answers, and hold its event loop meanwhile.

    A client that opens connections a little apart thereby meets every worker, also where the kernel chooses: whoever
    is busy cannot take the next one.
    """
    hold_the_event_loop()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(PID))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": PID})


def hold_the_event_loop() -> None:
    time.sleep(HOLD_SECONDS)
