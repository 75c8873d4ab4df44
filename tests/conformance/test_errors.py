"""Errors (E)."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys

import pytest

from tests.conformance.helpers import PATIENCE, Scene
from tests.conformance.puppets import (
    PUPPET,
    RefusedError,
    asked,
    askers,
    end,
    fault,
    free_port,
    puppet,
    puppets,
)

LOOPBACK = "127.0.0.1"
POLICIES = pytest.mark.parametrize("policy", ["rr", "none"])


@POLICIES
def test_E01_once_the_port_is_free_the_same_worker_has_it(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            with socket.create_server((LOOPBACK, 0)) as taken:
                port = taken.getsockname()[1]
                for _ in range(2):
                    error = await one.refused("listen", "a", LOOPBACK, port, {})
                    assert error.errno == errno.EADDRINUSE
                    assert f"cannot listen on {LOOPBACK}:{port}: address already in use" in error.text
            assert await one.listen("a", port) == port
            assert await asked((LOOPBACK, port)) == "1"
            await end(cluster, told, one)

    scene.run(main())


def test_E02_two_clusters_on_one_port(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (first, _), scene.cluster(PUPPET) as (second, _):
            one, two = await puppet(first), await puppet(second)
            port = await one.listen("a")
            assert (await two.refused("listen", "a", LOOPBACK, port, {})).errno == errno.EADDRINUSE
            assert await asked((LOOPBACK, port)) == "1"

    scene.run(main())


@POLICIES
def test_E03_one_worker_twice_on_one_port(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            port = await one.listen("a", free_port())
            error = await one.refused("listen", "b", LOOPBACK, port, {})
            assert error.errno == errno.EADDRINUSE
            assert "this worker listens there already" in error.text
            assert await askers(port, 5) == ["1"] * 5
            assert len(told.every("listening")) == 1

    scene.run(main())


UNPRIVILEGED = """
import asyncio, ctypes, json, os, sys
from clusterserve import Cluster

NET_BIND_SERVICE = 1 << 10

if os.getuid() == 0:
    libc = ctypes.CDLL(None)
    # A network namespace of its own knows privileged ports, wherever the machine has abolished them.
    libc.unshare(0x40000000)
    # The privilege in question is given up; the files of whoever runs this stay readable.
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    data[0] &= ~NET_BIND_SERVICE
    data[1] &= ~NET_BIND_SERVICE
    libc.capset(header, data)

async def main():
    async with Cluster(exec=sys.argv[1], respawn=False, policy=sys.argv[2], env={"REPORT": os.devnull}) as cluster:
        worker = cluster.fork()
        print(json.dumps(await worker.wait_for("message", timeout=45)), flush=True)
        worker.disconnect()
        print(*await worker.wait_for("exit", timeout=45), flush=True)

asyncio.run(main())
"""

PRIVILEGED = """
async def main():
    try:
        await serve("0.0.0.0", 80)
    except OSError as exc:
        worker.send([exc.errno, str(exc)])
    await forever()
asyncio.run(main())
"""


@POLICIES
def test_E04_S06_a_privileged_port(scene: Scene, policy: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, scene.script(PRIVILEGED), policy],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert f"[{errno.EACCES}, " in finished.stdout, finished
    assert "permission denied; choose a port of at least 1024" in finished.stdout
    assert finished.stdout.splitlines()[1] == "0 None"


@POLICIES
def test_E05_a_path_that_another_process_holds(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            path = str(scene.path / "s")
            with socket.socket(socket.AF_UNIX) as foreign:
                foreign.bind(path)
                foreign.listen()
                # It has come through a message.
                error = await one.refused("unix", "a", path)
                assert error.errno == errno.EADDRINUSE
            await one.do("unix", "a", path)
            await end(cluster, told, one)

    scene.run(main())


RAISES = """
async def main():
    try:
        await serve(port=int(os.environ["TAKEN"]))
    except OSError:
        worker.disconnect()
        raise RuntimeError("in the error handler")
asyncio.run(main())
"""


@pytest.mark.parametrize("policy", [pytest.param("rr", id="E06"), pytest.param("none", id="E07")])
def test_E06_E07_raising_where_the_error_is_handled(scene: Scene, policy: str) -> None:
    async def main() -> None:
        with socket.create_server((LOOPBACK, 0)) as taken:
            env = {"TAKEN": str(taken.getsockname()[1])}
            async with scene.cluster(RAISES, policy=policy, env=env) as (cluster, told):
                worker = cluster.fork()
                (exit,) = await told.until("exit", worker)
                assert exit.details[1] is None
                assert told.every("listening") == []

    scene.run(main())


HOOKED = """
import asyncio, os, sys
from clusterserve import Cluster

def hook(kind, exc, traceback):
    print("hooked", kind.__name__, flush=True)
    os._exit(42)

sys.excepthook = hook

async def main():
    cluster = Cluster(exec=sys.argv[1], respawn=False)
    async with cluster:
        await cluster.fork().wait_for("online", timeout=45)
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(main())
except RuntimeError:
    raise ZeroDivisionError
"""


def test_E08_the_programs_own_hook_for_what_nobody_caught(scene: Scene) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", HOOKED, scene.script("asyncio.run(forever())")],
        env={**os.environ, **scene.environment}, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stdout) == (42, "hooked ZeroDivisionError\n"), finished.stderr


@POLICIES
def test_E09_another_workers_try_is_a_new_one(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
            one, two = await puppets(cluster, 2)
            with socket.create_server((LOOPBACK, 0)) as taken:
                port = taken.getsockname()[1]
                assert (await one.refused("listen", "a", LOOPBACK, port, {})).errno == errno.EADDRINUSE
            assert await two.listen("a", port) == port
            assert await one.listen("a", port) == port

    scene.run(main())


async def all_are_told(scene: Scene, policy: str, within: float) -> None:
    async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
        workers = await puppets(cluster, 8)
        with socket.create_server((LOOPBACK, 0)) as taken:
            port = taken.getsockname()[1]
            tries = [each.do("listen", "a", LOOPBACK, port, {}, within=within) for each in workers]
            errors = await asyncio.gather(*tries, return_exceptions=True)
        for error in errors:
            assert isinstance(error, RefusedError), f"told: {error!r}"
            assert error.errno == errno.EADDRINUSE
        # The master lives, and so do they.
        assert {await each.listen("a", port) for each in workers} == {port}
        await end(cluster, told, *workers)


@POLICIES
def test_E10_all_who_wait_are_told(scene: Scene, policy: str) -> None:
    scene.run(all_are_told(scene, policy, PATIENCE))


def test_E10_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "mute-errors")
    with pytest.raises(AssertionError, match="told: TimeoutError"):
        scene.run(all_are_told(scene, "rr", 1.0))
