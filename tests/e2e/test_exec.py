"""`clusterserve exec`, and what programs serve with: the stacks that know nothing of us, under every policy."""

from __future__ import annotations

import asyncio
import os
import signal
import textwrap
from pathlib import Path

import httpx
import pytest
import websockets

from tests.conformance.helpers import PATIENCE, Recorder, Scene, ask
from tests.helpers.server import WORKER_LISTENS, Serve, run

START_SERVER = """
import asyncio, os, sys

async def answer(reader, writer):
    await reader.readline()
    writer.write(" ".join([str(os.getpid()), *sys.argv[1:]]).encode())
    writer.close()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    # At once: the other worker writes there too.
    os.write(1, b"port %d\\n" % server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(START_SERVER)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


class TestCommandLine:
    def test_it_runs_a_program_in_each_worker(self, serve: Serve, script: Path) -> None:
        server = serve("-w", "2", str(script), "-w", "7", app="exec", bind=None, workers=None, ready=False)
        pids = {int(found[3]) for found in server.wait_for(WORKER_LISTENS, count=2)}
        (port,) = {found[1] for found in server.wait_for(r"^port (\d+)$", count=2)}
        answers = [asyncio.run(ask(int(port))) for _ in range(4)]
        assert {answer.partition(" ")[2] for answer in answers} == {"-w 7"}
        assert {int(answer.split()[0]) for answer in answers} == pids
        os.kill(next(iter(pids)), signal.SIGKILL)
        server.wait_for(WORKER_LISTENS, count=3)
        server.signal(signal.SIGHUP)
        server.wait_for(WORKER_LISTENS, count=5)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0

    def test_a_module_with_all_that_follows_for_itself(self, tmp_path: Path) -> None:
        (tmp_path / "tool.py").write_text("import sys; sys.exit(f'tool {sys.argv[1:]}')")
        finished = run("exec", "--log-level", "critical", "-m", "missing.tool", cwd=tmp_path)
        assert finished.code == 3
        assert "there is no module 'missing.tool'" in finished.text

    def test_one_that_is_no_program(self, script: Path) -> None:
        script.write_text("def (:")
        finished = run("exec", str(script))
        assert finished.code == 3
        assert "is no Python program" in finished.text
        assert "SyntaxError" in finished.text

    @pytest.mark.parametrize(
        ("argv", "reason"),
        [
            ([], "no program given; say what to run, as in: clusterserve exec script.py, or exec -m module"),
            (["nowhere.py"], "there is no program 'nowhere.py'"),
            (["-m"], "-m needs the name of a module"),
            (["--bind", ":1", "x.py"], "--bind is for applications: a program says itself where it listens"),
            (["--factory", "x.py"], "--factory is for applications, and exec runs a program"),
            (["-w", "0", "pyproject.toml"], "--workers 0: must be a whole number of at least 1, or 'auto'"),
        ],
    )
    def test_what_cannot_be_costs_one_line(self, argv: list[str], reason: str) -> None:
        finished = run("exec", *argv)
        assert (finished.code, finished.text.strip()) == (2, f"clusterserve: error: {reason}")


# ── stacks ──────────────────────────────────────────────────────────────────────────────────────────────────────────

UVICORN = """
import uvicorn

async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

uvicorn.run(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
"""

AIOHTTP = """
from aiohttp import web

async def main():
    app = web.Application()
    async def answer(request):
        return web.Response(text=str(os.getpid()))
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await forever()
asyncio.run(main())
"""

WEBSOCKETS = """
import websockets

async def answer(connection):
    async for message in connection:
        await connection.send(f"{os.getpid()} {message}")

async def main():
    async with websockets.serve(answer, "127.0.0.1", 0) as server:
        await server.serve_forever()
asyncio.run(main())
"""


async def http(port: int) -> str:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        return (await client.get(f"http://127.0.0.1:{port}/")).text


async def websocket(port: int) -> str:
    async with websockets.connect(f"ws://127.0.0.1:{port}") as client:
        await client.send("hello")
        pid, hello = str(await client.recv()).split()
        assert hello == "hello"
        return pid


STACKS = {"uvicorn": (UVICORN, http), "aiohttp": (AIOHTTP, http), "websockets": (WEBSOCKETS, websocket)}


@pytest.mark.parametrize("policy", ["rr", "least", "none"])
@pytest.mark.parametrize("stack", STACKS)
def test_stacks_are_clustered_without_knowing(scene: Scene, stack: str, policy: str) -> None:
    source, client = STACKS[stack]

    async def main() -> None:
        async with scene.cluster(textwrap.dedent(source), policy=policy) as (cluster, told):
            workers = [cluster.fork(), cluster.fork()]
            await told.until("listening", count=2)
            (port,) = {each.details[0].port for each in told.every("listening")}
            served = {await client(port) for _ in range(8)}
            pids = {str(worker.pid) for worker in workers}
            assert served == pids if policy == "rr" else served <= pids
            workers[0].disconnect()
            await told.until("exit", workers[0])
            assert told.the("exit", workers[0]).details == (0, None)
            assert {await client(port) for _ in range(3)} == {str(workers[1].pid)}
            await cluster.disconnect()
            assert told.the("exit", workers[1]).details == (0, None)

    scene.run(main())


@pytest.mark.parametrize("policy", ["rr", "none"])
def test_a_websocket_goes_on_until_it_is_closed(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(textwrap.dedent(WEBSOCKETS), policy=policy) as (cluster, told):
            worker = cluster.fork()
            (listening,) = await told.until("listening", worker)
            await talk(told, worker.id, f"ws://127.0.0.1:{listening.details[0].port}", worker.disconnect)
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (0, None)

    async def talk(told: Recorder, worker: int, url: str, disconnect: object) -> None:
        async with websockets.connect(url) as client:
            await client.send("one")
            assert str(await client.recv()).endswith(" one")
            assert callable(disconnect)
            disconnect()
            await told.when(lambda: [each for each in told.every("draining") if each.worker == worker], "it drains")
            await client.send("two")
            assert str(await client.recv()).endswith(" two")
            assert told.every("disconnect") == []

    scene.run(main())


BLOCKED = """
async def answer(reader, writer):
    await reader.readline()
    time.sleep(3600)

async def main():
    async with await asyncio.start_server(answer, "127.0.0.1", 0):
        await forever()
asyncio.run(main())
"""


def test_a_program_whose_servers_loop_stands_still_is_replaced(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(BLOCKED, timeout=1.0, respawn=True, workers=1) as (cluster, told):
            (worker,) = cluster.workers.values()
            (listening,) = await told.until("listening", worker)
            _, writer = await asyncio.open_connection("127.0.0.1", listening.details[0].port)
            writer.write(b"hello\n")
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (None, signal.SIGABRT)
            writer.close()

    scene.run(main())


def test_one_that_does_not_listen_may_stand_still(scene: Scene) -> None:
    source = """
    async def main():
        (await serve()).close()
    asyncio.run(main())
    time.sleep(2.5)
    say("awake")
    time.sleep(3600)
    """

    async def main() -> None:
        async with scene.cluster(source, timeout=1.0, respawn=True, workers=1) as (cluster, told):
            (worker,) = cluster.workers.values()
            await told.when(scene.said, "it has slept")
            assert not worker.is_dead()

    scene.run(main())
