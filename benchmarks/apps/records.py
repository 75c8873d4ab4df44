"""An application with a lot in memory from its import on: Python objects, BENCHMARK_MIB (200) of them.

Each request reads a hundred of them, at random: reading writes their reference counts.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from benchmarks.apps.common import HOLD_SECONDS, Receive, Scope, Send, lifespan
from benchmarks.apps.work import hold

READ = 100
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def records(size: int) -> list[dict[str, object]]:
    """So many bytes of them."""
    enough = resident() + size
    made: list[dict[str, object]] = []
    while resident() < enough:
        made += [
            {
                "id": number,
                "name": f"record {number}",
                "tags": [f"tag {number % 100}", str(number)],
                "price": number / 7,
            }
            for number in range(len(made), len(made) + 1000)
        ]
    return made


RECORDS = records(int(os.environ.get("BENCHMARK_MIB", "200")) << 20)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    if scope["path"] == "/pid":
        # As in `common`, where the answer would be the process that has imported it.
        hold(HOLD_SECONDS)
        body = b"%d\n" % os.getpid()
    else:
        body = b"%d\n" % sum(len(str(each["name"])) for each in random.choices(RECORDS, k=READ))
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
