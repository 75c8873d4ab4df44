"""The shared handle: policy none (S)."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter

from tests.conformance.helpers import LISTENS, PATIENCE, Scene
from tests.conformance.puppets import PUPPET, asked, askers, end, free_port, listeners, own_sockets, puppet, puppets
from tests.conformance.races import races
from tests.conformance.test_unix import APP
from tests.helpers import proc

LOOPBACK = "127.0.0.1"


@races()
def test_S01_disconnecting_a_worker_that_opens_its_server(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS, policy="none") as (cluster, told):
            worker = cluster.fork()
            await told.until("online", worker)
            worker.disconnect()
            (exit,) = await told.until("exit", worker)
            assert exit.details == (0, None)
            assert len(told.every("disconnect", worker, own=True)) == len(told.every("exit", worker, own=True)) == 1

    scene.run(main())


@races()
def test_S02_one_after_the_other_as_soon_as_it_is_online(scene: Scene) -> None:
    port = free_port()
    source = LISTENS.replace("serve()", f"serve(port={port})")

    async def main() -> None:
        before = own_sockets()
        async with scene.cluster(source, policy="none") as (cluster, told):
            one = cluster.fork()
            await told.until("listening", one)
            one.disconnect()
            two = cluster.fork()
            await told.until("online", two)
            two.disconnect()
            for worker in (one, two):
                (exit,) = await told.until("exit", worker)
                assert exit.details == (0, None)
            assert listeners(port) == []
        assert own_sockets() <= before

    scene.run(main())


@races()
def test_S03_both_leave_while_a_client_holds_a_connection(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy="none") as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await one.listen("a")
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setblocking(False)
                await loop.sock_connect(client, (LOOPBACK, port))
                await loop.sock_sendall(client, b"stay\n")
                assert await asyncio.wait_for(loop.sock_recv(client, 8), PATIENCE) == b"staying\n"
                one.worker.disconnect()
                await end(cluster, told, two)
                # The connection is its client's to end.
                assert told.every("exit", one.worker) == []
            (exit,) = await told.until("exit", one.worker)
            assert exit.details == (0, None)

    scene.run(main())


@races()
def test_S04_a_server_that_is_restarted_comes_back_to_its_port(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy="none") as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await one.listen("a")
            assert await two.listen("a") == port
            for _ in range(3):
                assert await one.do("reopened", "a", LOOPBACK, 0) == port
            # Also if nobody is left in between.
            await two.do("close", "a")
            await one.do("close", "a")
            assert await two.listen("a") == port
            await end(cluster, told, one, two)

    scene.run(main())


def test_S05_a_port_that_is_taken(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy="none") as (cluster, told):
            one = await puppet(cluster)
            with socket.create_server((LOOPBACK, 0)) as taken:
                error = await one.refused("listen", "a", LOOPBACK, taken.getsockname()[1], {})
            assert error.errno == errno.EADDRINUSE
            await end(cluster, told, one)

    scene.run(main())


def test_S07_ipv6_only(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy="none") as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await one.listen("a", free_port(), "::", v6only=True)
            assert await two.listen("a", port, "::", v6only=True) == port
            for each in (one, two):
                (event,) = await told.until("listening", each.worker)
                assert event.details[0][:3] == ("::", port, 6)
            with socket.create_server(("0.0.0.0", port)):
                assert await asked(("::1", port), socket.AF_INET6) in ("1", "2")

    scene.run(main())


def test_S08_every_worker_is_reached(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy="none") as (cluster, _):
            workers = await puppets(cluster, 4)
            (port,) = {await each.listen("a") for each in workers}
            answers: Counter[str] = Counter()
            for _ in range(20):
                answers.update(await asyncio.gather(*(asked((LOOPBACK, port)) for _ in range(20))))
            # The kernel decides how many.
            assert set(answers) == set("1234")
            assert set(await askers(port, 1)) <= set("1234")

    scene.run(main())


def test_S09_http_servers_listen_on_one_socket(scene: Scene) -> None:
    (scene.path / "served.py").write_text(APP)

    async def main() -> None:
        settings = {"app": "served:app", "app_dir": str(scene.path), "respawn": True, "workers": 3, "lifespan": "off"}
        async with scene.cluster(policy="none", bind="127.0.0.1:0", **settings) as (cluster, told):
            await told.until("listening", count=3)
            port = told.every("listening")[0].details[0].port
            (inode,) = proc.listening_inodes(port)
            assert all(inode in proc.socket_inodes(each.pid or 0) for each in cluster.workers.values())
            assert len(listeners(port)) == 1

    scene.run(main())
