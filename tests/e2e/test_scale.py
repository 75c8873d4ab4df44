"""More workers, fewer workers: TTIN, TTOU and `Cluster.scale`."""

from __future__ import annotations

import signal

import pytest

from clusterserve import Cluster, ClusterError, SettingsError
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
    before = len(proc.descriptors(server.pid))
    with under_load(server.address) as load:
        for number, count in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2), (signal.SIGTTOU, 1), (signal.SIGTTIN, 2)):
            server.signal(number)
            settles(server, count)
            load.answered(10)
    eventually(lambda: len(proc.descriptors(server.pid)) == before, "the master has let go of every client")


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
        assert [worker.slot for worker in cluster.workers] == [0, 1, 2]
        cluster.scale(3)
        cluster.scale(1)
        assert [worker.id for worker in cluster.workers] == [1]
        assert client.ask("GET", "/").status == 200
        for nonsense in (0, -1):
            with pytest.raises(SettingsError, match="at least 1 worker"):
                cluster.scale(nonsense)
    with pytest.raises(ClusterError, match="does not run"):
        cluster.scale(2)
    with pytest.raises(ClusterError, match="does not run"):
        cluster.reload()
