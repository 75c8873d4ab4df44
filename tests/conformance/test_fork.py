"""Fork, environment, stdio and settings (F)."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from clusterserve import SCHED_NONE, SCHED_RR, Cluster, ClusterError, SettingsError, faults
from clusterserve.settings import Settings
from tests.conformance.helpers import IDLES, LISTENS, PATIENCE, Scene
from tests.helpers import everybody, proc
from tests.helpers.waiting import eventually


def test_F01_variables_of_a_fork(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "the master's")
    source = """
    say(os.environ["OWN"], os.environ["INHERITED"], bool(worker.send("hello")))
    asyncio.run(forever())
    """

    async def main() -> None:
        async with scene.cluster(source) as (cluster, told):
            worker = cluster.fork({"OWN": "given", "INHERITED": "overridden"})
            await told.until("message", worker)
            await told.when(scene.said, "it has told")
            assert scene.said() == [["given", "overridden", True]]
            assert os.environ["INHERITED"] == "the master's"

    scene.run(main())


def test_F02_nobody_can_be_told_to_be_another_worker(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("say(worker.id, worker.slot)") as (cluster, told):
            mark = {"CLUSTERSERVE_WORKER": "77", "CLUSTERSERVE_WORKER_SLOT": "77", "CLUSTERSERVE_STDIO": "77:0"}
            await told.until("exit", cluster.fork(mark))
            assert scene.said() == [[1, 0]]

    scene.run(main())


ECHOES = """
for number in {numbers}:
    with socket.socket(fileno=number) as sock:
        sock.sendall(sock.recv(100).upper())
asyncio.run(forever())
"""


@pytest.mark.parametrize(("row", "numbers"), [("F03", [4]), ("F04", [4, 5, 6])])
def test_F03_F04_extra_pipes(scene: Scene, row: str, numbers: list[int]) -> None:
    stdio = ["inherit", "inherit", "inherit", "ipc", *["pipe"] * len(numbers)]

    async def main() -> None:
        async with scene.cluster(ECHOES.format(numbers=numbers), stdio=stdio) as (cluster, told):
            worker = cluster.fork()
            assert worker.process is not None
            assert worker.process.stdio[:4] == (None,) * 4
            for number in numbers:
                reader, writer = await asyncio.open_connection(sock=worker.process.stdio[number])
                writer.write(b"hello %d" % number)
                assert await asyncio.wait_for(reader.read(), PATIENCE) == b"HELLO %d" % number
                writer.close()
            worker.disconnect()
            await told.until("exit", worker)
            assert told.the("exit", worker).details == (0, None)

    scene.run(main())


def test_F05_the_directory_of_later_workers(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster("say(os.getcwd())") as (cluster, told):
            assert cluster.settings.cwd is None
            await told.until("exit", cluster.fork())
            cluster.setup(cwd=str(scene.path))
            await told.until("exit", cluster.fork())
            assert scene.said() == [[os.getcwd()], [str(scene.path)]]

    scene.run(main())


def test_F06_arguments_and_silence(scene: Scene) -> None:
    async def main() -> None:
        source = "print('printed'); print(*sys.argv[1:], file=sys.stderr)"
        async with scene.cluster(source) as (cluster, told):
            assert Cluster().settings.exec == ""
            cluster.setup(args=["one", "two"], silent=True)
            worker = cluster.fork()
            await told.until("exit", worker)
            assert told.the("setup").details[0].args == ("one", "two")
            assert worker.process is not None
            assert worker.process.stdout is not None
            assert worker.process.stderr is not None
            with worker.process.stdout as out, worker.process.stderr as err:
                assert (out.read(), err.read()) == (b"printed\n", b"one two\n")

    scene.run(main())


def test_F06_the_default_is_the_masters_own_script(scene: Scene) -> None:
    """As in Node: one script, which asks what it is."""
    script = scene.path / "both.py"
    script.write_text("""
import asyncio, sys
import clusterserve
if clusterserve.is_worker:
    print("worker", clusterserve.current_worker().id, sys.argv[1:], __name__, flush=True)
else:
    async def main():
        async with clusterserve.Cluster(respawn=False) as cluster:
            code, _ = await cluster.fork().wait_for("exit")
            print("master", code, flush=True)
    asyncio.run(main())
