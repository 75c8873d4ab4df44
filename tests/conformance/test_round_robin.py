"""Hand-off by the master (R)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.conformance.helpers import LISTENS, PATIENCE, Recorder, Scene
from tests.conformance.puppets import (
    PUPPET,
    Puppet,
    asked,
    askers,
    both_answer,
    end,
    fault,
    free_port,
    listeners,
    own_sockets,
    puppet,
    puppets,
)
from tests.conformance.races import races
from tests.helpers import proc

LOOPBACK = "127.0.0.1"


async def all_listen(workers: list[Puppet], **options: object) -> int:
    """The port that they all have."""
    ports = {await each.listen("a", **options) for each in workers}  # type: ignore[arg-type]
    assert len(ports) == 1
    return ports.pop()


#: The clients of the test that runs: one that fails, as some must, does not come to closing its own.
_CLIENTS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def closed_in_the_end() -> Iterator[None]:
    yield
    while _CLIENTS:
        _CLIENTS.pop().close()


async def connected(port: int, *said: bytes) -> socket.socket:
    """A client that has said this much."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    _CLIENTS.append(client)
    client.setblocking(False)
    try:
        await loop.sock_connect(client, (LOOPBACK, port))
        for each in said:
            await loop.sock_sendall(client, each)
    except OSError:
        client.close()
        raise
    return client


async def answer(client: socket.socket) -> str:
    """Everything that the client gets until the end."""
    loop, got = asyncio.get_running_loop(), b""
    with client:
        while part := await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE):
            got += part
    return got.decode()


@contextlib.asynccontextmanager
async def stopped(told: Recorder, *workers: Puppet) -> AsyncIterator[None]:
    """These cannot run inside this block."""
    pids = [each.worker.pid or 0 for each in workers]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            await told.when(lambda pid=pid: proc.state(pid) == "T", "it is stopped")  # type: ignore[misc]
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_R01_strictly_in_turn(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, _):
            workers = await puppets(cluster, 4)
            port = await all_listen(workers)
            await askers(port, 20)
            answers = await askers(port, 400)
            assert Counter(answers) == dict.fromkeys("1234", 100)
            assert answers == answers[:4] * 100

    scene.run(main())


def test_R02_a_worker_that_has_not_acknowledged_gets_no_more(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await all_listen([one, two])
            async with stopped(told, one):
                answers = await askers(port, 40)
            assert answers.count("1") <= 2

    scene.run(main())


def test_R03_a_failing_accept(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, _):
            one = await puppet(cluster)
            port = await one.listen("a")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            client = socket.socket()
            with client, socket.socket() as broken:
                for each in (client, broken):
                    each.setblocking(False)
                lowest = os.dup(0)
                os.close(lowest)
                # This process is the master: no descriptor for an accepted connection.
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
                try:
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(broken, (LOOPBACK, port))
                    await loop.sock_connect(client, (LOOPBACK, port))
                    await loop.sock_sendall(client, b"hello\n")
                    # Its connection is broken before it can be accepted.
                    broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    broken.close()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert await answer(client) == "1"
            assert await askers(port, 5) == ["1"] * 5

    scene.run(main())


def test_R04_R05_a_connection_that_is_declined_goes_to_another(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await all_listen([one, two])
            await one.do("listen", "b", LOOPBACK, 0, {})
            await one.do("close", "b")
            before = len(await one.do("sockets"))
            async with stopped(told, two):
                # Both are offered connections which they cannot take yet, and one closes its server before it looks.
                await one.do("hold", 1, "a")
                await told.when(lambda: ["busy"] in scene.said(), "it is busy")
                clients = [await connected(port, b"hello\n") for _ in range(10)]
                await told.when(lambda: one.worker.is_connected(), "it is there")
            assert [await answer(client) for client in clients] == ["2"] * 10
            # Its listener is gone, and nothing is left behind.
            assert len(await one.do("sockets")) <= before

    scene.run(main())


def test_R06_limits_are_kept_exactly(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 3)
            ports = {
                await each.listen("a", max_connections=limit) for each, limit in zip(workers, (0, 1, 9), strict=True)
            }
            clients = [await connected(port, b"stay\n") for port in ports for _ in range(10)]
            for client in clients:
                assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 8), PATIENCE) == b"staying\n"
            held = {each.id: offered + borrowed for each in cluster.workers.values()
                    for id, _, offered, borrowed in cluster.statistics().workers if id == each.id}  # fmt: skip
            assert held == {1: 0, 2: 1, 3: 9}
            # One more waits until there is room.
            late = await connected(next(iter(ports)), b"hello\n")
            clients.pop().close()
            assert await answer(late) in ("2", "3")
            for client in clients:
                client.close()
            await end(cluster, told, *workers)

    scene.run(main())


