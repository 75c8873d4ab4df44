"""`Cluster` and `run` inside somebody else's program."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvloop

from clusterserve import BindError, BootError, Cluster, ClusterError, SettingsError
from tests.helpers import proc
from tests.helpers.server import EXAMPLE, ROOT, environment, new_mark
from tests.helpers.waiting import DEADLINE, eventually


@pytest.fixture(scope="module", autouse=True)
def libuv() -> None:
    """libuv opens a pipe with the first loop of a process and keeps it for good."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Neither a child nor a descriptor nor a thread more than before."""
    children = proc.children(os.getpid())
    descriptors = proc.descriptors(os.getpid())
    threads = threading.active_count()
    yield
    assert proc.children(os.getpid()) == children
    assert proc.descriptors(os.getpid()).keys() == descriptors.keys()
    assert threading.active_count() <= threads


def get(url: str, path: str = "/") -> httpx.Response:
    return httpx.get(url + path, trust_env=False, timeout=DEADLINE)


# ── the two ways in ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_with_cluster() -> None:
    with Cluster(EXAMPLE, workers=2, bind="127.0.0.1:0") as cluster:
        assert cluster.url.startswith("http://127.0.0.1:")
        url = cluster.url
        assert cluster.urls == [url]
        pids = {worker.pid for worker in cluster.workers.values()}
        eventually(lambda: {get(url, "/whoami").json()["pid"] for _ in pids} == pids, "each worker takes its turn")
        assert [(worker.id, worker.slot) for worker in cluster.workers.values()] == [(1, 0), (2, 1)]
        assert {worker.state for worker in cluster.workers.values()} == {"listening"}
    for pid in pids:
        assert not proc.alive(pid)
    with pytest.raises(httpx.ConnectError):
        get(url)


def test_async_with_cluster() -> None:
    async def main() -> None:
        async with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0") as cluster:
            async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=DEADLINE) as client:
                answers = [await client.get("/") for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4

    asyncio.run(main())


def test_the_loop_of_the_caller_runs_while_the_cluster_starts() -> None:
    async def main() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        counting = asyncio.create_task(count())
        async with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0"):
            pass
        counting.cancel()
        return turns

    # A fresh interpreter takes far longer than this many milliseconds to import Starlette.
    assert asyncio.run(main()) > 10


def test_from_a_thread_that_is_not_the_main_one() -> None:
    texts: list[str] = []

    def work() -> None:
        with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0") as cluster:
            texts.append(get(cluster.url).text)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(DEADLINE)
    assert len(texts) == 1
    assert texts[0].startswith("Hello from worker ")


def test_workers_outlive_the_thread_that_started_the_cluster() -> None:
    # PR_SET_PDEATHSIG fires when the *thread* that forked ends.
    cluster = Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0")
    thread = threading.Thread(target=cluster.__enter__)
    thread.start()
    thread.join(DEADLINE)
    try:
        assert get(cluster.url).status_code == 200
        assert list(cluster.workers) == [1]
    finally:
        cluster.__exit__(None, None, None)


def test_two_clusters_at_once() -> None:
    with (
        Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0") as one,
        Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0", policy="none") as other,
    ):
        assert one.url != other.url
        assert get(one.url, "/whoami").json()["pid"] == one.workers[1].pid
        assert get(other.url, "/whoami").json()["pid"] == other.workers[1].pid


def test_several_addresses(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Cluster(EXAMPLE, workers=1, bind=["127.0.0.1:0", "[::1]:0", f"unix:{path}"]) as cluster:
        assert len(cluster.urls) == 3
        assert cluster.url == cluster.urls[0]
        assert get(cluster.urls[0]).status_code == 200
        assert get(cluster.urls[1]).status_code == 200
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), trust_env=False) as client:
            assert client.get("http://localhost/").status_code == 200
    assert not path.exists()


