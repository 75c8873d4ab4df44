"""Says what it is asked on stdout, as an application does that was never told about logging."""

from __future__ import annotations

import os
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    print("printed:", scope["path"])
    body = f"{os.getgid()} {os.getgroups()}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})