""")

    async def main() -> None:
        root = str(Path(__file__).parents[2])
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), "some", "words", stdout=-1, env={**os.environ, "PYTHONPATH": root}
        )
        out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert out.decode().splitlines() == ["worker 1 ['some', 'words'] __main__", "master 0"]

    scene.run(main())


def test_F07_each_setup_changes_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/the/script.py", "its", "words"])
    cluster = Cluster(respawn=False)
    assert (cluster.settings.exec, cluster.settings.args, cluster.settings.interpreter) == ("", (), ())
    cluster.setup()
    first = cluster.settings
    assert (first.exec, first.args, first.interpreter, first.silent) == ("/the/script.py", ("its", "words"), (), False)
    cluster.setup(exec="overridden.py")
    assert cluster.settings == dataclasses.replace(first, exec="overridden.py")
    cluster.setup(args=["foo", "bar"])
    assert cluster.settings == dataclasses.replace(first, exec="overridden.py", args=("foo", "bar"))
    cluster.setup(interpreter=["-X", "dev"])
    last = cluster.settings
    cluster.setup()
    assert cluster.settings == last
    assert last == dataclasses.replace(first, exec="overridden.py", args=("foo", "bar"), interpreter=("-X", "dev"))


def test_F08_F09_every_setup_is_told_with_its_own_settings(scene: Scene) -> None:
    async def main() -> None:
        cluster = Cluster(exec=scene.script(IDLES), respawn=False)
        told: list[Settings] = []
        cluster.on("setup", told.append)
        cluster.setup(exec="one.py")
        async with cluster:
            cluster.setup(exec="two.py")
            cluster.setup()
            await cluster.wait_for("setup", PATIENCE)
            cluster.setup(exec="three.py")
            await cluster.wait_for("setup", PATIENCE)
        assert [each.exec for each in told] == ["one.py", "two.py", "two.py", "three.py"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            told[0].exec = "another.py"  # type: ignore[misc]

    scene.run(main())


def test_F10_defaults_are_looked_up_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/the/script.py"])
    cluster = Cluster(respawn=False)
    sys.argv.append("late")
    cluster.setup()
    assert cluster.settings.args == ("late",)


def test_F11_running_workers_stay_as_they_are(scene: Scene) -> None:
    def line(pid: int | None) -> list[str]:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]

    async def main() -> None:
        async with scene.cluster(args=["old"]) as (cluster, told):
            first = cluster.fork()
            await told.until("online", first)
            before = line(first.pid)
            cluster.setup(args=["new"])
            second = cluster.fork()
            await told.until("online", second)
            assert line(first.pid) == before
            assert (before[-1], line(second.pid)[-1]) == ("old", "new")

    scene.run(main())


AUDITED: list[tuple[Any, ...]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "clusterserve.fork":
        AUDITED.append(arguments)


def test_F13_a_fork_can_be_observed_by_the_process(scene: Scene) -> None:
    # An audit hook cannot be taken away.
    sys.addaudithook(_audit)

    async def main() -> None:
        async with scene.cluster() as (cluster, told):
            worker = cluster.fork()
            await told.until("fork", worker)
            assert (worker.id, worker.slot, worker.pid) in AUDITED

    scene.run(main())


def test_F14_options_of_the_interpreter(scene: Scene) -> None:
    """Those of the master reach workers, and `interpreter` adds some; what runs first knows which worker it is."""
    script = scene.script("say(sys.flags.optimize, sys.warnoptions[-1:], sys.flags.dev_mode, worker.id)")
    master = f"""
import asyncio
from clusterserve import Cluster
async def main():
    env = {{"REPORT": {str(scene.path / "report")!r}}}
    async with Cluster(exec={script!r}, respawn=False, env=env, interpreter=["-X", "dev"]) as cluster:
        await cluster.fork().wait_for("exit")
asyncio.run(main())
"""

    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-O", "-W", "error::UserWarning", "-c", master, cwd=Path(__file__).parents[2]
        )
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
        assert scene.said() == [[1, ["error::UserWarning"], True, 1]]

    scene.run(main())


@pytest.mark.parametrize("name", ["rr", "none"])
def test_F15_the_policy_from_the_environment(scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CLUSTERSERVE_SCHED_POLICY", name)
    cluster = Cluster(exec=scene.script(IDLES), respawn=False)
    assert cluster.scheduling_policy == {"rr": SCHED_RR, "none": SCHED_NONE}[name]
    cluster.scheduling_policy = SCHED_RR
    assert cluster.settings.policy == "rr"
    with pytest.raises(ValueError, match="did you mean 'none'"):
        cluster.scheduling_policy = "nnone"


def test_F15_the_policy_is_frozen(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster() as (cluster, _):
            cluster.fork()
            with pytest.raises(ClusterError, match="stays 'rr'"):
                cluster.scheduling_policy = SCHED_NONE
            assert cluster.scheduling_policy == SCHED_RR

    scene.run(main())


ROOTS = """
import asyncio, os, sys, urllib.request
from clusterserve import Cluster

