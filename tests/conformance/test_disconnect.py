"""Disconnecting and shutting down (D), and a worker that ends itself (K06, K07)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve import Cluster, Worker, faults
from tests.conformance.helpers import IDLES, LISTENS, PATIENCE, Recorder, Scene, ask
from tests.conformance.races import races
from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.raw import Address

#: For whole series of starts under load (seconds).
DEADLINE = 90.0

#: Two servers; each client is told which worker it has.
TWO_SERVERS = """
async def main():
    await serve()
    await serve()
    await forever()
asyncio.run(main())
"""

#: A connection lives until its client ends it; the worker says when it is disconnected.
HOLDS = """
worker.on("disconnect", lambda: say("disconnect", time.time()))

async def hold(reader, writer):
    while line := await reader.readline():
        writer.write(line)
    say("closed", time.time())
    writer.close()

async def main():
    async with await asyncio.start_server(hold, "127.0.0.1", 0):
        await forever()
asyncio.run(main())
"""


def port_of(told: Recorder, worker: Worker) -> int:
    """Of the server that this worker has told of first."""
    port = told.every("listening", worker)[0].details[0].port
    assert isinstance(port, int)
    return port


@contextlib.asynccontextmanager
async def held(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a `HOLDS` worker, which has it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"hello\n")
        assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"hello\n"
        yield reader, writer
    finally:
        writer.close()


def gone_in_order(told: Recorder, worker: Worker, code: int = 0) -> None:
    """It was told to go, and went as one does."""
    assert told.names(worker)[-3:] == ["draining", "disconnect", "exit"]
    assert told.the("exit", worker).details == (code, None)
    assert told.the("disconnect", worker).flag is told.the("exit", worker).flag is True
    assert (told.the("disconnect", worker).state, told.the("exit", worker).state) == ("disconnected", "dead")
    assert worker.process is not None
    assert not proc.alive(worker.process.pid)


# ── all of them ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_D01_eight_workers_with_two_servers_twice(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(TWO_SERVERS) as (cluster, told):
            for cycle in (1, 2):
                workers = [cluster.fork() for _ in range(8)]
                await told.until("listening", count=16 * cycle)
                ports = {each.details[0].port for worker in workers for each in told.every("listening", worker)}
                assert len(ports) == 2
                pids = {str(worker.pid) for worker in workers}
                for port in ports:
                    assert {await ask(port) for _ in range(8)} == pids
                await cluster.disconnect()
                assert dict(cluster.workers) == {}
                for worker in workers:
                    gone_in_order(told, worker)
            assert told.every("error") == []

    scene.run(main())


def test_D02_workers_that_never_listened(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(IDLES) as (cluster, told):
            fork = cluster.fork
            workers = [fork(), fork()]
            await told.until("online", count=2)
            await cluster.disconnect()
            assert dict(cluster.workers) == {}
            for worker in workers:
                gone_in_order(told, worker)

    scene.run(main())


def test_D03_no_workers(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster() as (cluster, _):
            done = cluster.disconnect()
            assert not done.done()
            await done

    scene.run(main())


@races()
def test_D04_within_a_disconnect_handler(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            workers = [cluster.fork(), cluster.fork()]
            await told.until("listening", count=2)
            listed: list[bool] = []
            ends = []

            @cluster.once("disconnect")
            def again(worker: Worker) -> None:
                listed.append(worker.id in cluster.workers)
                ends.append(cluster.disconnect())

            await cluster.disconnect()
            await ends[0]
            assert listed == [True]
            for worker in workers:
                gone_in_order(told, worker)
            assert told.every("error") == []

    scene.run(main())


@races()
def test_D05_one_without_a_server_while_another_holds_the_port(scene: Scene) -> None:
    source = "if worker.id == 1:\n" + "".join(f"    {line}\n" for line in LISTENS.strip().splitlines()) + "else: "

    async def main() -> None:
        async with scene.cluster(source + IDLES) as (cluster, told):
            first, second = cluster.fork(), cluster.fork()
            await told.until("listening", first)
            await told.until("online", second)
            second.disconnect()
            await told.until("exit", second)
            assert await ask(port_of(told, first)) == str(first.pid)
            await cluster.disconnect()
            gone_in_order(told, first)
            gone_in_order(told, second)

    scene.run(main())


# ── one of them ─────────────────────────────────────────────────────────────────────────────────────────────────────


@races()
def test_D06_a_worker_that_wants_to_go_waits_for_the_master(scene: Scene) -> None:
    source = """
    worker.on("disconnect", lambda: say("disconnect", worker.is_connected()))
    async def main():
        async with await serve():
            worker.disconnect()
            say("asked", worker.is_connected())
            await forever()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            gone_in_order(told, worker)
            assert scene.said() == [["asked", True], ["disconnect", False]]

    scene.run(main())