def test_an_exception_in_the_block_is_the_callers_own() -> None:
    pids = []

    def block() -> None:
        with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0") as cluster:
            pids.append(cluster.workers[1].pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert not proc.alive(pids[0])


def test_a_worker_that_dies_is_replaced_here_too() -> None:
    with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0", restart_backoff=0.01) as cluster:
        os.kill(cluster.workers[1].pid, signal.SIGKILL)
        assert get(cluster.url, "/whoami").json()["id"] == 2
        eventually(lambda: list(cluster.workers) == [2], "the successor is in the list")


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_app_object_is_refused() -> None:
    from examples.asgi_app import app

    with pytest.raises(SettingsError, match=r"(?i)import string.*module:app"):
        Cluster(app, workers=1, bind="127.0.0.1:0")  # type: ignore[arg-type]


def test_a_boot_error_carries_the_workers_own_traceback() -> None:
    with pytest.raises(BootError) as caught, Cluster("tests.helpers.apps.raises:app", workers=2, bind="127.0.0.1:0"):
        pass
    assert isinstance(caught.value, ClusterError)
    assert caught.value.traceback.count("RuntimeError: the app's own trouble") == 1
    assert "raises.py" in caught.value.traceback
    assert "the app's own trouble" in str(caught.value)


def test_a_boot_error_in_async_with() -> None:
    async def main() -> None:
        async with Cluster("tests.helpers.apps.raises:app", workers=1, bind="127.0.0.1:0"):
            pass

    with pytest.raises(BootError, match="the app's own trouble"):
        asyncio.run(main())


def test_a_bind_error_is_an_oserror_too() -> None:
    with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0") as cluster:
        address = cluster.url.removeprefix("http://")
        with pytest.raises(BindError) as caught, Cluster(EXAMPLE, workers=1, bind=address):
            pass
    assert isinstance(caught.value, OSError)
    assert caught.value.address == address


def test_an_unknown_setting_is_refused_with_the_near_match() -> None:
    with pytest.raises(SettingsError, match="workers"):
        Cluster(EXAMPLE, worker=2)


def test_policy_and_dispatch_are_frozen() -> None:
    with Cluster(EXAMPLE, workers=1, bind="127.0.0.1:0", policy="least") as cluster:
        settings = cluster.settings
        assert (settings.policy, settings.dispatch) == ("least", "auto")
        for name in ("policy", "dispatch"):
            with pytest.raises(AttributeError):
                setattr(settings, name, "rr")
        with pytest.raises(AttributeError):
            cluster.settings = settings  # type: ignore[misc]


def test_a_change_of_the_environment_after_the_start_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(EXAMPLE, workers=2, bind="127.0.0.1:0", policy="rr", restart_backoff=0.01) as cluster:
        monkeypatch.setenv("CLUSTERSERVE_POLICY", "none")
        os.kill(cluster.workers[1].pid, signal.SIGKILL)
        eventually(lambda: 3 in cluster.workers, "there is a successor")
        listening = proc.listening_inodes(httpx.URL(cluster.url).port or 0)
        assert get(cluster.url).status_code == 200
        assert not any(listening & proc.socket_inodes(worker.pid) for worker in cluster.workers.values())


# ── a good guest ────────────────────────────────────────────────────────────────────────────────────────────────────


def program(text: str) -> subprocess.CompletedProcess[str]:
    """Run a host program of its own; it must end by itself and leave nothing."""
    value, mark = new_mark()
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        cwd=ROOT,
        env=environment(value, None, Path("/tmp")),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert proc.marked(mark) == []
    return finished


def test_signal_handlers_and_children_of_the_host_are_not_touched() -> None:
    finished = program("""
        import os, signal, subprocess, httpx
        from clusterserve import Cluster

        seen = []
        numbers = [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
        for number in numbers:
            signal.signal(number, lambda n, f: seen.append(n))
        handlers = [signal.getsignal(number) for number in numbers]
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        early = subprocess.Popen(["sh", "-c", "exit 5"])
        while os.waitid(os.P_PID, early.pid, os.WEXITED | os.WNOWAIT) is None:
            pass
        with Cluster("examples.asgi_app:app", workers=2, bind="127.0.0.1:0", restart_backoff=0.01) as cluster:
            late = subprocess.Popen(["sh", "-c", "exit 6"])
            os.waitid(os.P_PID, late.pid, os.WEXITED | os.WNOWAIT)
            os.kill(cluster.workers[1].pid, signal.SIGKILL)
            while 3 not in cluster.workers:
                httpx.get(cluster.url, trust_env=False)
            assert [signal.getsignal(number) for number in numbers] == handlers
            assert signal.set_wakeup_fd(-1) == wakeup
            for number in numbers:
                os.kill(os.getpid(), number)
            assert httpx.get(cluster.url, trust_env=False).status_code == 200
        assert [signal.getsignal(number) for number in numbers] == handlers
        # Not reaped by anybody but their own parent: the exit codes are still there.
        assert early.wait() == 5
        assert late.wait() == 6
        assert set(numbers) <= set(seen), seen
        print("well")
    """)
    assert (finished.returncode, finished.stdout.splitlines()[-1:]) == (0, ["well"]), finished.stdout + finished.stderr


def test_a_host_that_ignores_its_children() -> None:
    # With SIGCHLD ignored the kernel reaps by itself; exits must still be learned.
    finished = program("""
        import os, signal, httpx
        from clusterserve import Cluster

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with Cluster("examples.asgi_app:app", workers=1, bind="127.0.0.1:0", restart_backoff=0.01) as cluster:
            os.kill(cluster.workers[1].pid, signal.SIGKILL)
            assert httpx.get(cluster.url + "/whoami", trust_env=False).json()["id"] == 2
        print("well")
    """)
    assert (finished.returncode, finished.stdout.splitlines()[-1:]) == (0, ["well"]), finished.stdout + finished.stderr


def test_a_host_that_ends_without_leaving_the_block() -> None:
    finished = program("""
        import os
        from clusterserve import Cluster

        Cluster("examples.asgi_app:app", workers=2, bind="127.0.0.1:0").__enter__()
        print("up", flush=True)
        os._exit(9)
    """)
    assert finished.returncode == 9
    assert "up" in finished.stdout


def test_run_blocks_and_handles_signals() -> None:
    finished = program("""
        import os, signal, threading, httpx
        import clusterserve

        me = os.getpid()

        def later():
            # The main thread is inside run(); stop it as a user would, once somebody answers.
            transport = httpx.HTTPTransport(uds=path, retries=10)
            with httpx.Client(transport=transport, timeout=20, trust_env=False) as client:
                assert client.get("http://localhost/").status_code == 200
            os.kill(me, signal.SIGINT)

        path = f"/tmp/clusterserve-e2e-run-{me}.sock"
        threading.Thread(target=later, daemon=True).start()
        code = clusterserve.run("examples.asgi_app:app", workers=1, bind=f"unix:{path}")
        assert not os.path.exists(path)
        print("code", code)
    """)
    assert "code 0" in finished.stdout, finished.stdout + finished.stderr
