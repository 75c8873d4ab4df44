"""`--limit-concurrency`: exact over all workers, in every mode; uvicorn's text above it."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from tests.helpers.raw import Client, Response, request
from tests.helpers.server import Serve, Server
from tests.helpers.waiting import eventually

LIMIT = 3

MODES = pytest.mark.parametrize(
    "mode",
    [
        ("--dispatch", "auto", "--http", "h11", "--ws", "wsproto"),
        ("--dispatch", "request", "--ws", "websockets"),
        ("--dispatch", "connection", "--ws", "websockets-sansio"),
        ("--policy", "none", "--loop", "asyncio"),
    ],
    ids=["auto", "request", "connection", "none"],
)

UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


def begun(client: Client, target: str, *headers: str) -> int:
    """Its status; what it began goes on."""
    client.send(request("GET", target, *headers))
    return client.head().status


def full(server: Server) -> Response | None:
    """What is said to one too many, if this is one."""
    response = server.get("/")
    return response if response.status == 503 else None


@MODES
def test_never_more_and_not_less(serve: Serve, mode: tuple[str, ...]) -> None:
    # uvicorn's deprecation of one of its WebSocket implementations is no fault of ours.
    server = serve(*mode, "--limit-concurrency", str(LIMIT), workers=2, noise=True)
    with contextlib.ExitStack() as stack:
        stream, other, upgraded, another = (stack.enter_context(server.connect()) for _ in range(4))
        assert begun(stream, "/stream?ms=60000") == 200
        assert begun(upgraded, "/ws", *UPGRADE) == 101
        # The last place.
        assert server.get("/").status == 200
        assert begun(other, "/stream?ms=60000") == 200
        for _ in range(4):
            response = server.get("/")
            assert (response.status, response.text) == (503, "Service Unavailable")
            assert response.headers["connection"] == "close"
        another.send(request("GET", "/ws", *UPGRADE))
        assert another.response().status == 503
        server.wait_for(r"WARNING: +Exceeded concurrency limit\.", count=5)
        # A WebSocket that ends makes room, as a request does.
        upgraded.close()
        eventually(lambda: not full(server), "there is room again")
        with server.connect() as third:
            assert begun(third, "/stream?ms=60000") == 200
            assert full(server)
        eventually(lambda: not full(server), "there is room again")
    assert not server.found("Traceback")


def test_what_a_killed_worker_had_in_progress_counts_no_more(serve: Serve) -> None:
    server = serve("--limit-concurrency", "2", "--restart-backoff", "0.1", workers=2).warm()
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            assert begun(stack.enter_context(server.connect()), "/stream?ms=60000") == 200
        assert full(server)
        for worker in server.workers:
            os.kill(worker.pid, signal.SIGKILL)
        server.wait_for("was killed by SIGKILL", count=2)
        eventually(lambda: len(server.workers) == 2, "both are replaced")
        with server.connect() as first, server.connect() as second:
            assert begun(first, "/stream?ms=60000") == 200
            assert begun(second, "/stream?ms=60000") == 200
            assert full(server)


def test_a_replacement_and_whom_it_replaces_count_together(serve: Serve) -> None:
    server = serve("--limit-concurrency", "2", workers=1)
    (first,) = server.workers
    with server.connect() as old, server.connect() as new:
        old.send(request("GET", "/sleep?ms=600000"))
        server.signal(signal.SIGHUP)
        server.wait_for(r"Worker 2 \(slot 0, pid \d+\) is listening")
        assert begun(new, "/stream?ms=60000") == 200
        # The old one has read its request when it drains.
        eventually(lambda: full(server), "both are full together")
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: not full(server), "there is room again")
