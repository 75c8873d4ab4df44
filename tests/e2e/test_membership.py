"""`current_worker()` in a worker that serves an application."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx
import pytest

from tests.conformance.helpers import PATIENCE, PRELUDE, Scene

APP = """
worker.on("listening", lambda address: say("listening", address.address, address.port > 0, worker.state))
worker.on("draining", lambda: say("draining", worker.state, worker.is_connected()))

@worker.on("disconnect")
async def disconnected():
    await asyncio.sleep(0.01)
    say("disconnect", worker.state, worker.is_connected(), worker.exited_after_disconnect)

async def app(scope, receive, send):
    if scope["type"] == "http":
        getattr(worker, scope["path"][1:])()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
"""

LIFE = [
    ["listening", "127.0.0.1", True, "listening"],
    ["draining", "draining", True],
    ["disconnect", "disconnected", False, True],
]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    (tmp_path / "member.py").write_text(PRELUDE + APP)
    return Scene(tmp_path)


@pytest.mark.parametrize("how", ["the master", "disconnect", "destroy"])
def test_its_life(scene: Scene, how: str) -> None:
    async def main() -> None:
        options = {"app": "member:app", "app_dir": str(scene.path), "bind": "127.0.0.1:0", "access_log": False}
        async with scene.cluster(**options) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            if how == "the master":
                worker.disconnect()
            else:
                async with httpx.AsyncClient(timeout=PATIENCE) as client:
                    assert (await client.get(f"{cluster.url}/{how}")).text == "done"
            await told.until("exit", worker)
            assert told.the("exit", worker).details == ((0, None) if how != "destroy" else (None, signal.SIGTERM))
            assert told.the("exit", worker).flag is True
            assert scene.said() == LIFE

    scene.run(main())
