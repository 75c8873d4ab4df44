"""`--preload`: the application is imported once, in a template, and every worker is a fork of that."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from clusterserve import Cluster
from tests.helpers import everybody, proc
from tests.helpers.apps.preloaded import SOURCE
from tests.helpers.load import under_load
from tests.helpers.raw import request
from tests.helpers.server import IN_TURN, WORKER_LISTENS, Serve, Server, run
from tests.helpers.waiting import DEADLINE, eventually

APP = "tests.helpers.apps.preloaded:app"
FULL = "tests.helpers.apps.full:app"
QUICK = ("--restart-backoff", "0.01")
# "At once", on a machine that is busy with ten times as much; the kernel does it.
SOON = 20.0
TEMPLATE = re.compile(r"Template (\d+) \(pid (\d+)\) loads")


def facts(server: Server, path: str = "/") -> dict[str, Any]:
    answer = server.get(path).json()
    assert isinstance(answer, dict)
    return answer


def of_all(server: Server) -> list[dict[str, Any]]:
    """The facts of every living worker, by slot."""
    pids = [worker.pid for worker in server.workers]
    found: dict[int, dict[str, Any]] = {}

    def ask() -> bool:
        answer = facts(server)
        found[answer["pid"]] = answer
        return found.keys() >= set(pids)

    eventually(ask, f"all of {pids} have answered")
    return [found[pid] for pid in pids]


def template(server: Server) -> int:
    """The newest template's pid."""
    return int(server.found(TEMPLATE)[-1][2])


def kinds(pid: int) -> Counter[str]:
    """What a process's descriptors are, without which ones."""
    return Counter(re.sub(r"\[\d+\]$", "", link) for link in proc.descriptors(pid).values())


@pytest.fixture(scope="module")
def server(serve_module: Serve) -> Server:
    return serve_module("--preload", *IN_TURN, app=APP, workers=3)


class TestWorkers:
    def test_the_application_was_imported_once_and_by_none_of_them(self, server: Server) -> None:
        answers = of_all(server)
        assert {each["imported_by"] for each in answers} == {template(server)}
        assert template(server) not in {each["pid"] for each in answers}

    def test_they_are_the_masters_children_like_any_worker(self, server: Server) -> None:
        answers = of_all(server)
        assert {each["parent"] for each in answers} == {server.pid}
        assert proc.children(server.pid) == sorted([template(server), *(each["pid"] for each in answers)])

    def test_each_has_its_slot_and_a_lifespan_of_its_own(self, server: Server) -> None:
        answers = of_all(server)
        assert [each["slot"] for each in answers] == ["0", "1", "2"]
        assert [each["lifespan"] for each in answers] == [each["pid"] for each in answers]

    def test_no_two_have_the_same_random_numbers(self, server: Server) -> None:
        answers = of_all(server)
        assert len({each["random"] for each in answers}) == 3
        assert len({each["uuid"] for each in answers}) == 3

    def test_none_has_a_descriptor_of_anybody_else(self, server: Server, serve: Serve) -> None:
        spawned = serve(*IN_TURN, app=APP, workers=1)
        facts(spawned)
        facts(server)
        (usual,) = (each.pid for each in spawned.workers)
        pids = [each.pid for each in server.workers]
        # None has a client any more, sooner or later.
        eventually(lambda: all(kinds(pid) == kinds(usual) for pid in pids), "they have what a spawned worker has")
        # Its channel, and what it was started with, once it has closed what the last worker has.
        eventually(lambda: len(proc.descriptors(template(server))) == 4, "the template has closed everything")
        sockets: Counter[int] = Counter()
        for pid in pids:
            sockets.update(proc.socket_inodes(pid) - proc.socket_inodes(template(server)))
        assert set(sockets.values()) == {1}
        assert len(proc.socket_inodes(template(server)) - proc.socket_inodes(server.pid)) == 1


