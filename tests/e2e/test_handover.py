"""That connections really are handed over: learned from the kernel, not from what the server says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.raw import Client, request
from tests.helpers.server import IN_TURN, Serve, Server, serving
from tests.helpers.waiting import eventually


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as serve:
        yield serve(workers=2).warm()


# ── who holds the listening socket ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["rr", "least", "hash"])
def test_no_worker_holds_a_listening_socket(serve: Serve, tmp_path: Path, policy: str) -> None:
    server = serve("--policy", policy, workers=2, bind=["127.0.0.1:0", f"unix:{tmp_path / 's'}"])
    assert server.get("/").status == 200
    tcp = proc.listening_inodes(server.address.port)
    unix = proc.unix_inodes(str(tmp_path / "s"))
    assert len(tcp) == 1
    assert len(unix) == 1
    assert tcp | unix <= proc.socket_inodes(server.pid)
    assert len(server.workers) == 2
    for worker in server.workers:
        held = proc.socket_inodes(worker.pid)
        assert not held & (tcp | unix)
        assert not held & proc.all_listening_inodes()


def test_under_none_all_hold_the_same_listening_socket(serve: Serve, tmp_path: Path) -> None:
    server = serve("--policy", "none", workers=2, bind=["127.0.0.1:0", f"unix:{tmp_path / 's'}"])
    tcp = proc.listening_inodes(server.address.port)
    unix = proc.unix_inodes(str(tmp_path / "s"))
    assert len(tcp) == 1
    assert len(unix) == 1
    assert len(server.workers) == 2
    for pid in (server.pid, *(worker.pid for worker in server.workers)):
        assert tcp | unix <= proc.socket_inodes(pid)


# ── while no worker can run ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_written_while_the_workers_stand_still_is_answered(server: Server) -> None:
    with server.stopped_workers():
        client = server.connect()
        client.send(request("GET", "/whoami"))
        eventually(lambda: server.accepted_by_master(client), "the master has accepted the connection")
        assert not client.has_something()
    with client:
        assert client.response().json()["id"] in (1, 2)


def test_a_hundred_of_them_are_answered_each_once(server: Server) -> None:
    clients = []
    try:
        with server.stopped_workers():
            for number in range(100):
                client = server.connect()
                clients.append(client)
                client.send(request("POST", "/echo", "Connection: close", body=b"from %d" % number))
            assert not any(client.has_something() for client in clients)
        for number, client in enumerate(clients):
            response = client.response()
            assert (response.status, response.body) == (200, b"from %d" % number)
            assert client.rest() == b""
    finally:
        for client in clients:
            client.close()


def test_clients_that_reset_while_they_wait_harm_nothing(server: Server) -> None:
    before, pids = server.sockets(), [worker.pid for worker in server.workers]
    with server.stopped_workers():
        patient = server.connect()
        for number in range(30):
            client = server.connect()
            client.send(request("GET", "/"))
            if number % 2:
                eventually(lambda client=client: server.accepted_by_master(client), "accepted")  # type: ignore[misc]
            client.reset()
        patient.send(request("GET", "/"))
    with patient:
        assert patient.response().status == 200
    assert [server.get("/").status for _ in range(10)] == [200] * 10
    assert [worker.pid for worker in server.workers] == pids
    eventually(lambda: server.sockets() <= before, "no socket of a client that left is kept")


def test_clients_that_close_in_order_while_they_wait_harm_nothing(server: Server) -> None:
    before = server.sockets()
    with server.stopped_workers():
        for said in (b"", b"GET / HT", request("GET", "/")) * 5:
            with server.connect() as client:
                client.send(said)
    assert [server.get("/").status for _ in range(10)] == [200] * 10
    eventually(lambda: server.sockets() <= before, "no socket of a client that left is kept")


def test_a_worker_that_stands_still_is_passed_over(server: Server) -> None:
    with server.stopped_workers() as [stuck, free]:
        os.kill(free.pid, signal.SIGCONT)
        assert [server.ask_id() for _ in range(20)] == [free.id] * 20
        assert proc.state(stuck.pid) == "T"
    eventually(lambda: stuck.id in {server.ask_id(), server.ask_id()}, "the other one gets its turns again")


def test_a_worker_that_is_busy_is_passed_over(serve: Serve) -> None:
    server = serve("--timeout-graceful-shutdown", "0.2", workers=2)
    with server.connect() as busy:
        busy.send(request("GET", "/block?ms=60000"))
        # One of them takes that request and can take nothing more: the other answers all that come, at once.
        ids = {server.ask_id() for _ in range(20)}
        assert len(ids) == 1


def test_idle_connections_do_not_take_turns(serve: Serve) -> None:
    server = serve(*IN_TURN, workers=2)

    def in_turn() -> bool:
        silent: list[Client] = []
        ids = []
        try:
            for _ in range(10):
                # One before each: if they took turns, all the others would go to the same worker.
                silent.append(server.connect())
                ids.append(server.ask_id())
        finally:
            for client in silent:
                client.reset()
        return ids == [1, 2] * 5 or ids == [2, 1] * 5

    # The kernel keeps a silent client for about a second, and a busy machine may need longer for all of them.
    eventually(in_turn, "those that speak take turns")


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_above_max_pending_clients_wait_in_the_backlog(serve: Serve) -> None:
    server = serve("--max-pending", "5", workers=2)
    clients: list[Client] = []
    try:
        with server.stopped_workers():
            for _ in range(60):
                client = server.connect()
                client.send(request("GET", "/", "Connection: close"))
                clients.append(client)
            eventually(lambda: server.accepted_by_master(clients[0]), "the first one is accepted")
        for client in clients:
            assert client.response().status == 200
    finally:
        for client in clients:
            client.close()


def test_more_clients_than_descriptors_are_all_served(serve: Serve) -> None:
    server = serve(workers=2, open_files=64)
    clients: list[Client] = []
    try:
        for number in range(200):
            client = server.connect()
            clients.append(client)
            client.send(request("POST", "/echo", body=b"from %d" % number))
        # None of them asks for an end: there is room for the next ones only when somebody leaves.
        for number, client in enumerate(clients):
            assert client.response().body == b"from %d" % number
            client.close()
    finally:
        for client in clients:
            client.close()
    assert [server.get("/").status for _ in range(4)] == [200] * 4


# ── what an application's own children get ──────────────────────────────────────────────────────────────────────────


def test_no_descriptor_reaches_what_an_app_starts(server: Server) -> None:
    worker = server.workers[0]
    inheritable = [
        number
        for number in proc.descriptors(worker.pid)
        if number > 2 and not int(descriptor_flags(worker.pid, number), 8) & os.O_CLOEXEC
    ]
    assert inheritable == []


def descriptor_flags(pid: int, number: int) -> str:
    lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("flags:"))