@races()
def test_D07_the_master_lets_it_go_and_it_chooses_its_code(scene: Scene) -> None:
    source = """
    async def leave():
        await asyncio.sleep(0.01)
        say("disconnect", worker.state)
        sys.exit(42)
    worker.on("disconnect", leave)
    """

    async def main() -> None:
        async with scene.cluster(source + LISTENS.replace("\n", "\n    ")) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            assert worker.disconnect() is worker
            await told.until("exit", worker)
            gone_in_order(told, worker, 42)
            assert told.names(worker, own=True)[-3:] == ["draining", "disconnect", "exit"]
            assert scene.said() == [["disconnect", "disconnected"]]

    scene.run(main())


@races()
def test_D08_not_before_its_last_connection_has_ended(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(HOLDS) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            async with held(port_of(told, worker)) as (reader, writer):
                worker.disconnect()
                await told.until("draining", worker)
                writer.write(b"still here\n")
                assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"still here\n"
                assert scene.said() == []
            await told.until("exit", worker)
            gone_in_order(told, worker)
            (first, closed), (second, disconnected) = scene.said()
            assert (first, second) == ("closed", "disconnect")
            assert closed <= disconnected

    scene.run(main())


def test_D09_what_a_disconnect_handler_waits_for_keeps_it_alive(scene: Scene) -> None:
    """Ours: done is when the servers and the handlers of `disconnect` are; so these wait for what else matters."""
    source = """
    @worker.on("disconnect")
    async def finish():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(os.environ["PORT"]))
        await reader.read()
        say("finished")
    asyncio.run(forever())
    """

    async def main() -> None:
        connected: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        async with await asyncio.start_server(
            lambda reader, writer: connected.set_result(writer), "127.0.0.1", 0
        ) as server:
            env = {"PORT": str(server.sockets[0].getsockname()[1])}
            async with scene.cluster(source, env=env) as (cluster, told):
                worker = cluster.fork()
                await told.until("online", worker)
                worker.disconnect()
                writer = await asyncio.wait_for(connected, PATIENCE)
                (disconnect,) = await told.until("disconnect", worker)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.wrap_future(worker.wait_for("exit")), 1)
                assert scene.said() == []
                writer.close()
                (ended,) = await told.until("exit", worker)
                assert ended.at >= disconnect.at + 1
                gone_in_order(told, worker)
                assert scene.said() == [["finished"]]

    scene.run(main())


#: Closes the channel to the master without a word, as nobody should.
CUTS = """
def cut():
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM) and sock.getsockname() == "":
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
"""


@races()
def test_D10_without_its_channel_a_worker_exits_at_once(scene: Scene) -> None:
    source = CUTS + "worker.on('disconnect', lambda: sys.exit(42))\nthreading.Timer(0.2, cut).start()\n" + IDLES

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (0, None)
            assert told.the("exit", worker).flag is False

    scene.run(main())


@races()
def test_D11_a_worker_with_a_server_that_closes_its_channel(scene: Scene) -> None:
    source = CUTS + HOLDS.replace('say("closed", time.time())', "").replace("writer.write(line)", "cut()")

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(told, worker))
            writer.write(b"hello\n")
            await told.until("exit", worker)
            assert told.names(worker)[-2:] == ["disconnect", "exit"]
            assert told.the("exit", worker).details == (0, None)
            writer.close()

    scene.run(main())