class Code:
    """An application's file."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "preloaded_code.py"
        self.env = {"PYTHONPATH": str(directory)}
        self._writes = 0
        self.is_(SOURCE)

    def is_(self, source: str) -> None:
        self.path.write_text(source)
        # Python takes a compiled file for fresh that is of the same second and size.
        self._writes += 1
        os.utime(self.path, (self._writes * 10, self._writes * 10))

    def says(self, version: str) -> None:
        self.is_(SOURCE.replace('VERSION = "one"', f'VERSION = "{version}"'))


@pytest.fixture
def code(tmp_path: Path) -> Code:
    return Code(tmp_path)


class TestReload:
    def test_new_code_is_in_a_new_template_and_nothing_is_lost(self, serve: Serve) -> None:
        # A blank variable is as good as none, for uvicorn in the template too.
        server = serve("--preload", app=FULL, workers=2, env={"WEB_CONCURRENCY": ""})
        with under_load(server.address) as load:
            for turn in range(2):
                before = template(server)
                server.signal(signal.SIGHUP)
                wanted = [3 + 2 * turn, 4 + 2 * turn]
                eventually(lambda: [each.id for each in server.workers] == wanted, f"workers {wanted} serve alone")  # noqa: B023
                eventually(lambda: not proc.alive(before), "the old template is gone")  # noqa: B023
                load.answered(10)
        assert len(server.found(TEMPLATE)) == 3

    def test_what_is_changed_is_imported_again(self, serve: Serve, code: Code) -> None:
        server = serve("--preload", app="preloaded_code:app", workers=1, env=code.env)
        code.says("two")
        assert facts(server)["version"] == "one"
        server.signal(signal.SIGHUP)
        eventually(lambda: facts(server)["version"] == "two", "the new code serves")

    def test_broken_code_leaves_the_old_one_and_its_template(self, serve: Serve, code: Code) -> None:
        server = serve("--preload", *QUICK, app="preloaded_code:app", workers=1, env=code.env, noise=True)
        old = facts(server)
        code.is_("raise RuntimeError('its own trouble')")
        server.signal(signal.SIGHUP)
        (told,) = server.wait_for(r"Reload failed, generation 2 cannot start: .*; generation 1 stays")
        assert "the application 'preloaded_code:app' could not be loaded" in told[0]
        assert len(server.found("Traceback")) == 1
        assert facts(server)["pid"] == old["pid"]
        # Whoever replaces a worker now has the code of those that serve: their template has it.
        os.kill(old["pid"], signal.SIGKILL)
        server.wait_for(WORKER_LISTENS, count=2)
        new = facts(server)
        assert (new["version"], new["imported_by"]) == ("one", old["imported_by"])
        assert new["pid"] != old["pid"]
        # Repaired, it goes on.
        code.says("three")
        server.signal(signal.SIGHUP)
        eventually(lambda: facts(server)["version"] == "three", "the repaired code serves")


class TestCrashes:
    def test_exits_are_known_exactly(self, serve: Serve) -> None:
        server = serve("--preload", *QUICK, app=APP, workers=1)
        with server.connect() as client:
            client.send(request("GET", "/exit/42"))
            server.wait_for(r"Worker 1 \(slot 0, pid \d+\) exited with code 42")
        server.wait_for(WORKER_LISTENS, count=2)
        os.kill(server.workers[0].pid, signal.SIGKILL)
        server.wait_for(r"Worker 2 \(slot 0, pid \d+\) was killed by SIGKILL")
        server.wait_for(WORKER_LISTENS, count=3)

    def test_a_template_that_dies_is_replaced_and_no_worker_minds(self, serve: Serve) -> None:
        server = serve("--preload", *QUICK, app=APP, workers=2)
        before, first = of_all(server), template(server)
        os.kill(first, signal.SIGKILL)
        server.wait_for(rf"Template 1 \(pid {first}\) was killed by SIGKILL; running workers go on without it")
        server.wait_for(TEMPLATE, count=2)
        assert [each["pid"] for each in of_all(server)] == [each["pid"] for each in before]
        # Who is to be replaced has to wait for the new one.
        os.kill(before[0]["pid"], signal.SIGKILL)
        server.wait_for(WORKER_LISTENS, count=3)
        assert [each["imported_by"] for each in of_all(server)] == [template(server), first]
        assert template(server) != first

    @pytest.mark.parametrize("path", ["/block", "/"])
    def test_a_master_that_is_killed_takes_all_with_it(self, serve: Serve, path: str) -> None:
        server = serve("--preload", app=APP, workers=2)
        with server.connect() as client:
            client.send(request("GET", path))
            if path == "/block":
                server.wait_for("It holds the loop")
            server.kill()
            server.wait()
            eventually(lambda: server.processes() == [], "workers and template are gone", within=SOON)


class TestBadStarts:
    def fails(self, app: str, *options: str, code: int = 3, env: dict[str, str] | None = None) -> str:
        done = run(app, "--bind", "127.0.0.1:0", "--workers", "2", "--preload", *options, env=env)
        assert done.code == code
        return done.err

    def test_an_import_that_raises_is_told_once(self) -> None:
        told = self.fails("tests.helpers.apps.raises:app")
        assert told.count("Traceback (most recent call last)") == 1
        assert told.count("the application 'tests.helpers.apps.raises:app' could not be loaded") == 1

    def test_an_import_that_exits(self, code: Code) -> None:
        # As Python itself does at its end: the channel is closed a moment before.
        code.is_("import os, time; os.closerange(3, 100); time.sleep(0.2); os._exit(7)")
        assert "the template exited with code 7" in self.fails("preloaded_code:app", env=code.env)

    def test_a_lifespan_that_fails(self) -> None:
        told = self.fails("tests.helpers.apps.lifespans:fails_at_startup")
        assert told.count("RuntimeError: the lifespan's own trouble") == 1

    def test_an_import_that_never_ends(self) -> None:
        told = self.fails("tests.helpers.apps.hangs:app", "--timeout-boot", "1")
        assert "it was not ready within 1 s" in told

    def test_threads_are_refused(self, code: Code) -> None:
        code.is_(
            "from threading import Event, Thread\n"
            "Thread(target=Event().wait, name='pump', daemon=True).start()\n"
            "app = 1"
        )
        (error,) = [line for line in self.fails("preloaded_code:app", env=code.env).splitlines() if "error:" in line]
        assert "importing 'preloaded_code:app' starts threads, which do not survive the fork of a worker: pump" in error

    def test_event_loops_are_refused(self, code: Code) -> None:
        code.is_("import asyncio\nloop = asyncio.new_event_loop()\napp = 1")
        told = self.fails("preloaded_code:app", env=code.env)
        assert "makes an event loop, which workers must not share: asyncio.unix_events._UnixSelectorEventLoop" in told

    def test_what_it_excludes(self) -> None:
        told = self.fails(APP, "--debug-wait", code=2)
        assert told.startswith("clusterserve: error: preload excludes debug_wait")


def test_a_stop_does_not_wait_for_the_import(serve: Serve) -> None:
    server = serve("--preload", app="tests.helpers.apps.hangs:app", workers=2, ready=False)
    server.wait_for("The import goes on for ever")
    server.terminate()
    assert server.wait() == 128 + signal.SIGTERM


def test_a_factory_is_called_once(serve: Serve, code: Code) -> None:
    code.is_(SOURCE.replace("    return app\n", "    print('made', flush=True)\n    return app\n"))
    server = serve("--preload", "--factory", app="preloaded_code:make", workers=2, env=code.env)
    assert {each["imported_by"] for each in of_all(server)} == {template(server)}
    assert len(server.found("^made$")) == 1


# ── in a program of somebody's ──────────────────────────────────────────────────────────────────────────────────────


def subreaper() -> bool:
    """Whether orphans come to this process."""
    found = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0) == 0
    return bool(found.value)


def about(cluster: Cluster, pids: set[int]) -> dict[int, dict[str, Any]]:
    """The facts of the workers with these pids."""
    found: dict[int, dict[str, Any]] = {}

    def ask() -> bool:
        answer = httpx.get(cluster.url, trust_env=False, timeout=DEADLINE).json()
        found[answer["pid"]] = answer
        return found.keys() >= pids

    eventually(ask, f"all of {pids} have answered")
    return found


def test_a_cluster_has_templates_and_its_program_keeps_its_orphans() -> None:
    uvloop.new_event_loop().close()
    children, descriptors = proc.children(os.getpid()), proc.descriptors(os.getpid()).keys()
    exits: list[tuple[int, int | None, int | None]] = []
    with Cluster(APP, preload=True, workers=2, bind="127.0.0.1:0", restart_backoff=0.01) as cluster:
        cluster.on("exit", lambda worker, code, signal: exits.append((worker.id, code, signal)))
        found = about(cluster, {worker.pid for worker in cluster.workers.values() if worker.pid})
        (template,) = {each["imported_by"] for each in found.values()}
        assert {each["parent"] for each in found.values()} == {os.getpid()}
        # One that the program forks is there at once, and imports by itself.
        alone = cluster.fork()
        assert alone.pid is not None
        assert about(cluster, {alone.pid})[alone.pid]["imported_by"] == alone.pid
        # What replaces it is a fork again.
        os.kill(alone.pid, signal.SIGKILL)
        eventually(lambda: exits == [(alone.id, None, signal.SIGKILL)], "its exit is told")
        successor = eventually(lambda: [each for each in cluster.workers.values() if each.id > alone.id], "it is back")
        pid = eventually(lambda: successor[0].pid if successor[0].state == "listening" else 0, "it listens")
        assert about(cluster, {pid})[pid]["imported_by"] == template
        assert not subreaper()
    assert proc.children(os.getpid()) == children
    assert proc.descriptors(os.getpid()).keys() == descriptors


def test_workers_have_the_streams_they_are_given(code: Code, monkeypatch: pytest.MonkeyPatch) -> None:
    code.is_(
        SOURCE.replace(
            "    _started_in = os.getpid()\n", "    _started_in = os.getpid()\n    os.write(4, b'started')\n"
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(code.path.parent))
    monkeypatch.syspath_prepend(str(code.path.parent))
    stdio = ("ignore", "inherit", "inherit", "ipc", "pipe")
    with Cluster("preloaded_code:app", preload=True, workers=2, bind="127.0.0.1:0", stdio=stdio) as cluster:
        for worker in cluster.workers.values():
            assert worker.process is not None
            with worker.process.stdio[4] as channel:
                channel.settimeout(DEADLINE)
                assert channel.recv(100) == b"started"


_OF_ANOTHER_USER = """
import os, sys
from clusterserve import Cluster

with Cluster("tests.helpers.apps.preloaded:app", preload=True, workers=1, bind="127.0.0.1:0", uid={uid}) as cluster:
    (worker,) = cluster.workers.values()
    print(worker.pid, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.needs_root
def test_nothing_of_the_application_runs_as_root() -> None:
    python = everybody.python()
    assert python is not None
    source = _OF_ANOTHER_USER.format(uid=everybody.NOBODY)
    with subprocess.Popen(
        [python, "-c", source],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=everybody.environment(),
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        children = proc.children(process.pid)
        assert len(children) == 2
        assert worker in children
        for pid in children:
            (uids,) = re.findall(r"^Uid:\s(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
            assert uids.split() == [str(everybody.NOBODY)] * 4
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(DEADLINE)
        eventually(lambda: not any(proc.alive(pid) for pid in children), "both are gone", within=SOON)
