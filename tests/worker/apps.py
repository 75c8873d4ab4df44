"""What a worker process serves here: JSON about the process itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from clusterserve import current_worker

_CHILD = """if True:
    import json, os, signal
    from clusterserve import current_worker
    print(json.dumps({
        "variables": [name for name in os.environ if name.startswith("CLUSTERSERVE")],
        "worker": repr(current_worker()),
        "sockets": sum(os.readlink(f"/proc/self/fd/{n}").startswith("socket:") for n in (3, 4, 5, 6, 7, 8, 9, 10)
                       if os.path.exists(f"/proc/self/fd/{n}")),
        "deaf": [n.name for n in signal.Signals if signal.getsignal(n) == signal.SIG_IGN],
    }))
"""


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http", "no lifespan here"
    body = json.dumps(await globals()[scope["path"].strip("/")]()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def me() -> object:
    worker = current_worker()
    assert worker is not None
    return {"id": worker.id, "slot": worker.slot, "pid": worker.pid, "real": os.getpid()}


async def environ() -> object:
    return dict(os.environ)


async def path() -> object:
    return sys.path


async def child() -> object:
    """What a process finds that the application starts, descriptors included as far as they are handed down."""
    code = [sys.executable, "-c", _CHILD]
    found = await asyncio.to_thread(subprocess.run, code, close_fds=False, check=True, stdout=subprocess.PIPE)
    return json.loads(found.stdout)


async def block() -> object:
    """Holds the event loop, and does not let go."""
    print("in the handler", flush=True)
    while True:
        time.sleep(3600)  # noqa: ASYNC251 - that is what it is for


def in_a_thread() -> None:
    time.sleep(3600)


async def threads() -> object:
    await asyncio.to_thread(in_a_thread)
    return None


async def count_threads() -> object:
    return threading.active_count()


async def busy() -> object:
    print("in the handler", flush=True)
    while True:
        pass


async def wait() -> object:
    print("in the handler", flush=True)
    await asyncio.Event().wait()
    return None
