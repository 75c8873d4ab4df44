"""`--dispatch connection`: a worker has a connection until it ends; what its death and its leaving mean for that."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.helpers import proc
from tests.helpers.raw import Client, fetch, request
from tests.helpers.server import KEEP, WORKER_LISTENS, Serve
from tests.helpers.waiting import DEADLINE, eventually

MODE = ("--dispatch", "connection", "--restart-backoff", "0.01")
HTTP = pytest.mark.parametrize(("http", "loop"), [("httptools", "uvloop"), ("h11", "asyncio")])


@HTTP
def test_a_worker_is_killed(serve: Serve, http: str, loop: str) -> None:
    """1. Of two used connections one is idle, one is asked something.  2. Their worker is killed.  Result: the idle one
    lives on with its successor, the other one is told, unless it had heard something already.  On TCP and on a unix
    socket."""
    binds = ["127.0.0.1:0", f"unix:@clusterserve-{os.getpid()}"]
    server = serve(*MODE, *KEEP, "--http", http, "--loop", loop, bind=binds, workers=1)
    with contextlib.ExitStack() as stack:
        clients = [[stack.enter_context(Client(address)) for _ in range(3)] for address in server.addresses]
        for idle, asked, hears in clients:
            for client in (idle, asked, hears):
                for _ in range(2):
                    assert client.ask("GET", "/whoami").json()["id"] == 1
            asked.send(request("GET", "/sleep?ms=60000"))
            hears.send(request("GET", "/stream?ms=60000"))
            assert hears.head().status == 200
            # One after the other: when the worker answers this, it has done with what came before.
            assert fetch(idle.address, "/").status == 200
        os.kill(server.workers[0].pid, signal.SIGKILL)
        for idle, asked, hears in clients:
            assert asked.response().status == 502
            assert asked.rest() == b""
            assert not hears.rest().endswith(b"0\r\n\r\n")
            assert idle.ask("GET", "/whoami").json()["id"] == 2


@HTTP
def test_a_request_that_drips(serve: Serve, http: str, loop: str) -> None:
    server = serve(*MODE, *KEEP, "--timeout-request-header", "1", "--http", http, "--loop", loop, workers=1)
    with server.connect() as first, server.connect() as later, server.connect() as idle, server.connect() as busy:
        for client in (later, idle, busy):
            assert client.ask("GET", "/").status == 200
        busy.send(request("GET", "/sleep?ms=3000"))
        begun = time.monotonic()
        for client in (first, later):
            client.send(b"GET / HTTP/1.1\r\nHo")
        for client in (first, later):
            assert client.response().status == 408
            assert client.rest() == b""
        assert time.monotonic() - begun >= 1.0, "ended early"
        server.wait_for("WARNING: +The head of a request took too long to come, answered 408", count=2)
        # Neither who is idle nor who waits for an answer is slow.
        assert idle.ask("GET", "/").status == 200
        assert busy.response().status == 200


@HTTP
def test_keep_alive_ends(serve: Serve, http: str, loop: str) -> None:
    server = serve(*MODE, "--timeout-keep-alive", "1", "--http", http, "--loop", loop, workers=1)
    with server.connect() as client:
        for _ in range(3):
            assert client.ask("GET", "/").status == 200
        assert client.rest() == b""
        port = client.port
    eventually(lambda: not proc.accepted_inodes(server.address.port, [port]), "the server has closed it, too")


@pytest.mark.parametrize("dispatch", ["auto", "connection", "request"])
def test_a_websocket_is_its_workers_alone(serve: Serve, dispatch: str) -> None:
    """The master keeps no copy of its descriptor; it ends with its worker."""
    server = serve("--dispatch", dispatch, *KEEP, "--restart-backoff", "0.01", workers=1)
    with server.connect() as client, connect(server.url.replace("http://", "ws://") + "/ws") as websocket:
        websocket.send("hello")
        assert websocket.recv(DEADLINE) == "hello"
        assert client.ask("GET", "/").status == 200
        port = websocket.socket.getsockname()[1]
        inode = proc.accepted_inodes(server.address.port, [port])[port]
        eventually(lambda: inode not in proc.socket_inodes(server.pid), "the master has closed its copy")
        assert inode in proc.socket_inodes(server.workers[0].pid)
        # One after the other: when the worker answers this, it has done with what came before.
        assert server.get("/").status == 200
        os.kill(server.workers[0].pid, signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            websocket.recv(DEADLINE)
        server.wait_for(WORKER_LISTENS, count=2)
        assert client.ask("GET", "/whoami").json()["id"] == 2


@HTTP
def test_a_large_answer_and_an_idle_time_after_it(serve: Serve, http: str, loop: str) -> None:
    """What has become the loop's stays so, and goes back like all others when its worker leaves."""
    server = serve(*MODE, *KEEP, "--http", http, "--loop", loop, app="tests.helpers.apps.full:app", workers=1)
    with server.connect(receive_buffer=4096) as client:
        for _ in range(2):
            assert len(client.ask("GET", "/bytes?n=3000000").body) == 3000000
        server.signal(signal.SIGHUP)
        eventually(lambda: [worker.id for worker in server.workers] == [2], "the first has left")
        assert client.ask("GET", "/whoami").json()["id"] == 2
