"""Lifecycle events and states (L)."""

from __future__ import annotations

import os
import signal

import pytest

from clusterserve import Cluster, ClusterError, Worker
from tests.conformance.helpers import IDLES, LISTENS, Scene


def test_L01_one_workers_life(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            worker.once("listening", lambda: worker.kill("SIGKILL"))
            await told.until("exit", worker)
            life = [(each.event, each.state) for each in told.all if each.worker == worker.id]
            assert life == [
                ("fork", "none"), ("online", "online"), ("listening", "listening"), ("disconnect", "disconnected"),
                ("exit", "dead"),
            ]  # fmt: skip
            own = [(each.event, each.state) for each in told.own]
            assert own == life[1:]

    scene.run(main())


def test_L02_what_comes_with_each_event(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            assert worker.id == 1
            await told.until("listening", worker)
            worker.disconnect()
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (0, None)
            assert worker.process is not None
            assert (worker.process.returncode, worker.process.signal) == (0, None)
            (address,) = told.the("listening", worker).details
            assert (address.address, address.address_type, address.fd) == ("127.0.0.1", 4, None)
            assert isinstance(address.port, int)
            assert 1 <= address.port <= 65535
            for name in ("fork", "online", "draining", "disconnect"):
                assert told.the(name, worker).details == ()
            other = cluster.fork()
            await told.until("listening", other)
            os.kill(other.pid or 0, signal.SIGKILL)
            await told.until("exit", other)
            assert told.the("exit", other).details == (None, signal.SIGKILL)
            assert told.the("exit", other, own=True).details == (None, signal.SIGKILL)

    scene.run(main())


def test_L03_only_the_workers_own_environment_makes_it_one(scene: Scene) -> None:
    source = """
    import subprocess
    known = ("CLUSTERSERVE_WORKER_SLOT", "CLUSTERSERVE_TEST_RACES")
    marks = [name for name in os.environ if name.startswith("CLUSTERSERVE_") and name not in known]
    program = "import clusterserve; print(clusterserve.is_master, clusterserve.is_worker)"
    path = os.path.dirname(os.path.dirname(clusterserve.__file__))
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=path)
    say(marks, clusterserve.is_worker, clusterserve.is_master, child.stdout.split())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            await told.until("exit", cluster.fork())
            assert scene.said() == [[[], True, False, ["True", "False"]]]

    scene.run(main())


def test_L04_a_bare_worker() -> None:
    bare = Worker()
    assert (bare.id, bare.state, bare.process, bare.exited_after_disconnect) == (0, "none", None, None)
    given = Worker(3, state="online")
    assert (given.id, given.state) == (3, "online")


def test_L05_connected_from_fork_to_disconnect(scene: Scene) -> None:
    source = """
    say(worker.is_connected())
    worker.on("disconnect", lambda: say(worker.is_connected()))
    asyncio.run(forever())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork()
            assert worker.is_connected()
            await told.when(scene.said, "it has begun")
            worker.disconnect()
            await told.until("exit", worker)
            assert told.the("fork", worker).connected
            assert not told.the("disconnect", worker).connected
            assert not told.the("disconnect", worker, own=True).connected
            assert scene.said() == [[True], [False]]

    scene.run(main())


def test_L06_dead_when_it_has_exited(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("say(worker.is_dead())") as (cluster, told):
            worker = cluster.fork()
            assert not worker.is_dead()
            await told.until("exit", worker)
            assert told.the("exit", worker).dead
            assert not told.the("disconnect", worker).dead
            assert scene.said() == [[False]]

    scene.run(main())


@pytest.mark.parametrize("end", ["disconnect", "SIGKILL", "immediate"])
def test_L07_listed_until_both_disconnected_and_dead(scene: Scene, end: str) -> None:
    async def main() -> None:
        async with scene.cluster("os._exit(0)" if end == "immediate" else LISTENS) as (cluster, told):
            worker = cluster.fork()
            assert cluster.workers[worker.id] is worker
            if end != "immediate":
                await told.until("listening", worker)
            if end == "disconnect":
                worker.disconnect()
            elif end == "SIGKILL":
                worker.kill("SIGKILL")
            await told.until("exit", worker)
            events = [each for each in told.all if each.worker == worker.id]
            assert [each.listed for each in events[:-1]] == [(worker.id,)] * (len(events) - 1)
            assert {each.event for each in events[-2:]} == {"disconnect", "exit"}
            assert events[-1].listed == ()

    scene.run(main())


def test_L08_ids_are_never_used_again(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster() as (cluster, told):
            ids = []
            for _ in range(20):
                worker = cluster.fork()
                ids.append(worker.id)
                worker.kill("SIGKILL")
                await told.until("exit", worker)
            assert ids == list(range(1, 21))

    scene.run(main())


def test_L09_the_masters_things_are_the_masters(scene: Scene) -> None:
    source = """
    try:
        clusterserve.Cluster(exec=__file__)
    except clusterserve.ClusterError as exc:
        say(str(exc))
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            await told.until("exit", cluster.fork())
            ((reason,),) = scene.said()
            assert "worker 1" in reason
            assert "master" in reason

    scene.run(main())


def test_L10_fork_and_setup_are_told_later(scene: Scene) -> None:
    async def main() -> None:
        late: list[object] = []
        async with scene.cluster() as (cluster, told):
            worker = cluster.fork()
            cluster.on("fork", late.append)
            cluster.setup(args=["x"])
            cluster.on("setup", lambda settings: late.append(settings.args))
            await told.until("online", worker)
            assert late == [worker, ("x",)]

    scene.run(main())


def test_L11_listening_is_told_once_for_each_server(scene: Scene) -> None:
    source = """
    async def main():
        async with await serve(), await serve():
            await forever()
    asyncio.run(main())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            workers = [cluster.fork(), cluster.fork()]
            await told.until("listening", count=4)
            for worker in workers:
                addresses = [each.details[0] for each in told.every("listening", worker)]
                assert len(addresses) == len({address.port for address in addresses}) == 2
            await cluster.disconnect()
            assert len(told.every("listening")) == 4

    scene.run(main())


def test_L12_the_state_in_each_handler_of_an_orderly_end(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            worker.disconnect()
            await told.until("exit", worker)
            states = [(each.event, each.state) for each in told.all if each.worker == worker.id][-3:]
            assert states == [("draining", "draining"), ("disconnect", "disconnected"), ("exit", "dead")]

    scene.run(main())


def test_a_cluster_that_does_not_run_forks_nobody(scene: Scene) -> None:
    with pytest.raises(ClusterError, match="does not run"):
        Cluster(exec=scene.script(IDLES), respawn=False).fork()
