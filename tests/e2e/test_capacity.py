"""`--worker-connections`, `--max-restarts`, `--on-worker-exit-code`, `--reuse-port`."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests.helpers.raw import request
from tests.helpers.server import Serve, Server, run
from tests.helpers.waiting import eventually


@pytest.mark.parametrize("dispatch", ["auto", "connection"])
def test_what_is_above_a_workers_connections_waits_in_the_master(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, "--worker-connections", "2", "--timeout-queue", "1", workers=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(4)]
        for client in clients:
            client.send(request("GET", "/stream?ms=600000"))
            assert client.head().status == 200
        # Nobody takes it for as long as it may wait.
        assert server.get("/").status == 503
        server.wait_for('"GET / HTTP/1.1" 503 Service Unavailable')
        with server.connect() as waits:
            waits.send(request("GET", "/"))
            clients[0].close()
            assert waits.response().status == 200


def test_under_policy_none_it_is_refused() -> None:
    ended = run("examples.asgi_app:app", "--policy", "none", "--worker-connections", "2")
    assert ended.code == 2
    assert "under 'none' the workers accept by themselves" in ended.text


def ends(server: Server, code: int) -> None:
    """A worker exits with this code."""
    with server.connect() as client:
        client.send(request("GET", f"/crash?code={code}"))
        client.rest()


def test_an_exit_code_may_mean_no_restart(serve: Serve) -> None:
    server = serve("--on-worker-exit-code", "7,9", workers=2, ready=True)
    ends(server, 8)
    eventually(lambda: len(server.announced) == 3, "another code is as good as any")
    ends(server, 7)
    server.wait_for(r"Slot \d stays empty: exit code 7 means no restart")
    assert server.get("/").status == 200
    assert len(server.workers) == 1
    ends(server, 9)
    assert server.wait() == 1
    assert server.found("every worker has ended for good, the last one with this: worker . exited with code 9")
    assert len(server.announced) == 3


def test_restarts_in_vain_are_told_once(serve: Serve) -> None:
    options = (
        "--max-restarts",
        "1",
        "--min-uptime",
        "1000",
        "--restart-backoff",
        "0.01",
        "--restart-backoff-max",
        "0.05",
    )
    server = serve(*options, workers=1)
    for number in range(1, 5):
        eventually(lambda number=number: len(server.announced) == number, "it is restarted")  # type: ignore[misc]
        ends(server, 8)
    eventually(lambda: len(server.announced) == 5, "it is restarted all the same")
    (line,) = server.found("CRITICAL: +Slot 0: more than 1 restarts in a row were in vain; it is tried every 0.05 s")
    assert line


def test_two_clusters_on_one_port(serve: Serve) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        first = serve("--reuse-port", bind=bind)
        second = serve("--reuse-port", bind=bind)
    pids = {server.workers[0].pid for server in (first, second)}
    # The kernel chooses one for each connection.
    eventually(lambda: {first.get("/whoami").json()["pid"] for _ in range(8)} == pids, "both are asked")
