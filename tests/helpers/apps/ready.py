"""Says whether it wants more clients, and which worker this is."""

from __future__ import annotations

import json
import os
from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    extension = scope["extensions"]["clusterserve"]
    stopping = extension["stopping"].is_set()
    told = {
        "stopping": stopping,
        "draining": extension["draining"].is_set(),
        "worker": extension["worker"],
        "slot": extension["slot"],
        "variable": os.environ["CLUSTERSERVE_WORKER_SLOT"],
        "pid": os.getpid(),
    }
    await send({"type": "http.response.start", "status": 503 if stopping else 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(told).encode()})
