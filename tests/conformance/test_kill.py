"""Kill, exit and death (K)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from clusterserve import Worker
from tests.conformance.helpers import LISTENS, PATIENCE, Recorder, Scene
from tests.conformance.races import races
from tests.helpers import proc
from tests.helpers.server import ROOT
from tests.helpers.waiting import eventually


def gone(worker: Worker) -> bool:
    return worker.pid is not None and not proc.alive(worker.pid)


def ended(told: Recorder, worker: Worker) -> None:
    """One `disconnect` and one `exit` each on the cluster and on the worker, in this order; the process is no more."""
    assert told.names(worker)[-2:] == ["disconnect", "exit"]
    for own in (False, True):
        assert told.the("disconnect", worker, own=own).state == "disconnected"
        assert told.the("exit", worker, own=own).state == "dead"
    assert gone(worker)


def test_K01_an_exit_code(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("sys.exit(42)") as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (42, None)
            assert told.the("exit", worker, own=True).details == (42, None)

    scene.run(main())


EXITS_ON_DEMAND = """
async def main():
    async with await serve():
        await asyncio.to_thread(sys.stdin.readline)
        os._exit(42)
asyncio.run(main())
"""


def test_K02_a_worker_that_exits_while_it_listens(scene: Scene) -> None:
    async def main() -> None:
        streams = ["pipe", "inherit", "inherit", "ipc"]
        async with scene.cluster(EXITS_ON_DEMAND, stdio=streams) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            cluster.on("exit", lambda worker: told_gone.append(gone(worker)))
            told_gone: list[bool] = []
            assert worker.process is not None
            assert worker.process.stdin is not None
            with worker.process.stdin as stdin:
                stdin.write(b"go\n")
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (42, None)
            assert worker.exited_after_disconnect is False
            assert told_gone == [True]
            ended(told, worker)

    scene.run(main())


def test_K03_a_signal_sent_to_the_process(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            os.kill(worker.pid or 0, signal.SIGKILL)
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (None, signal.SIGKILL)
            assert told.the("disconnect", worker).flag is False
            assert told.the("exit", worker).flag is False
            ended(told, worker)

    scene.run(main())


def test_K04_kill_delivers_the_signal_and_nothing_else(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            await told.until("listening", worker)
            worker.kill("SIGKILL")
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (None, signal.SIGKILL)
            assert told.the("exit", worker).flag is False
            assert told.the("exit", worker).listed == ()
            assert "draining" not in told.names(worker)
            ended(told, worker)

    scene.run(main())


def test_K05_a_worker_in_a_busy_loop_dies_of_sigterm(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("say('busy')\nwhile True: pass") as (cluster, told):
            worker = cluster.fork()
            await told.when(scene.said, "it is busy")
            worker.kill("SIGTERM")
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (None, signal.SIGTERM)
            assert worker.exited_after_disconnect is False

    scene.run(main())


def test_K05_an_application_that_does_not_hear_sigterm_is_killed_after_the_grace_time(scene: Scene) -> None:
    """uvicorn's handler is Python's: a loop that does not turn never asks to be drained."""
    (scene.path / "busy_app.py").write_text("""
import time
async def app(scope, receive, send):
    if scope["type"] == "http":
        open("busy", "w").close()
        while True:
            time.sleep(60)
""")

    async def main() -> None:
        async with scene.cluster(
            app="busy_app:app", app_dir=str(scene.path), cwd=str(scene.path), bind="127.0.0.1:0", lifespan="off",
            timeout_graceful_shutdown=0.5,
        ) as (cluster, told):  # fmt: skip
            worker = cluster.fork()
            ((address, *_),) = [each.details for each in await told.until("listening", worker)]
            with Client(address.port):
                await told.when((scene.path / "busy").exists, "it is busy")
                began = time.monotonic()
                worker.kill("SIGTERM")
                await told.until("exit", worker)
            assert told.the("exit", worker).details == (None, signal.SIGKILL)
            assert told.the("kill", worker).details == ("it does not act on SIGTERM",)
            assert worker.exited_after_disconnect is False
            assert time.monotonic() - began >= 0.5

    scene.run(main())


IN_THE_WORKER = """
worker.on("disconnect", lambda: say("disconnect"))
async def main():
    async with await serve():
        worker.{what}()
        await forever()
asyncio.run(main())
"""


@races()
@pytest.mark.parametrize("what", ["disconnect", "destroy"])
def test_K06_a_worker_that_leaves_by_itself_was_told_to(scene: Scene, what: str) -> None:
    async def main() -> None:
        async with scene.cluster(IN_THE_WORKER.format(what=what)) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert told.the("draining", worker).flag is True
            assert told.the("disconnect", worker).flag is True
            assert told.the("exit", worker).flag is True
            if what == "disconnect":
                assert told.the("exit", worker).details == (0, None)
            else:
                assert told.the("exit", worker).details in {(0, None), (None, signal.SIGTERM)}

    scene.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_K07_destroy_in_the_worker_with_and_without_a_channel(scene: Scene, when: str) -> None:
    source = """
    async def late():
        say(worker.is_connected())
        worker.destroy()
        await forever()
    worker.on("disconnect", late)
    say(worker.disconnect() is worker)
    asyncio.run(forever())
    """
    early = "say(worker.destroy() is worker)\nasyncio.run(forever())"

    async def main() -> None:
        async with scene.cluster(early if when == "before" else source) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert scene.said() == ([[True]] if when == "before" else [[True], [False]])
            assert told.the("exit", worker).flag is True
            ended(told, worker)

    scene.run(main())


def test_K08_destroy_of_a_worker_that_is_disconnected(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            worker.on("disconnect", worker.destroy)
            await told.until("listening", worker)
            worker.disconnect()
            await told.until("exit", worker)
            assert told.the("exit", worker).flag is True
            ended(told, worker)

    scene.run(main())


def test_destroy_signals_one_that_does_not_end_by_itself(scene: Scene) -> None:
    async def main() -> None:
        source = "worker.on('disconnect', forever)\nsay('up')\nasyncio.run(forever())"
        async with scene.cluster(source, timeout_graceful_shutdown=2) as (cluster, told):
            worker = cluster.fork()
            await told.when(scene.said, "it is up")
            assert worker.destroy("SIGUSR2") is worker
            await told.until("disconnect", worker)
            await told.until("exit", worker)
            assert told.the("exit", worker).flag is True
            # Workers do nothing on this one, and are killed in the end.
            assert told.the("exit", worker).details == (None, signal.SIGKILL)

    scene.run(main())


MASTER = """
import sys
sys.path.insert(0, {root!r})
import os, signal, time
from clusterserve import Cluster

