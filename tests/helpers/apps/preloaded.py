"""What a preloaded application knows of itself: who imported it, and who serves it.

`SOURCE` is the same as a text, for tests that write new code into a file.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from pathlib import Path

IMPORTED_BY = os.getpid()
VERSION = "one"


async def app(scope, receive, send):  # type: ignore[no-untyped-def]
    """`/block`: hold the loop for ever; anything else: the facts, as JSON."""
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    if scope["path"] == "/block":
        time.sleep(3600)  # noqa: ASYNC251 - that is what it is for
    if scope["path"].startswith("/exit/"):
        os._exit(int(scope["path"][6:]))
    facts = {
        "version": VERSION,
        "imported_by": IMPORTED_BY,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "slot": os.environ.get("CLUSTERSERVE_WORKER_SLOT"),
        "lifespan": _started_in,
        "random": random.random(),
        "uuid": str(uuid.uuid4()),
    }
    body = json.dumps(facts).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_started_in = 0


async def _lifespan(receive, send):  # type: ignore[no-untyped-def]
    global _started_in
    await receive()
    _started_in = os.getpid()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def make():  # type: ignore[no-untyped-def]
    """A factory, which counts how often it was called."""
    return app


SOURCE = Path(__file__).read_text()