@races()
def test_D12_told_many_times_at_once(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            workers = [cluster.fork() for _ in range(4)]
            await told.until("listening", count=4)

            def tell(worker: Worker) -> None:
                for turn in range(20):
                    if worker.id % 2 and turn % 2:
                        worker.destroy()
                    else:
                        worker.disconnect()

            threads = [threading.Thread(target=tell, args=(worker,)) for worker in workers for _ in range(3)]
            for thread in threads:
                thread.start()
            done = cluster.disconnect()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            await done
            for worker in workers:
                assert told.names(worker)[-3:] == ["draining", "disconnect", "exit"]
                # On a machine without time the signal of `destroy` may find it on its way out.
                ends = [(0, None), (None, signal.SIGTERM)] if worker.id % 2 else [(0, None)]
                assert told.the("exit", worker).details in ends
                assert told.the("exit", worker).flag is True
            assert told.every("error") == []

    scene.run(main())


def test_D13_what_is_under_way_ends_and_the_new_goes_elsewhere(scene: Scene) -> None:
    source = """
    async def answer(reader, writer):
        if await reader.readline() == b"long\\n":
            writer.write(b"a" * 1_000_000)
            await writer.drain()
            await reader.readline()
            writer.write(b"b" * 1_000_000)
        else:
            writer.write(str(worker.id).encode())
        writer.close()

    async def main():
        async with await asyncio.start_server(answer, "127.0.0.1", 0):
            await forever()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            leaving = cluster.fork()
            await told.until("listening", leaving)
            port = port_of(told, leaving)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"long\n")
            assert await asyncio.wait_for(reader.readexactly(1), PATIENCE) == b"a"
            staying = cluster.fork()
            await told.until("listening", staying)
            leaving.disconnect()
            await told.until("draining", leaving)
            assert {await ask(port) for _ in range(6)} == {str(staying.id)}
            writer.write(b"go on\n")
            rest = await asyncio.wait_for(reader.read(), PATIENCE)
            while part := await asyncio.wait_for(reader.read(), PATIENCE):
                rest += part
            assert rest == b"a" * 999_999 + b"b" * 1_000_000
            writer.close()
            await told.until("exit", leaving)
            gone_in_order(told, leaving)

    scene.run(main())


def test_D14_messages_sent_before_arrive_before(scene: Scene) -> None:
    source = """
    sizes = []
    worker.on("message", lambda message: sizes.append(len(message)))
    worker.on("disconnect", lambda: say(sizes))
    asyncio.run(forever())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("online", worker)
            for _ in range(50):
                worker.send("x" * 65536)
            worker.disconnect()
            await told.until("exit", worker)
            gone_in_order(told, worker)
            assert scene.said() == [[[65536] * 50]]

    scene.run(main())


def test_D15_a_script_that_knows_nothing_of_us(scene: Scene, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("import time\ntime.sleep(3600)\n")

    async def main() -> None:
        async with scene.cluster(exec=str(script)) as (cluster, told):
            worker = cluster.fork()
            await told.until("online", worker)
            worker.disconnect()
            await told.until("exit", worker)
            gone_in_order(told, worker)

    scene.run(main())


async def repeats(scene: Scene) -> Recorder:
    """A worker that does not go is told again and again: was it killed when its grace was over?"""
    async with scene.cluster(HOLDS, timeout_graceful_shutdown=1.0) as (cluster, told):
        worker = cluster.fork()
        await told.until("listening", worker)
        async with held(port_of(told, worker)):
            worker.disconnect()
            worker.disconnect()
            # As often as the grace that each might begin anew fits into its first.
            for _ in range(40):
                worker.disconnect()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.wrap_future(worker.wait_for("exit")), 0.1)
                if worker.is_dead():
                    break
            assert worker.is_dead(), "it lives on"
        return told


def test_D16_again_is_nothing(scene: Scene) -> None:
    source = "worker.on('draining', lambda: (worker.disconnect(), worker.disconnect(), say('draining')))\n" + IDLES

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("online", worker)
            worker.disconnect()
            worker.disconnect()
            await told.until("exit", worker)
            gone_in_order(told, worker)
            assert worker.disconnect() is worker
            assert scene.said() == [["draining"]]

    scene.run(main())


def test_D16_nor_does_it_give_more_time(scene: Scene) -> None:
    scene.run(repeats(scene))


def test_D16_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_ON", frozenset({"disconnect-again"}))
    with pytest.raises(AssertionError, match="it lives on"):
        scene.run(repeats(scene))


def test_D17_right_after_fork(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(IDLES) as (cluster, told):
            worker = cluster.fork()
            worker.disconnect()
            await told.until("exit", worker)
            names = told.names(worker)
            assert sorted(names[:3]) == ["draining", "fork", "online"]
            assert names[3:] == ["disconnect", "exit"]
            assert told.the("exit", worker).details == (0, None)
            assert told.the("disconnect", worker).flag is told.the("exit", worker).flag is True

    scene.run(main())


async def waits_for_all(scene: Scene) -> None:
    """`Cluster.disconnect` while one worker has a connection."""
    async with scene.cluster(HOLDS) as (cluster, told):
        first = cluster.fork()
        await told.until("listening", first)
        async with held(port_of(told, first)):
            second = cluster.fork()
            await told.until("listening", second)
            done = cluster.disconnect()
            await told.until("exit", second)
            # Whoever would be told too early would be told by now.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(done)), 0.5)
            early = done.done()
        await told.until("exit", first)
        await done
        assert not early, "done before all were dead"
        assert dict(cluster.workers) == {}


def test_D18_done_when_all_are_dead(scene: Scene) -> None:
    scene.run(waits_for_all(scene))


def test_D18_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_ON", frozenset({"disconnect-first"}))
    with pytest.raises(AssertionError, match="done before all were dead"):
        scene.run(waits_for_all(scene))


def restarts(count: int, **more: Any) -> None:
    """A rolling restart by hand, under load: each worker leaves when a replacement listens."""
    options = {"respawn": False, "workers": 2, "bind": "127.0.0.1:0", "policy": "rr", "access_log": False, **more}
    with Cluster("tests.helpers.apps.full:app", **options) as cluster:
        first = {worker: worker.wait_for("listening", DEADLINE) for worker in cluster.workers.values()}
        for worker, listening in first.items():
            if worker.state != "listening":
                listening.result()
        with under_load(Address.parse(cluster.url), clients=1) as load:
            for _ in range(count // 2):
                # Two at a time: it is their start that takes most of it.
                oldest = tuple(cluster.workers.values())
                ready = [cluster.fork().wait_for("listening", DEADLINE) for _ in oldest]
                for listening in ready:
                    listening.result()
                gone = [worker.wait_for("exit", DEADLINE) for worker in oldest]
                for worker in oldest:
                    worker.disconnect()
                assert [ended.result() for ended in gone] == [(0, None)] * 2
                assert load.faults == []
            load.answered(5)
        assert load.dropped == 0


@pytest.mark.timeout(4 * DEADLINE)
def test_D19_a_rolling_restart_under_load_loses_nothing() -> None:
    restarts(16)


@pytest.mark.timeout(2 * DEADLINE)
def test_D19_can_fail() -> None:
    # Where a connection is one worker's until that leaves, each is at one of those that do.  Where it is borrowed, all
    # may be the master's at that moment, and nothing is lost by luck.
    with pytest.raises(AssertionError, match="client "):
        restarts(2, env={faults.VARIABLE: "idle-given-back"}, dispatch="connection")


# ── a worker that ends itself ───────────────────────────────────────────────────────────────────────────────────────


@races()
@pytest.mark.parametrize("how", ["disconnect", "destroy"])
def test_K06_what_a_worker_asks_for_is_no_crash(scene: Scene, how: str) -> None:
    source = f"""
    async def main():
        async with await serve():
            worker.{how}()
            await forever()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            await told.until("disconnect", worker)
            assert told.the("disconnect", worker).flag is told.the("exit", worker).flag is True
            assert told.the("exit", worker).details == ((0, None) if how == "disconnect" else (None, signal.SIGTERM))

    scene.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_K07_destroy_with_and_without_a_channel(scene: Scene, when: str) -> None:
    source = """
    def destroy():
        say(worker.is_connected())
        worker.destroy()
    """
    if when == "before":
        source += "threading.Timer(0.1, destroy).start()\n    asyncio.run(forever())"
    else:
        source += "worker.on('disconnect', destroy)\n    worker.disconnect()\n    asyncio.run(forever())"

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert told.names(worker)[-2:] == ["disconnect", "exit"]
            assert told.the("exit", worker).details == (None, signal.SIGTERM)
            assert scene.said() == [[when == "before"]]

    scene.run(main())
