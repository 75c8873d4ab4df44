"""Unix sockets and inherited descriptors (X)."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from tests.conformance.helpers import PATIENCE, Scene
from tests.conformance.puppets import PUPPET, asked, both_answer, end, fault, puppet, puppets
from tests.helpers import proc

UNIX = socket.AF_UNIX

APP = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        text = f"{scope['client']} {scope['server']}".encode()
        headers = [(b"connection", b"close"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})
"""


async def get(address: object) -> str:
    """The body of an HTTP response."""
    loop = asyncio.get_running_loop()
    with socket.socket(UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.setblocking(False)
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while part := await asyncio.wait_for(loop.sock_recv(client, 1000), PATIENCE):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    return body.decode()


def test_X01_http_over_a_unix_socket(scene: Scene) -> None:
    (scene.path / "served.py").write_text(APP)

    async def main() -> None:
        path = str(scene.path / "s")
        settings = {"app": "served:app", "app_dir": str(scene.path), "respawn": True, "workers": 1, "lifespan": "off"}
        async with scene.cluster(bind=f"unix:{path}", **settings) as (_, told):
            # As uvicorn has it: a client without an address, and the path.
            assert await get(path) == f"None {(path, None)}"
            (event,) = told.every("listening")
            assert event.details[0][:3] == (path, -1, -1)
        assert "s" not in os.listdir(scene.path)

    scene.run(main())


@pytest.mark.parametrize("mode", [0o777, 0o600])
def test_X02_the_mode_of_the_socket_file(scene: Scene, mode: int) -> None:
    (scene.path / "served.py").write_text(APP)

    async def main() -> None:
        path = str(scene.path / "s")
        settings = {"app": "served:app", "app_dir": str(scene.path), "respawn": True, "workers": 1, "lifespan": "off"}
        async with scene.cluster(bind=f"unix:{path}", uds_permissions=f"{mode:o}", **settings):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
            assert await get(path)

    scene.run(main())


@pytest.mark.parametrize("policy", ["rr", "none"])
@pytest.mark.parametrize("length", [0, 101, 180])
def test_X03_a_path_is_relative_to_the_worker(scene: Scene, policy: str, length: int) -> None:
    directory = scene.path / "workers"
    if length:
        directory = scene.path / ("d" * max(1, length - len(str(scene.path)) - 3))
    directory.mkdir()
    path = directory / "s"

    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            workers = await puppets(cluster, 2)
            for each in workers:
                await each.do("go", str(directory))
                name = await each.do("unix", "a", "s")
                assert name == str(path) or (policy == "none" and length == 180)
            descriptor = os.open(directory, os.O_PATH)
            assert await asked(f"/proc/self/fd/{descriptor}/s", UNIX) in ("1", "2")
            os.close(descriptor)
            (event,) = await told.until("listening", workers[0].worker)
            assert event.details[0][:3] == (str(path), -1, -1)
            await end(cluster, told, *workers)
            assert list(directory.iterdir()) == []

    assert not length or len(str(path)) >= length
    scene.run(main())


def test_X04_a_descriptor_is_the_masters(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            with socket.create_server(("127.0.0.1", 0)) as inherited:
                port = inherited.getsockname()[1]
                for each in workers:
                    assert await each.listen("a", None, f"fd://{inherited.fileno()}") == port  # type: ignore[arg-type]
                await both_answer(("127.0.0.1", port))
                await end(cluster, told, *workers)

    scene.run(main())


MASTER = """
import asyncio, sys
from clusterserve import Cluster
async def main():
    bind, path = sys.argv[1:3]
    async with Cluster("served:app", workers=1, bind=bind, app_dir=path, lifespan="off") as cluster:
        print(cluster.url, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def master(scene: Scene, bind: str, *pass_fds: int) -> subprocess.Popen[str]:
    """A cluster in a process of its own, once it serves."""
    (scene.path / "served.py").write_text(APP)
    process = subprocess.Popen(
        [sys.executable, "-c", MASTER, bind, str(scene.path)], pass_fds=pass_fds, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        finish(process, signal.SIGKILL)
        raise AssertionError(f"the cluster on {bind} has not started")
    return process


def finish(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.wait(PATIENCE)
    assert process.stdout is not None
    process.stdout.close()


def test_X04_from_a_grandparent_that_has_closed_its_own(scene: Scene) -> None:
    inherited = socket.create_server(("127.0.0.1", 0))
    address = inherited.getsockname()
    process = master(scene, f"fd://{inherited.fileno()}", inherited.fileno())
    inherited.close()
    try:
        assert (asyncio.run(get(address))).startswith("('127.0.0.1',")
    finally:
        finish(process, signal.SIGKILL)


def test_X05_the_file_lives_as_long_as_somebody_listens(scene: Scene) -> None:
    path = scene.path / "s"

    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two, three = await puppets(cluster, 3)
            for each in (one, two, three):
                await each.do("unix", "a", str(path))
            await end(cluster, told, one)
            assert await asked(str(path), UNIX) in ("2", "3")
            two.worker.kill("SIGKILL")
            await told.until("exit", two.worker)
            assert await asked(str(path), UNIX) == "3"
            # After a crash of the last it is there for the next.
            three.worker.kill("SIGKILL")
            await told.until("exit", three.worker)
            assert path.exists()
            four = await puppet(cluster)
            await four.do("unix", "a", str(path))
            assert await asked(str(path), UNIX) == "4"
            await four.do("close", "a")
            await told.when(lambda: not path.exists(), "the file has gone with the last")

    scene.run(main())


async def inherited_unix(scene: Scene) -> None:
    path = str(scene.path / "s")
    with socket.socket(UNIX) as inherited:
        inherited.bind(path)
        inherited.listen()
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            for each in workers:
                await each.do("listen", "a", f"fd://{inherited.fileno()}", None, {})
            await both_answer(path, UNIX)
            await end(cluster, told, *workers)
        assert proc.unix_inodes(path), "it still listens"
        assert "s" in os.listdir(scene.path), "the file is not ours to remove"


def test_X06_an_inherited_unix_socket(scene: Scene) -> None:
    scene.run(inherited_unix(scene))


def test_X06_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "owns-inherited")
    with pytest.raises(AssertionError, match="not ours to remove"):
        scene.run(inherited_unix(scene))


def after_a_master_that_was_killed(scene: Scene) -> None:
    path = str(scene.path / "s")
    finish(master(scene, f"unix:{path}"), signal.SIGKILL)
    assert os.path.exists(path)
    second = master(scene, f"unix:{path}")
    try:
        assert asyncio.run(get(path)).startswith("None")

        async def third() -> None:
            async with scene.cluster(PUPPET) as (cluster, _):
                one = await puppet(cluster)
                assert (await one.refused("unix", "a", path)).errno == errno.EADDRINUSE

        asyncio.run(third())
        assert asyncio.run(get(path)).startswith("None")
    finally:
        finish(second, signal.SIGKILL)


def test_X07_stale_files_are_replaced_and_live_ones_are_not(scene: Scene) -> None:
    after_a_master_that_was_killed(scene)


def test_X07_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(fault(monkeypatch, "stale-files").items())))
    with pytest.raises(AssertionError, match="has not started"):
        after_a_master_that_was_killed(scene)


def test_X07_a_file_that_is_stale_while_the_cluster_runs(scene: Scene) -> None:
    path = scene.path / "s"
    with socket.socket(UNIX) as dead:
        dead.bind(str(path))
        dead.listen()

    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, _):
            one = await puppet(cluster)
            await one.do("unix", "a", str(path))
            assert await asked(str(path), UNIX) == "1"
            assert proc.unix_inodes(str(path))

    scene.run(main())
