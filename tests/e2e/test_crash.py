"""Workers that die: they are replaced, their siblings serve, and what was not yet read is served by somebody else."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.helpers import proc
from tests.helpers.raw import request
from tests.helpers.server import IN_TURN, KEEP, WORKER_LISTENS, Serve, Server, Worker
from tests.helpers.waiting import DEADLINE, eventually

QUICK = ("--restart-backoff", "0.01")


def crash(server: Server, code: int = 1) -> Worker:
    """Let whoever is next end itself; the worker that did."""
    with server.connect() as client:
        before = server.workers
        client.send(request("GET", f"/crash?code={code}"))
        # What the client gets is the master's 502, or an end: never silence.
        try:
            answer = client.rest()
        except ConnectionResetError:
            answer = b""
        assert answer[:12] in (b"", b"HTTP/1.1 502")
    gone = eventually(lambda: [each for each in before if not proc.alive(each.pid)], "one worker is gone")
    assert len(gone) == 1
    return gone[0]


def no_zombies(server: Server) -> None:
    eventually(
        lambda: all(proc.state(pid) != "Z" for pid in proc.children(server.pid)), "dead workers have been waited for"
    )


def test_a_crash_is_told_and_repaired(serve: Serve) -> None:
    server = serve(*QUICK, *IN_TURN, workers=2)
    victim = crash(server, code=42)
    # One line that says which worker and how it ended.
    lines = server.wait_for(rf"(?i)Worker {victim.id} \(slot {victim.slot}, pid {victim.pid}\).*\b42\b")
    survivor = next(each for each in (1, 2) if each != victim.id)
    server.wait_for(WORKER_LISTENS, count=3)
    assert len(lines) == 1
    successor = server.announced[2]
    assert (successor.id, successor.slot) == (3, victim.slot)
    assert successor.pid != victim.pid
    server.warm()
    ids = [server.ask_id() for _ in range(10)]
    assert sorted(ids[:2]) == sorted([survivor, 3])
    assert ids == ids[:2] * 5
    no_zombies(server)


def test_an_exit_code_means_nothing_special_and_ids_are_never_used_again(serve: Serve) -> None:
    server = serve(*QUICK, "--restart-backoff-max", "0.01", workers=1)
    for number, code in enumerate((0, 3, 4), 1):
        server.wait_for(WORKER_LISTENS, count=number)
        assert server.ask_id() == number
        crash(server, code)
    server.wait_for(WORKER_LISTENS, count=4)
    os.kill(server.announced[-1].pid, signal.SIGKILL)
    server.wait_for(WORKER_LISTENS, count=5)
    assert [each.id for each in server.announced] == [1, 2, 3, 4, 5]
    assert {each.slot for each in server.announced} == {0}
    no_zombies(server)


def test_siblings_serve_meanwhile(serve: Serve) -> None:
    server = serve("--restart-backoff", "60", "--restart-backoff-max", "60", *IN_TURN, workers=3).warm()
    victim = crash(server)
    others = {1, 2, 3} - {victim.id}
    ids = [server.ask_id() for _ in range(20)]
    assert set(ids) == others
    assert ids == ids[:2] * 10


def test_kill_9_is_told_and_kept_connections_of_siblings_do_not_notice(serve: Serve) -> None:
    server = serve(*QUICK, *KEEP, *IN_TURN, workers=2).warm()
    with server.connect() as one, server.connect() as other:
        owners = [client.ask("GET", "/whoami").json()["id"] for client in (one, other)]
        assert sorted(owners) == [1, 2]
        victim = next(each for each in server.workers if each.id == owners[0])
        os.kill(victim.pid, signal.SIGKILL)
        lines = server.wait_for(rf"(?i)Worker {victim.id} \(slot {victim.slot}, pid {victim.pid}\).*(KILL|\b9\b)")
        server.wait_for(WORKER_LISTENS, count=3)
        assert len(lines) == 1
        assert server.announced[2].slot == victim.slot
        assert other.ask("GET", "/whoami").json()["id"] == owners[1]


def test_requests_that_a_dead_worker_had_not_read_are_served(serve: Serve) -> None:
    server = serve(*QUICK, workers=2)
    with server.stopped_workers() as workers:
        clients = [server.connect() for _ in range(20)]
        for client in clients:
            client.send(request("GET", "/whoami", "Connection: close"))
        # Those that were offered to it are read by nobody before it dies.
        os.kill(workers[0].pid, signal.SIGKILL)
    try:
        answers = [client.response() for client in clients]
    finally:
        for client in clients:
            client.close()
    assert [answer.status for answer in answers] == [200] * 20
    assert workers[0].id not in {answer.json()["id"] for answer in answers}


def test_what_the_only_worker_had_begun_ends_and_who_comes_then_is_served_by_its_successor(serve: Serve) -> None:
    """An answer that is half done is cut, and not completed by somebody else; a WebSocket ends."""
    server = serve(*QUICK, workers=1)
    with server.connect() as client, connect(server.url.replace("http://", "ws://") + "/ws") as websocket:
        client.send(request("POST", "/echo", "Content-Length: 8") + b"half")
        assert client.head().status == 200
        assert client.read(4) == b"half"
        websocket.send("hello")
        assert websocket.recv(DEADLINE) == "hello"
        os.kill(server.workers[0].pid, signal.SIGKILL)
        # Nobody lives.
        assert server.ask_id() == 2
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b""
        with pytest.raises(ConnectionClosed):
            websocket.recv(DEADLINE)


def test_all_workers_at_once(serve: Serve) -> None:
    server = serve(*QUICK, workers=2)
    for worker in server.workers:
        os.kill(worker.pid, signal.SIGKILL)
    server.wait_for(WORKER_LISTENS, count=4)
    server.warm()
    assert sorted(each.slot for each in server.workers) == [0, 1]


def test_under_none_too(serve: Serve) -> None:
    server = serve(*QUICK, "--policy", "none", workers=2)
    victim = server.workers[0]
    os.kill(victim.pid, signal.SIGKILL)
    server.wait_for(WORKER_LISTENS, count=3)
    assert (server.announced[2].id, server.announced[2].slot) == (3, victim.slot)
    assert {server.ask_id() for _ in range(10)} <= {2, 3}


def test_an_app_that_cannot_start_any_more_is_tried_for_ever_with_pauses(serve: Serve, tmp_path: Path) -> None:
    switch = tmp_path / "off"
    server = serve(
        "--restart-backoff",
        "0.1",
        "--restart-backoff-max",
        "0.4",
        app="tests.helpers.apps.switch:app",
        workers=2,
        env={"SWITCH_FILE": str(switch)},
        noise=True,
    )
    switch.touch()
    victim = server.workers[0]
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    # Loudly, and not as fast as it can: the pauses grow (0.1, 0.2, 0.4) up to the limit.
    server.wait_for("RuntimeError: switched off", count=4)
    assert time.monotonic() - began >= 0.1 + 0.2 + 0.4
    assert [server.get("/").status for _ in range(10)] == [200] * 10
    switch.unlink()
    server.wait_for(WORKER_LISTENS, count=3)
    assert server.announced[2].slot == victim.slot
    assert server.announced[2].id > 2
    assert [server.get("/").status for _ in range(10)] == [200] * 10


def test_stopping_while_a_replacement_waits_its_turn(serve: Serve) -> None:
    server = serve("--restart-backoff", "60", "--restart-backoff-max", "60", workers=2)
    crash(server)
    assert server.stop() == 0
    assert server.processes() == []