def test_R07_what_is_over_the_limit_is_dropped(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, _):
            one = await puppet(cluster)
            port = await one.listen("a", max_connections=0, drop=True)
            assert await answer(await connected(port)) == ""
            assert await one.do("drops", "a") == 1

    scene.run(main())


def test_R08_nothing_keeps_a_worker_that_has_closed_its_server(scene: Scene) -> None:
    source = """
    async def main():
        server = await serve()
        server.close()
        await server.wait_closed()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            (exit,) = await told.until("exit", cluster.fork())
            assert exit.details == (0, None)

    scene.run(main())


def test_R09_a_server_keeps_its_worker(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            (listening,) = await told.until("listening", worker)
            await told.when(lambda: time.time() > listening.at + 3, "three seconds have passed")
            assert told.every("exit") == []
            assert await asked((LOOPBACK, listening.details[0].port)) == str(worker.pid)

    scene.run(main())


def test_R11_closing_completes(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            await one.listen("a")
            # Returns when `wait_closed` has.
            await one.do("close", "a")
            await end(cluster, told, one)

    scene.run(main())


def test_R12_listening_in_a_context_of_its_own(scene: Scene) -> None:
    source = """
    import contextvars
    name = contextvars.ContextVar("name", default="outer")
    async def main():
        def listen():
            name.set("inner")
            return asyncio.ensure_future(serve())
        await contextvars.copy_context().run(listen)
        assert name.get() == "outer"
        await forever()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            (listening,) = await told.until("listening", worker)
            assert await asked((LOOPBACK, listening.details[0].port)) == str(worker.pid)

    scene.run(main())


