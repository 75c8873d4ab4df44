"""Reload: new code in, old workers out one at a time, and no client that notices."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

from clusterserve import BootError, Cluster, ClusterError
from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.raw import Address, Client, request
from tests.helpers.server import KEEP, KEPT, Serve, Server
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"
NO_HANDLER = "the handler's own trouble"

BOTH = pytest.mark.parametrize("dispatch", ["connection", "request"])

SAYS = """
import os
async def app(scope, receive, send):
    body = b"{word} %d" % os.getpid()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""


class Code:
    """An application's file, and what it says."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "reloaded.py"
        self._writes = 0

    def says(self, word: str) -> None:
        self.is_(SAYS.format(word=word))

    def is_(self, source: str) -> None:
        self.path.write_text(source)
        # Python takes a compiled file for fresh that is of the same second and size.
        self._writes += 1
        os.utime(self.path, (self._writes * 10, self._writes * 10))


@pytest.fixture
def code(tmp_path: Path) -> Code:
    code = Code(tmp_path)
    code.says("one")
    return code


def reloaded(server: Server, first: int, count: int) -> None:
    """The workers from id `first` on listen, and no other lives."""
    wanted = list(range(first, first + count))
    eventually(lambda: sorted(each.id for each in server.workers) == wanted, f"workers {wanted} serve alone")


def descriptors(server: Server) -> dict[int, int]:
    # Sockets only: libuv opens /dev/null with its first stream, and keeps it.
    return {pid: len(proc.socket_inodes(pid)) for pid in server.processes()}


@BOTH
def test_nothing_is_lost_under_load(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, app=FULL, workers=2)
    server.warm()
    before = descriptors(server)
    with under_load(server.address) as load:
        for turn in range(2):
            server.signal(signal.SIGHUP)
            reloaded(server, 3 + 2 * turn, 2)
            load.answered(10)
    wanted = sorted(before.values())
    eventually(lambda: sorted(descriptors(server).values()) == wanted, "master and workers have let go of every client")
    assert len(server.found("Reloading")) == 2


@BOTH
def test_idle_connections_outlive_their_worker(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, *KEEP, workers=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(8)]
        for client in clients:
            assert client.ask("GET", "/whoami").json()["id"] <= 2
        server.signal(signal.SIGHUP)
        reloaded(server, 3, 2)
        assert {client.ask("GET", "/whoami").json()["id"] for client in clients} <= {3, 4}


@BOTH
def test_a_request_in_flight_is_finished_and_its_connection_goes_on(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, app=FULL, workers=1)
    with server.connect() as client:
        client.send(request("POST", "/echo", "Expect: 100-continue", "Content-Length: 4"))
        # The handler waits for the body, however long the successor needs.
        assert client.head().status == 100
        server.signal(signal.SIGHUP)
        server.wait_for(r"Worker 2 .*listening")
        client.send(b"body")
        assert client.response().body == b"body"
        # The word to go may still be under way to worker 1 when it has answered: it serves until then.
        eventually(lambda: client.ask("GET", "/whoami").json()["id"] == 2, "the successor has the connection")


@BOTH
def test_code_is_imported_again(serve: Serve, code: Code, dispatch: str) -> None:
    path = {"PYTHONPATH": str(code.path.parent)}
    server = serve("--dispatch", dispatch, *KEEP, app="reloaded:app", workers=2, env=path)
    with server.connect() as client:
        assert client.ask("GET", "/").text.startswith("one ")
        code.says("two")
        assert client.ask("GET", "/").text.startswith("one ")
        server.signal(signal.SIGHUP)
        reloaded(server, 3, 2)
        assert client.ask("GET", "/").text.startswith("two ")


@pytest.mark.parametrize(
    ("broken", "why"),
    [("raise RuntimeError('its own trouble')", "its own trouble"), ("import os; os._exit(7)", "7")],
    ids=["raises", "exits"],
)
def test_broken_code_leaves_the_old_one_serving(serve: Serve, code: Code, broken: str, why: str) -> None:
    server = serve(*KEEP, app="reloaded:app", workers=2, noise=True, env={"PYTHONPATH": str(code.path.parent)})
    pids = {worker.pid for worker in server.workers}
    with server.connect() as client:
        assert client.ask("GET", "/").text.startswith("one ")
        code.is_(broken)
        server.signal(signal.SIGHUP)
        (told,) = server.wait_for(r"Reload failed, generation 2 cannot start: .*")
        assert "generation 1 stays" in told[0]
        eventually(lambda: set(proc.children(server.pid)) == pids, "only the old workers are left")
        assert client.ask("GET", "/").text.startswith("one ")
        # A second reload, of code that is whole again.
        code.says("two")
        server.signal(signal.SIGHUP)
        reloaded(server, 4, 2)
        assert client.ask("GET", "/").text.startswith("two ")
    assert len(server.found("cannot start")) == 1
    assert any(why in line.text for line in server.lines)
    assert len(server.found("Traceback")) == ("raise" in broken)
    assert not server.found("no worker process could be started")


def test_after_a_reload_that_failed_a_dead_worker_is_replaced_as_soon_as_the_code_allows(
    serve: Serve, code: Code
) -> None:
    """There is no other code to start from than the files.  Result: the others serve, it is loud, and tried again."""
    server = serve(
        *("--restart-backoff", "0.1", "--restart-backoff-max", "0.2"),
        app="reloaded:app",
        workers=2,
        noise=True,
        env={"PYTHONPATH": str(code.path.parent)},
    )
    victim, other = server.workers
    code.is_("raise RuntimeError('its own trouble')")
    server.signal(signal.SIGHUP)
    server.wait_for("Reload failed, generation 2 cannot start")
    os.kill(victim.pid, signal.SIGKILL)
    server.wait_for("starts from the files as they are now, from which generation 2 could not start", count=3)
    server.wait_for("its own trouble", count=4)
    assert server.get("/").text == f"one {other.pid}"
    code.says("two")
    eventually(lambda: [each.slot for each in server.workers] == [0, 1], "both slots have a worker")
    assert {server.get("/").text.split()[0] for _ in range(20)} == {"one", "two"}


def test_surge_at_a_time(serve: Serve, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    server = serve("--reload-surge", "2", app="tests.helpers.apps.gated:app", workers=3, env={"GATE_FILE": str(gate)})
    gate.touch()
    server.signal(signal.SIGHUP)
    server.wait_for("waits at the gate", count=2)
    assert len(proc.children(server.pid)) == 5
    gate.unlink()
    reloaded(server, 4, 3)
    # The third could start only after one of the two.
    assert len(server.found("waits at the gate")) == 2


def test_a_reload_during_a_reload(serve: Serve) -> None:
    server = serve(app=FULL, workers=2)
    with under_load(server.address, clients=2) as load:
        server.signal(signal.SIGHUP)
        server.wait_for("Reloading: generation 2")
        server.signal(signal.SIGHUP)
        server.wait_for("Reloading: generation 3")
        server.wait_for(r"Worker \d+ \(.*listening", count=4)
        load.answered(10)
        eventually(lambda: len(proc.children(server.pid)) == 2, "two workers are left")
    ids = [worker.id for worker in server.workers]
    assert len(ids) == 2
    assert min(ids) >= 3
    assert not server.found("cannot start")


def test_from_a_program(code: Code) -> None:
    path = str(code.path.parent)
    with (
        Cluster("reloaded:app", app_dir=path, bind="127.0.0.1:0", workers=2, timeout_keep_alive=KEPT) as cluster,
        Client(Address.parse(cluster.url)) as client,
    ):
        assert client.ask("GET", "/").text.startswith("one ")
        code.says("two")
        cluster.reload()
        assert list(cluster.workers) == [3, 4]
        assert client.ask("GET", "/").text.startswith("two ")
        code.is_("raise RuntimeError('its own trouble')")
        with pytest.raises(BootError) as raised:
            cluster.reload()
        assert "its own trouble" in str(raised.value)
        assert list(cluster.workers) == [3, 4]
        assert client.ask("GET", "/").text.startswith("two ")
        code.says("three")
        cluster.reload()
        assert client.ask("GET", "/").text.startswith("three ")


def test_a_reload_in_the_midst_of_stopping_ends(serve: Serve) -> None:
    server = serve(workers=2)
    server.signal(signal.SIGHUP)
    server.wait_for("Reloading")
    server.terminate()
    assert server.wait() == 0


def test_who_waits_for_a_reload_hears_of_a_stop(code: Code) -> None:
    """The replacement never comes to listen, and the cluster is stopped meanwhile."""
    cluster = Cluster("reloaded:app", app_dir=str(code.path.parent), bind="127.0.0.1:0", workers=1)
    heard: list[Exception] = []

    def reload() -> None:
        try:
            cluster.reload()
        except ClusterError as exc:
            heard.append(exc)

    with cluster:
        code.is_("import threading; threading.Event().wait()")
        thread = threading.Thread(target=reload)
        thread.start()
        eventually(lambda: len(cluster.workers) == 2, "a replacement boots")
        cluster.stop(quick=True)
    thread.join()
    assert [str(exc) for exc in heard] in (["the cluster has stopped"], ["the cluster does not run"])
