"""`Cluster`: its whole interface, every way out, and what it must leave alone in the program around it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve import BindError, BootError, Cluster, ClusterError, SettingsError
from clusterserve.core.distributor import Statistics
from tests.helpers import proc
from tests.helpers.waiting import DEADLINE, eventually

from .rig import no_more_descriptors

#: Answers with its process id; /wait/FILE waits for that file.
APP = """
import asyncio, os

async def app(scope, receive, send):
    what, _, path = scope["path"][1:].partition("/")
    while what == "wait" and not os.path.exists(path):
        await asyncio.sleep(0.002)
    body = str(os.getpid()).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

HANGS = "import threading; threading.Event().wait()"

Make = Callable[..., Cluster]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert [thread for thread in threading.enumerate() if thread not in before] == []


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes clusters for applications given as source text; stops them in the end."""
    made: list[Cluster] = []

    def make_one(source: str = APP, workers: int = 1, **settings: Any) -> Cluster:
        (tmp_path / "embedded_app.py").write_text(source)
        options: dict[str, Any] = {
            "app": "embedded_app:app", "app_dir": str(tmp_path), "bind": "127.0.0.1:0", "lifespan": "off", "ws": "none",
            "http": "httptools", "access_log": False, "restart_backoff": 0.01,
        }  # fmt: skip
        options.update(settings)
        made.append(Cluster(options.pop("app"), workers=workers, **options))
        return made[-1]

    yield make_one
    for each in made:
        each.stop(quick=True)


def connect(url: str, path: str = "/") -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)), DEADLINE)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
    return client


def answer(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


def get(url: str) -> int:
    """The pid of the worker that answers."""
    head, _, body = answer(connect(url)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    return int(body)


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run it in a thread; the list gets what it returns, or what it raises."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            outcome.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


# ── looking in ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_can_be_asked(make: Make, tmp_path: Path) -> None:
    cluster = make(workers=2, bind=["127.0.0.1:0", f"unix:{tmp_path}/s"])
    assert repr(cluster) == "<Cluster 'embedded_app:app' new>"
    with cluster as entered:
        assert entered is cluster
        assert repr(cluster) == "<Cluster 'embedded_app:app' running>"
        assert cluster.urls == [cluster.url, f"unix:{tmp_path}/s"]
        pids = {get(cluster.url) for _ in range(2)}
        assert {worker.pid for worker in cluster.workers.values()} == pids
        assert [(id, worker.id, worker.slot, worker.state) for id, worker in cluster.workers.items()] == [
            (1, 1, 0, "listening"),
            (2, 2, 1, "listening"),
        ]
        statistics = eventually(lambda: (s := cluster.statistics()).borrowed == 0 and s, "all is over")
        assert statistics == Statistics(0, 0, 0, 0, ((1, 0, 0, 0), (2, 1, 0, 0)))
        assert cluster.settings.workers == 2
        # Whatever it is that cannot be answered: nobody waits for ever.
        with pytest.raises(ZeroDivisionError):
            cluster._thread.ask(lambda engine: 1 // 0)
        with pytest.raises(SettingsError, match="no process can be given"):
            cluster.fork({"A": "\ud800"})
    assert repr(cluster) == "<Cluster 'embedded_app:app' stopped>"
    assert not (tmp_path / "s").exists()


def test_its_settings_cannot_be_changed(make: Make) -> None:
    cluster = make(policy="least")
    with pytest.raises(AttributeError):
        cluster.settings = cluster.settings  # type: ignore[misc]
    with pytest.raises(AttributeError):
        cluster.settings.policy = "rr"  # type: ignore[misc]


QUESTIONS: list[Callable[[Cluster], object]] = [
    lambda cluster: cluster.url,
    lambda cluster: cluster.urls,
    lambda cluster: cluster.statistics(),
]


def test_before_it_runs_and_after(make: Make) -> None:
    cluster = make()
    cluster.stop()
    for question in QUESTIONS:
        with pytest.raises(ClusterError, match="does not run"):
            question(cluster)
    # To stop what does not run means nothing.
    cluster.start()
    for question in QUESTIONS:
        assert question(cluster)
    cluster.stop()
    for question in QUESTIONS:
        with pytest.raises(ClusterError, match="does not run"):
            question(cluster)
    cluster.stop()
    cluster.stop(quick=True)


def test_asking_while_it_ends_never_hangs(make: Make) -> None:
    cluster = make()
    cluster.start()
    asking = [threading.Event() for _ in QUESTIONS]

    def ask(number: int) -> str:
        while True:
            try:
                QUESTIONS[number](cluster)
            except ClusterError as exc:
                return str(exc)
            asking[number].set()

    threads = [in_thread(lambda number=number: ask(number)) for number in range(len(QUESTIONS))]  # type: ignore[misc]
    assert all(event.wait(DEADLINE) for event in asking)
    cluster.stop()
    for thread, outcome in threads:
        thread.join(DEADLINE)
        assert outcome == ["the cluster does not run"]


def test_asking_while_it_serves_the_last_request(make: Make, tmp_path: Path) -> None:
    cluster = make()
    cluster.start()
    url = cluster.url
    client = connect(url, f"/wait/{tmp_path}/flag")
    eventually(lambda: cluster.statistics().borrowed == 1, "it is being served")
    thread, _ = in_thread(cluster.stop)
    eventually(lambda: cluster.workers[1].state == "draining", "it is being stopped")
    assert cluster.url == url
    (tmp_path / "flag").touch()
    assert b" 200 " in answer(client)
    thread.join(DEADLINE)
    with pytest.raises(ConnectionRefusedError):
        connect(url)


# ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_starts_once(make: Make) -> None:
    cluster = make()
    cluster.start()
    with pytest.raises(ClusterError, match="starts once"):
        cluster.start()
    assert get(cluster.url) == cluster.workers[1].pid
    cluster.stop()
    with pytest.raises(ClusterError, match="starts once"):
        cluster.start()


def test_it_starts_once_with_await_too(make: Make) -> None:
    async def main() -> None:
        async with make() as cluster:
            with pytest.raises(ClusterError, match="starts once"):
                await cluster.__aenter__()
            assert cluster.workers

    asyncio.run(main())


def test_an_exception_in_the_block(make: Make) -> None:
    cluster = make()
    with pytest.raises(ZeroDivisionError), cluster:
        raise ZeroDivisionError
    assert proc.children(os.getpid()) == []


def test_from_a_thread_that_ends(make: Make) -> None:
    cluster = make()
    thread, outcome = in_thread(cluster.start)
    thread.join(DEADLINE)
    assert outcome == [None]
    # Its workers are not that thread's.
    assert get(cluster.url) == cluster.workers[1].pid
    thread, outcome = in_thread(cluster.stop)
    thread.join(DEADLINE)
    assert outcome == [None]
    assert proc.children(os.getpid()) == []


def test_stopped_from_several_threads_at_once(make: Make) -> None:
    cluster = make()
    cluster.start()
    threads = [in_thread(cluster.stop) for _ in range(4)]
    for thread, outcome in threads:
        thread.join(DEADLINE)
        assert outcome == [None]


def test_a_quick_stop_hurries_a_graceful_one(make: Make, tmp_path: Path) -> None:
    cluster = make()
    cluster.start()
    client = connect(cluster.url, f"/wait/{tmp_path}/flag")
    eventually(lambda: cluster.statistics().borrowed == 1, "it is being served")
    thread, _ = in_thread(cluster.stop)
    eventually(lambda: cluster.workers[1].state == "draining", "it is being stopped")
    cluster.stop(quick=True)
    thread.join(DEADLINE)
    assert b" 200 " not in answer(client)


@pytest.mark.parametrize("quick", [False, True])
def test_stopped_by_another_thread_before_it_has_started(make: Make, quick: bool) -> None:
    cluster = make(HANGS)
    thread, outcome = in_thread(cluster.start)
    eventually(lambda: cluster._thread.is_started, "it is being started")
    cluster.stop(quick=quick)
    thread.join(DEADLINE)
    (error,) = outcome
    assert isinstance(error, ClusterError)
    assert str(error) == "it was stopped before it had started"


def asleep() -> Callable[[], bool]:
    """Whether the main thread has slept through the last ten looks.  Who waits for the interpreter's lock wakes up."""
    looks: list[str] = []

    def look() -> bool:
        looks.append(Path("/proc/self/status").read_text())
        seen = {line for text in looks[-10:] for line in text.splitlines() if line.startswith(("State", "voluntary"))}
        return len(looks) >= 10 and len(seen) == 2 and "State:\tS (sleeping)" in seen

    return look


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell that starts these tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_while_it_starts(make: Make) -> None:
    cluster = make(HANGS)

    def interrupt() -> None:
        eventually(lambda: cluster._thread.is_started and proc.children(os.getpid()), "a worker is there")
        # Python overlooks a signal that comes after its last look and before the system call that waits.
        eventually(asleep(), "the main thread waits")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread, _ = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt), cluster:
        pass
    thread.join()
    assert proc.children(os.getpid()) == []


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_while_its_thread_starts(make: Make, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """Python may raise KeyboardInterrupt before or after there is a thread."""
    cluster = make(HANGS)
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "clusterserve":
            start(thread)
            return
        if begun:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.start()
    assert proc.children(os.getpid()) == []


DIES_IN_SLOT_1 = (
    """
import os
if os.environ["CLUSTERSERVE_WORKER_SLOT"] == "1":
    os._exit(9)
"""
    + APP
)


def test_a_start_that_may_never_end(make: Make) -> None:
    """One listens, and the other dies again and again."""
    with pytest.raises(BootError, match=r"in slot 1: worker . exited with code 9") as caught:
        make(DIES_IN_SLOT_1, workers=2).start()
    assert "goes on trying" not in str(caught.value)
    assert proc.children(os.getpid()) == []


# ── handlers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_handlers_run_on_a_thread_of_ours(make: Make) -> None:
    cluster = make()
    names = []
    cluster.on("listening", lambda: names.append(threading.current_thread().name))

    @cluster.on("ready")
    async def ready() -> None:
        await asyncio.sleep(0)
        names.append(threading.current_thread().name)

    with cluster:
        eventually(lambda: len(names) == 2, "both are told")
    assert set(names) == {"clusterserve-events"}


def test_handlers_run_on_the_loop_that_entered(make: Make) -> None:
    async def main() -> None:
        cluster = make()
        threads = []
        cluster.on("listening", lambda: threads.append(threading.current_thread()))
        async with cluster:
            assert threads == [threading.main_thread()]

    asyncio.run(main())


def test_a_handler_that_raises_or_exits_harms_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    cluster = make()
    told: list[str] = []

    def raises(worker: object) -> None:
        told.append("raised")
        raise RuntimeError("its own trouble")

    def leaves(worker: object) -> None:
        told.append("left")
        sys.exit(3)

    cluster.on("fork", raises)
    cluster.on("online", leaves)
    with cluster:
        assert get(cluster.url) == cluster.workers[1].pid
    assert told == ["raised", "left"]
    assert "its own trouble" in caplog.text
    assert "A handler tried to end the program" in caplog.messages


def test_a_handler_may_change_and_stop_the_cluster(make: Make) -> None:
    cluster = make()
    seen: list[list[int]] = []
    done = threading.Event()

    def on_ready() -> None:
        cluster.scale(2)
        cluster.stop()
        done.set()

    cluster.on("stopped", lambda: seen.append(list(cluster.workers)))
    cluster.on("ready", on_ready)
    cluster.start()
    assert done.wait(DEADLINE)
    cluster.stop()
    assert seen == [[]]


def test_a_coroutine_handler_gets_to_its_end(make: Make) -> None:
    cluster = make()
    told: list[str] = []

    @cluster.on("stopped")
    async def stopped() -> None:
        await asyncio.sleep(0.01)
        told.append("stopped")

    with cluster:
        pass
    assert told == ["stopped"]


def test_the_program_decides_how_many(make: Make) -> None:
    cluster = make(respawn=False, workers=1)
    with cluster:
        assert list(cluster.workers) == [1]
        for change in (lambda: cluster.scale(2), cluster.reload):
            with pytest.raises(ClusterError, match="come and go by fork and disconnect only"):
                change()
        worker = cluster.fork()
        worker.wait_for("listening", DEADLINE).result()
        assert (worker.id, worker.slot) == (2, 1)
        cluster.workers[1].kill("SIGKILL")
        cluster.wait_for("exit", DEADLINE).result()
        assert list(cluster.workers) == [2]
        # The free slot is taken again.
        assert cluster.fork().slot == 0
        cluster.disconnect().result(DEADLINE)
        assert dict(cluster.workers) == {}
    with pytest.raises(ClusterError, match="does not run"):
        cluster.fork()
    assert isinstance(cluster.disconnect().exception(), ClusterError)


def test_a_fork_more_is_one_more_wanted(make: Make) -> None:
    with make() as cluster:
        worker = cluster.fork({"MARK": "given"})
        worker.wait_for("listening", DEADLINE).result()
        worker.kill("SIGKILL")
        cluster.wait_for("listening", DEADLINE).result()
        replacement = cluster.workers[3]
        assert replacement.slot == worker.slot == 1
        assert b"MARK=given" in proc_environment(replacement.pid).split(b"\0")
        cluster.disconnect().result(DEADLINE)
        assert dict(cluster.workers) == {}
        cluster.scale(1)
        assert get(cluster.url) == next(iter(cluster.workers.values())).pid


def proc_environment(pid: int | None) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_setup_refuses_what_it_cannot_change(make: Make) -> None:
    cluster = make()
    with pytest.raises(SettingsError, match="setup cannot change 'workers'"):
        cluster.setup(workers=2)
    with pytest.raises(SettingsError, match="exclude each other"):
        cluster.setup(exec="script.py")


# ── with await ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_async_with(make: Make) -> None:
    async def main() -> None:
        cluster = make()
        async with cluster as entered:
            assert entered is cluster
            pid = await asyncio.to_thread(get, cluster.url)
            assert pid == cluster.workers[1].pid
        assert proc.children(os.getpid()) == []
        with pytest.raises(ClusterError):
            cluster.url  # noqa: B018 - asked for its error

    asyncio.run(main())


def test_async_with_that_cannot_start(make: Make) -> None:
    async def main() -> None:
        with pytest.raises(BootError, match="its own trouble"):
            async with make("raise RuntimeError('its own trouble')"):
                pytest.fail("it started")
        assert proc.children(os.getpid()) == []

    asyncio.run(main())


def test_a_cancelled_entry_leaves_nothing(make: Make) -> None:
    async def main() -> None:
        entering = asyncio.ensure_future(make(HANGS).__aenter__())
        await asyncio.to_thread(eventually, lambda: proc.children(os.getpid()), "a worker is there")
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert proc.children(os.getpid()) == []

    asyncio.run(main())


def test_an_entry_that_is_cancelled_at_once(make: Make) -> None:
    async def main() -> None:
        cluster = make(HANGS)
        entering = asyncio.ensure_future(cluster.__aenter__())
        # Far enough to have begun, and no further.
        await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert repr(cluster).endswith("stopped>")

    asyncio.run(main())


def test_a_cancelled_exit_hurries(make: Make, tmp_path: Path) -> None:
    async def main() -> None:
        cluster = make()
        await cluster.__aenter__()
        client = connect(cluster.url, f"/wait/{tmp_path}/flag")
        eventually(lambda: cluster.statistics().borrowed == 1, "it is being served")
        leaving = asyncio.ensure_future(cluster.__aexit__(None, None, None))
        # Far enough to have given the order.
        await asyncio.sleep(0)
        await asyncio.to_thread(eventually, lambda: cluster.workers[1].state == "draining", "it is being stopped")
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert proc.children(os.getpid()) == []
        assert b" 200 " not in answer(client)

    asyncio.run(main())


def test_a_loop_that_ends_before_the_cluster(make: Make) -> None:
    cluster = make()

    async def main() -> None:
        await cluster.__aenter__()

    asyncio.run(main())
    assert get(cluster.url) == cluster.workers[1].pid
    cluster.stop()


# ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_app_that_is_an_object() -> None:
    for app in (object(), print, b"module:app"):
        with pytest.raises(SettingsError, match="import string"):
            Cluster(app)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"worker": 2}, "workers"),
        ({"workers": 0}, "workers"),
        ({"policy": "leest"}, "least"),
        ({"app": "module"}, "module:app"),
    ],
)
def test_settings_that_cannot_be(make: Make, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make(**settings)


def test_an_address_in_use(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        cluster = make(bind=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(BindError, match="address already in use"):
            cluster.start()
    assert repr(cluster).endswith("stopped>")


def test_an_application_that_cannot_be_loaded(make: Make) -> None:
    with pytest.raises(BootError) as caught:
        make("raise RuntimeError('its own trouble')", workers=2).start()
    assert caught.value.traceback.count("RuntimeError: its own trouble") == 1
    assert proc.children(os.getpid()) == []


def test_a_policy_that_cannot_be_had(make: Make) -> None:
    with pytest.raises(SettingsError, match="nowhere_at_all"):
        make(policy="nowhere_at_all:Policy").start()


def test_no_descriptor(make: Make) -> None:
    cluster = make()
    with no_more_descriptors(), pytest.raises(OSError, match="Too many open files"):
        cluster.start()
    with pytest.raises(ClusterError):
        cluster.url  # noqa: B018 - asked for its error


def test_descriptors_for_some_of_it_only(make: Make) -> None:
    """Wherever the limit is hit, there is an error, and nothing is left."""
    reached = 0
    for spare in range(1, 30, 3):
        cluster = make()
        numbers = [os.dup(0) for _ in range(spare)]
        with no_more_descriptors():
            for number in numbers:
                os.close(number)
            try:
                cluster.start()
            except (OSError, ClusterError):
                reached += 1
            else:
                break
        assert proc.children(os.getpid()) == []
    cluster.stop(quick=True)
    assert reached >= 3


# ── a good guest ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_signals_and_children_of_the_host_are_its_own(make: Make) -> None:
    numbers = [
        signal.SIGCHLD,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGQUIT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGPIPE,
    ]
    handlers = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    early = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    eventually(lambda: proc.state(early.pid) == "Z", "a child is dead")
    cluster = make()
    with cluster:
        late = subprocess.Popen([sys.executable, "-c", "raise SystemExit(6)"])
        eventually(lambda: proc.state(late.pid) == "Z", "another child is dead")
        os.kill(cluster.workers[1].pid, signal.SIGKILL)
        eventually(lambda: list(cluster.workers) == [2], "the worker is replaced")
        assert [signal.getsignal(number) for number in numbers] == handlers
        assert signal.set_wakeup_fd(wakeup) == -1
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert (early.wait(), late.wait()) == (5, 6)


def test_the_hosts_logging_is_left_alone(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("clusterserve")
    before = logger.level, logger.handlers[:], logger.propagate
    with caplog.at_level(logging.INFO, logger="clusterserve"), make() as cluster:
        assert f"Listening on {cluster.url}" in caplog.messages
    assert (logger.level, logger.handlers, logger.propagate) == before


@pytest.mark.parametrize("name", ["pid", "umask"])
def test_the_process_is_the_programs_own(name: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"^{name} is for run\(\) and the command line: this process is the program's"
    ):
        Cluster("a:b", **{name: "7"})