@races()
def test_R13_a_server_that_is_restarted_comes_back_to_its_port(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await all_listen([one, two])
            for _ in range(3):
                assert await one.do("reopened", "a", LOOPBACK, 0) == port
            await both_answer((LOOPBACK, port))
            await end(cluster, told, one, two)

    scene.run(main())


def test_R14_closed_before_the_master_has_answered(scene: Scene) -> None:
    port = free_port()
    source = f"""
    async def main():
        task = asyncio.ensure_future(serve(port={port}))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        say(task.cancelled())
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            (exit,) = await told.until("exit", worker)
            assert (exit.details, scene.said()) == ((0, None), [[True]])
            await told.when(lambda: not listeners(port), "the master holds nothing")

    scene.run(main())


def test_R16_what_waits_for_a_worker_that_goes(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, timeout_graceful_shutdown=1) as (cluster, told):
            before = own_sockets()
            one = await puppet(cluster)
            port = await one.listen("a", free_port())
            async with stopped(told, one):
                clients = [await connected(port, b"hello\n") for _ in range(5)]
                one.worker.disconnect()
                await told.until("exit", one.worker)
            # Nobody is left to serve them: they are closed, and not forgotten.
            assert [await ended(client) for client in clients] == [True] * 5
            await told.when(lambda: own_sockets() <= before, "the master has nothing of it any more")
            assert listeners(port) == []

    scene.run(main())


async def ended(client: socket.socket) -> bool:
    """Whether it comes to an end without an answer."""
    try:
        return await answer(client) == ""
    except ConnectionResetError:
        return True


def test_R17_a_worker_that_is_disconnected_gets_nothing_new(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await all_listen([one, two])
            clients: list[socket.socket] = []
            # Until either has one: on a busy machine a worker may be too late for its turn.
            while sum(borrowed > 0 for _, _, _, borrowed in cluster.statistics().workers) < 2:
                clients.append(await connected(port, b"stay\n"))
                assert await asyncio.get_running_loop().sock_recv(clients[-1], 8) == b"staying\n"
                assert len(clients) < 20
            one.worker.disconnect()
            # The order is under way to the master's own thread; that it has arrived, this event says.
            await told.until("draining", one.worker)
            assert await askers(port, 200) == ["2"] * 200
            assert told.every("exit") == []
            for client in clients:
                client.close()
            await told.until("exit", one.worker)

    scene.run(main())


def test_R18_what_was_sent_before_anybody_was_free_is_not_lost(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            port = await all_listen(workers)
            async with stopped(told, *workers):
                clients = [await connected(port, b"hel", b"lo\n") for _ in range(10)]
            # By whichever: it may be one that is awake before the other.
            answers = [await answer(client) for client in clients]
            assert set(answers) <= {"1", "2"}, answers

    scene.run(main())


def test_R19_a_client_that_resets_while_it_waits(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            port = await all_listen(workers)
            async with stopped(told, *workers):
                for _ in range(20):
                    client = await connected(port, b"hello\n")
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
            await both_answer((LOOPBACK, port))
            await end(cluster, told, *workers)

    scene.run(main())


async def killed_with_connections(scene: Scene, env: dict[str, str]) -> None:
    async with scene.cluster(PUPPET, env=env) as (cluster, told):
        one = await puppet(cluster)
        port = await one.listen("a")
        # What it says may arrive before the master knows of its server.
        await told.until("listening", one.worker)
        before = own_sockets()
        async with stopped(told, one):
            clients = [await connected(port, b"hello\n") for _ in range(10)]
            await told.when(lambda: own_sockets() >= before + 20, "they are accepted")
            one.worker.kill("SIGKILL")
            await told.until("exit", one.worker)
        two = await puppet(cluster)
        await two.listen("a")
        answers = [await answer(client) for client in clients]
        assert answers == ["2"] * 10, f"lost: {answers}"
        await told.when(lambda: own_sockets() <= before, "the master has no more than before")


def test_R20_connections_of_a_killed_worker_go_to_another(scene: Scene) -> None:
    scene.run(killed_with_connections(scene, {}))


def test_R20_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    env = fault(monkeypatch, "lost-offers")
    with pytest.raises((AssertionError, ConnectionResetError), match=r"lost|reset"):
        scene.run(killed_with_connections(scene, env))


async def without_descriptors(scene: Scene, env: dict[str, str], patience: float = 10) -> None:
    async with scene.cluster(PUPPET, env=env) as (cluster, _):
        one, two = await puppets(cluster, 2)
        port = await all_listen([one, two])
        pid = one.worker.pid or 0
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, hard))
        answers = await asyncio.gather(*(asyncio.wait_for(asked((LOOPBACK, port)), patience) for _ in range(20)))
        assert answers == ["2"] * 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        deadline = time.monotonic() + patience
        # Its share, sooner or later: on a busy machine it is passed over now and then.
        while not 15 <= (await askers(port, 40)).count("1") <= 25:
            assert time.monotonic() < deadline, "lost: it does not get its share any more"


def test_R21_a_worker_that_was_out_of_descriptors_comes_back(scene: Scene) -> None:
    scene.run(without_descriptors(scene, {}))


def test_R21_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    env = fault(monkeypatch, "lost-refusals")
    with pytest.raises((AssertionError, asyncio.TimeoutError)):
        # One that gets nothing any more gets nothing however long it is asked, and asking takes both processors.
        scene.run(without_descriptors(scene, env, patience=3))


async def saturated(scene: Scene) -> None:
    async with scene.cluster(PUPPET, max_pending=50, timeout_graceful_shutdown=2) as (cluster, told):
        one = await puppet(cluster)
        port = await one.listen("a", backlog=1000)
        before = own_sockets()
        async with stopped(told, one):
            clients = [await connected(port) for _ in range(400)]
            cpu, now = time.process_time(), time.monotonic()
            await told.when(lambda: time.monotonic() > now + 2, "two seconds have passed")
            # Less this test's own looking.
            assert time.process_time() - cpu < 0.2
            accepted = own_sockets() - before - 400
            # The queue, and what may be offered to one worker.
            assert accepted <= 50 + 64 + 64, f"accepted {accepted}"
        for client in clients:
            client.close()
        assert await asked((LOOPBACK, port)) == "1"


def test_R22_what_nobody_can_take_is_bounded(scene: Scene) -> None:
    scene.run(saturated(scene))


def test_R22_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "endless-queue")
    with pytest.raises(AssertionError, match="accepted"):
        scene.run(saturated(scene))


async def all_dead(scene: Scene) -> None:
    async with scene.cluster(PUPPET) as (cluster, told):
        workers = await puppets(cluster, 3)
        port = await all_listen(workers)
        for each in workers[:2]:
            each.worker.kill("SIGKILL")
            await told.until("exit", each.worker)
        assert await askers(port, 5) == ["3"] * 5
        workers[2].worker.kill("SIGKILL")
        await told.until("exit", workers[2].worker)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(await connected(port, b"hello\n")) for _ in range(5)]
            four = await puppet(cluster)
            assert await four.listen("a") == port
            assert [await answer(client) for client in clients] == ["4"] * 5


def test_R23_with_all_workers_dead_clients_wait(scene: Scene) -> None:
    scene.run(all_dead(scene))


def test_R23_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "no-orphans")
    with pytest.raises(ConnectionError):
        scene.run(all_dead(scene))