async def main():
    async with Cluster(
        exec={script!r}, respawn=False, env={env!r}, uid={uid}, cwd="/", bind="127.0.0.1:{port}"
    ) as cluster:
        worker = cluster.fork()
        await worker.wait_for("listening")
        reader, writer = await asyncio.open_connection("127.0.0.1", {port})
        writer.write(b"hello\\n")
        assert int(await reader.read()) == worker.pid
        writer.close()
        assert os.stat(f"/proc/{{worker.pid}}").st_uid == {uid}
        other = cluster.fork()
        await other.wait_for("listening")
        other.kill("SIGKILL")
        assert await other.wait_for("exit") == (None, 9)
        print(worker.pid, os.getuid(), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""


@pytest.mark.needs_root
def test_F16_workers_of_another_user() -> None:
    # Not pytest's directory, which is closed to others.
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        workers_of_another_user(Scene(Path(path)))


def workers_of_another_user(scene: Scene) -> None:
    """The master keeps the port that only root may open; and its death is theirs, though they are not its user's."""
    port = free_privileged_port()
    script = scene.script(f"""
    say(os.getuid(), os.getgid(), os.getgroups())
    async def main():
        async with await serve(port={port}):
            await forever()
    asyncio.run(main())
    """)
    Path(scene.environment["REPORT"]).touch()
    Path(scene.environment["REPORT"]).chmod(0o666)
    source = ROOTS.format(script=script, env=scene.environment, uid=everybody.NOBODY, port=port)
    python = everybody.python()
    assert python is not None
    with subprocess.Popen(
        [python, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=everybody.environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid, uid = map(int, process.stdout.readline().split())
        assert uid == 0
        account = pwd.getpwuid(everybody.NOBODY)
        groups = os.getgrouplist(account.pw_name, account.pw_gid)
        assert scene.said() == [[everybody.NOBODY, account.pw_gid, groups]] * 2
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    eventually(lambda: not proc.alive(pid), "the worker is gone with its master", within=PATIENCE)


def free_privileged_port() -> int:
    """One below 1024 that nobody listens on."""
    for port in range(1023, 512, -1):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("there is none")


def test_F17_stdio_overrides_silent(scene: Scene) -> None:
    async def main() -> None:
        stdio = ["ignore", "ignore", "pipe", "ipc"]
        source = "print('lost'); print('kept', file=sys.stderr); say(sys.stdin.read())"
        async with scene.cluster(source, silent=True, stdio=stdio) as (cluster, told):
            worker = cluster.fork()
            await told.until("exit", worker)
            assert worker.process is not None
            assert (worker.process.stdin, worker.process.stdout) == (None, None)
            assert worker.process.stderr is not None
            with worker.process.stderr as err:
                assert err.read() == b"kept\n"
            assert scene.said() == [[""]]

    scene.run(main())


@pytest.mark.parametrize("stdio", [["inherit", "inherit", "inherit"], ["pipe", "pipe", "pipe", "ipc", "ipc"]])
def test_F17_there_must_be_an_entry_for_the_channel(scene: Scene, stdio: list[str]) -> None:
    cluster = Cluster(exec=scene.script(IDLES), respawn=False)
    with pytest.raises(SettingsError, match="'ipc'"):
        cluster.setup(stdio=stdio)


def test_F17_a_file_as_output(scene: Scene) -> None:
    output = open(scene.path / "out", "wb")  # noqa: SIM115 - main closes it

    async def main() -> None:
        with output:
            stdio = ["ignore", output, output, "ipc"]
            async with scene.cluster("print('printed')", stdio=stdio) as (cluster, told):
                await told.until("exit", cluster.fork())
        assert (scene.path / "out").read_text() == "printed\n"

    scene.run(main())


def test_streams_that_nobody_asks_for_leave_nothing_open(scene: Scene) -> None:
    async def main() -> None:
        stdio = ["pipe", "pipe", "pipe", "ipc", "pipe"]
        async with scene.cluster("pass", stdio=stdio) as (cluster, told):
            await told.until("exit", cluster.fork())
            told.all.clear()
            told.own.clear()

    scene.run(main())
    gc.collect()
    before = proc.descriptors(os.getpid())
    scene.run(main())
    gc.collect()
    assert proc.descriptors(os.getpid()).keys() == before.keys()


def spawn_failure(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(LISTENS) as (cluster, told):
            cluster.setup(cwd="/nonexistent")
            worker = cluster.fork()
            late: list[str] = []
            # As with every other event: who listens right after is in time.
            worker.on("error", lambda error: late.append(type(error).__name__))
            worker.on("exit", lambda: late.append("exit"))
            await told.until("exit", worker)
            assert late == ["FileNotFoundError", "exit"]
            assert told.names(worker) == ["error", "exit"]
            assert told.the("exit", worker).details == (None, None)
            assert told.the("exit", worker).listed == ()
            assert (worker.process, worker.is_dead()) == (None, True)
            # The master is none the worse for it.
            cluster.setup(cwd=None)
            other = cluster.fork()
            await told.until("listening", other)
            assert other.id == worker.id + 1

    scene.run(main())


def test_F18_a_worker_that_cannot_be_spawned(scene: Scene) -> None:
    spawn_failure(scene)


def test_F18_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A master that says nothing of it, as Node's says nothing of the exit."""
    monkeypatch.setattr(faults, "_ON", frozenset({"no-exit-of-the-unborn"}))
    scene.patience = 1.0
    with pytest.raises(AssertionError, match="exit of <Worker 1"):
        spawn_failure(scene)
