"""More workers, fewer workers: TTIN, TTOU and `Cluster.scale`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from clusterserve import BootError, Cluster, ClusterError, SettingsError
from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.raw import Address, Client
from tests.helpers.server import KEPT, Serve, Server
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"


def slots(server: Server) -> list[int]:
    return [worker.slot for worker in server.workers]


def settles(server: Server, count: int) -> None:
    eventually(
        lambda: slots(server) == list(range(count)) and len(proc.children(server.pid)) == count, f"{count} workers"
    )


@pytest.mark.parametrize("dispatch", ["connection", "request"])
def test_under_load(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, app=FULL, workers=2)
    before = len(proc.socket_inodes(server.pid))
    with under_load(server.address) as load:
        for number, count in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2), (signal.SIGTTOU, 1), (signal.SIGTTIN, 2)):
            server.signal(number)
            settles(server, count)
            load.answered(10)
    eventually(lambda: len(proc.socket_inodes(server.pid)) == before, "the master has let go of every client")


def test_there_is_always_one(serve: Serve) -> None:
    server = serve(workers=1)
    (worker,) = server.workers
    with server.connect() as client:
        for _ in range(3):
            server.signal(signal.SIGTTOU)
            assert client.ask("GET", "/whoami").json()["pid"] == worker.pid
    assert server.workers == [worker]
    assert not server.found("Scaling")


def test_the_highest_slot_goes_and_is_filled_again(serve: Serve) -> None:
    server = serve(workers=2)
    with server.connect() as client:
        server.signal(signal.SIGTTOU)
        settles(server, 1)
        assert client.ask("GET", "/whoami").json()["slot"] == 0
    server.signal(signal.SIGTTIN)
    settles(server, 2)
    assert [(worker.id, worker.slot) for worker in server.workers] == [(1, 0), (3, 1)]


BROKEN_IN_SLOT_1 = """
import os
async def app(scope, receive, send):
    raise NotImplementedError
if os.environ["CLUSTERSERVE_WORKER_SLOT"] == "1" and not os.path.exists(__file__ + ".repaired"):
    raise RuntimeError("slot 1 is not for me")
"""


def test_who_waits_for_a_worker_that_cannot_start_hears_of_it(tmp_path: Path) -> None:
    (tmp_path / "broken_in_slot_1.py").write_text(BROKEN_IN_SLOT_1)
    with Cluster(
        "broken_in_slot_1:app", app_dir=str(tmp_path), bind="127.0.0.1:0", workers=1, restart_backoff=0.01
    ) as cluster:
        with pytest.raises(BootError) as raised:
            cluster.scale(2)
        assert "slot 1" in str(raised.value)
        assert "the cluster goes on trying" in str(raised.value)
        assert "slot 1 is not for me" in raised.value.traceback
        assert cluster.workers[1].state == "listening"
        # As many as it was told it wants still.
        (tmp_path / "broken_in_slot_1.py.repaired").touch()
        cluster.scale(2)
        assert [worker.slot for worker in cluster.workers.values()] == [0, 1]


def test_a_signal_that_asks_for_what_cannot_start_is_told_once(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "broken_in_slot_1.py").write_text(BROKEN_IN_SLOT_1)
    server = serve(
        *("--app-dir", str(tmp_path), "--restart-backoff", "0.01", "--restart-backoff-max", "0.05"),
        app="broken_in_slot_1:app",
        noise=True,
    )
    server.signal(signal.SIGTTIN)
    server.wait_for("RuntimeError: slot 1 is not for me", count=4)
    assert len(server.found("Not done yet: workers die again and again before they are of use, in slot 1")) == 1
    server.signal(signal.SIGTTOU)
    settles(server, 1)


def test_a_reload_keeps_the_new_number(serve: Serve) -> None:
    server = serve(workers=1)
    server.signal(signal.SIGTTIN)
    settles(server, 2)
    server.signal(signal.SIGHUP)
    eventually(lambda: [worker.id for worker in server.workers] == [3, 4], "two new ones")


def test_from_a_program() -> None:
    with (
        Cluster("examples.asgi_app:app", bind="127.0.0.1:0", workers=1, timeout_keep_alive=KEPT) as cluster,
        Client(Address.parse(cluster.url)) as client,
    ):
        assert client.ask("GET", "/").status == 200
        cluster.scale(3)
        assert [worker.slot for worker in cluster.workers.values()] == [0, 1, 2]
        cluster.scale(3)
        cluster.scale(1)
        assert list(cluster.workers) == [1]
        assert client.ask("GET", "/").status == 200
        for nonsense in (0, -1):
            with pytest.raises(SettingsError, match="at least 1 worker"):
                cluster.scale(nonsense)
    with pytest.raises(ClusterError, match="does not run"):
        cluster.scale(2)
    with pytest.raises(ClusterError, match="does not run"):
        cluster.reload()