with Cluster(exec={script!r}, respawn=False, env={env!r}) as cluster:
    workers = [cluster.fork() for _ in range(2)]
    while any(worker.state == "none" for worker in workers):
        time.sleep(0.01)
    print(*(worker.pid for worker in workers), flush=True)
    sys.stdin.readline()
    {end}
"""


class Client:
    """Asks, and does not wait for an answer."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._socket.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()


def master(
    scene: Scene,
    end: str,
    script: str,
    said: int,
    code: int,
    *,
    within: float = PATIENCE,
    pids: list[int] | None = None,
) -> float:
    """Run a master in a process of its own, have it end in this way, and return how long its workers outlived it.

    Raises AssertionError if some are left after so long; `pids` gets who they are.
    """
    pids = [] if pids is None else pids
    path = scene.path / "master.py"
    path.write_text(MASTER.format(root=str(ROOT), script=script, env=scene.environment, end=end))
    with subprocess.Popen(
        [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pids += [int(each) for each in process.stdout.readline().split()]
        assert len(pids) == 2
        eventually(lambda: len(scene.said()) >= said, "the workers are up", within=PATIENCE)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(PATIENCE) == code
    began = time.monotonic()
    eventually(lambda: not any(proc.alive(pid) for pid in pids), "no worker is left", within=within)
    return time.monotonic() - began


def test_K09_no_worker_outlives_a_master_that_fails(scene: Scene) -> None:
    master(scene, "raise RuntimeError('its own trouble')", scene.script(LISTENS), 0, 1)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(0)", 0), ("os._exit(0)", 0), ("os.kill(os.getpid(), 9)", -9)])
def test_K10_no_worker_outlives_its_master(scene: Scene, end: str, code: int) -> None:
    master(scene, end, scene.script(LISTENS), 0, code)


#: The second lets no other thread of its process run: only the kernel can end it.
BUSY = {
    "python": "say('busy')\nwhile True: pass",
    "C": "import ctypes\nsay('busy')\nctypes.PyDLL(None).sleep(600)",
}


@pytest.mark.parametrize("kind", BUSY)
def test_K11_not_even_a_busy_one_outlives_a_master_that_is_killed(scene: Scene, kind: str) -> None:
    assert master(scene, "os.kill(os.getpid(), 9)", scene.script(BUSY[kind]), 2, -9) < 2.0


def test_K11_can_fail(scene: Scene) -> None:
    """Without the kernel's parent-death signal one that is busy in C lives on."""
    scene.environment["CLUSTERSERVE_FAULTS"] = "no-parent-death-signal"
    pids: list[int] = []
    try:
        with pytest.raises(AssertionError, match="no worker is left"):
            master(scene, "os.kill(os.getpid(), 9)", scene.script(BUSY["C"]), 2, -9, pids=pids, within=2.0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(proc.alive(pid) for pid in pids), "they are gone", within=PATIENCE)


def test_K12_killed_before_it_is_online(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            worker = cluster.fork()
            worker.kill("SIGTERM")
            await told.until("exit", worker)
            assert told.names(worker) == ["fork", "disconnect", "exit"]
            assert told.the("exit", worker).details == (None, signal.SIGTERM)

    scene.run(main())


def test_K13_what_is_asked_of_a_dead_worker(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("pass") as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            worker.kill()
            assert worker.disconnect() is worker
            assert worker.destroy() is worker
            delivery = worker.send("hello")
            assert not delivery
            with pytest.raises(Exception, match="closed"):
                await delivery
            assert "error" not in told.names(worker)

    scene.run(main())


GRANDCHILD = """
import subprocess
for number in os.listdir("/proc/self/fd"):
    try:
        os.set_inheritable(int(number), True)
    except OSError:
        pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
say(child.pid)
os._exit(7)
"""


def test_K14_an_exit_does_not_wait_for_a_grandchild_that_holds_the_channel(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(GRANDCHILD) as (cluster, told):
            worker = cluster.fork()
            try:
                await told.until("exit", worker)
                ((pid,),) = scene.said()
                assert proc.alive(pid)
                assert told.the("exit", worker).details == (7, None)
                assert told.names(worker)[-2:] == ["disconnect", "exit"]
                assert told.the("exit", worker).listed == ()
            finally:
                for (pid,) in scene.said():
                    os.kill(pid, signal.SIGKILL)

    scene.run(main())


def test_there_is_no_such_signal() -> None:
    with pytest.raises(ValueError, match="SIGNONSENSE"):
        Worker(1).kill("SIGNONSENSE")
    with pytest.raises(ValueError, match="4711"):
        Worker(1).destroy(4711)
