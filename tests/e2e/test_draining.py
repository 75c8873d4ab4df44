"""A worker leaves: what its clients, its application and its log learn of it, whatever the reason."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.helpers import proc
from tests.helpers.raw import request
from tests.helpers.server import Serve, Server, Worker
from tests.helpers.waiting import DEADLINE, eventually

FULL = "tests.helpers.apps.full:app"
DRAINS = "tests.helpers.apps.drains:app"
#: Far below the graceful limit of 30 s.
SOON = 20.0


def _terminate_worker(server: Server) -> None:
    os.kill(server.workers[-1].pid, signal.SIGTERM)


#: Each makes the worker of the highest slot leave; in this order one server can meet them all.
REASONS: dict[str, Callable[[Server], None]] = {
    "worker": _terminate_worker,
    "reload": lambda server: server.signal(signal.SIGHUP),
    "scale": lambda server: server.signal(signal.SIGTTOU),
    "stop": Server.terminate,
}


@contextlib.contextmanager
def websocket_of(server: Server, worker: Worker) -> Iterator[ClientConnection]:
    """A WebSocket that is served by this worker, as the kernel says: it has a copy of the connection."""
    while True:
        with connect(server.url.replace("http://", "ws://") + "/ws") as websocket:
            port = websocket.socket.getsockname()[1]
            if proc.accepted_inodes(server.address.port, [port])[port] in proc.socket_inodes(worker.pid):
                yield websocket
                return


def settled(server: Server, *ids: int) -> None:
    """These workers serve, and nobody else."""
    eventually(lambda: [worker.id for worker in server.workers] == list(ids), f"workers {ids} are left")


@pytest.mark.parametrize(
    ("ws", "loop"), [("websockets-sansio", "uvloop"), ("websockets", "asyncio"), ("wsproto", "uvloop")]
)
def test_websockets_get_1012(serve: Serve, ws: str, loop: str) -> None:
    # The legacy implementation warns that it is one.
    server = serve("--ws", ws, "--loop", loop, workers=2, noise=ws == "websockets")
    # Who serves after each.
    left = {"worker": (1, 3), "reload": (4, 5), "scale": (4,), "stop": ()}
    for reason, leave in REASONS.items():
        leaves = server.warm().workers[-1]
        with websocket_of(server, leaves) as websocket:
            websocket.send("hello")
            assert websocket.recv(DEADLINE) == "hello", reason
            leave(server)
            with pytest.raises(ConnectionClosed) as caught:
                websocket.recv(DEADLINE)
            assert caught.value.rcvd is not None, reason
            assert caught.value.rcvd.code == 1012, reason
        settled(server, *left[reason])


@pytest.mark.parametrize(("http", "loop"), [("httptools", "uvloop"), ("h11", "asyncio")])
def test_the_application_is_told(serve: Serve, http: str, loop: str) -> None:
    server = serve("--http", http, "--loop", loop, "--lifespan", "on", app=DRAINS, workers=1)
    told = 0
    for reason, leave in REASONS.items():
        with server.connect() as client, connect(server.url.replace("http://", "ws://")) as websocket:
            assert websocket.recv(DEADLINE) == "waiting", reason
            client.send(request("GET", "/"))
            assert client.head().status == 200, reason
            assert client.chunk() == b"waiting ", reason
            if reason == "scale":
                # There is always one worker: the second one leaves, and the first must not be told.
                server.signal(signal.SIGTTIN)
                server.wait_for(r"Worker 4 .*listening")
                leave(server)
                settled(server, 3)
                assert len(server.found("The WebSocket was told")) == told
                continue
            leave(server)
            assert client.chunk() == b"told", reason
            told += 1
            server.wait_for("The WebSocket was told", count=told)
        settled(server, *{"worker": (2,), "reload": (3,), "stop": ()}[reason])
    assert not server.found("ERROR")


def test_an_event_stream_ends_itself(serve: Serve) -> None:
    server = serve(workers=2)
    with server.connect() as client:
        client.send(request("GET", "/stream?ms=60000"))
        assert client.head().status == 200
        assert b"data: " in client.chunk()
        began = time.monotonic()
        server.terminate()
        # The last chunk, as it should be, and then the end.
        assert client.rest() == b"0\r\n\r\n"
        assert server.wait(SOON) == 0
        assert time.monotonic() - began < SOON
    assert not server.found("cut off")


@pytest.mark.parametrize(
    ("http", "ws"), [("httptools", "websockets-sansio"), ("h11", "wsproto"), ("httptools", "websockets")]
)
def test_what_outlives_the_grace_time_is_named(serve: Serve, http: str, ws: str) -> None:
    # The legacy implementation warns that it is one.
    server = serve("--timeout-graceful-shutdown", "2", "--http", http, "--ws", ws, app=FULL, workers=1, noise=True)
    with (
        server.connect() as stream,
        server.connect() as sleep,
        connect(server.url.replace("http://", "ws://") + "/deaf"),
    ):
        stream.send(request("GET", "/obstinate"))
        assert stream.head().status == 200
        sleep.send(request("GET", "/sleep?ms=60000"))
        # The same worker answers this one, so the one before has begun.
        assert server.get("/").status == 200
        server.terminate()
        assert server.wait(SOON) == 0
    for what in ("GET /obstinate", "GET /sleep", "WebSocket /deaf"):
        assert len(server.found(rf"ERROR: +{what} is cut off: it has been running for \d+ s")) == 1
    assert not server.found("Traceback|CancelledError")


def test_its_age_counts_from_its_beginning(serve: Serve) -> None:
    server = serve("--timeout-graceful-shutdown", "1", app=FULL, workers=1)
    with server.connect() as stream:
        stream.send(request("GET", "/obstinate"))
        assert stream.head().status == 200
        ticks = b""
        # One every 10 ms or more: longer than the grace time before it even begins.
        while ticks.count(b"tick") < 200:
            ticks += stream.chunk()
        server.terminate()
        assert server.wait(SOON) == 0
    (found,) = server.found(r"/obstinate is cut off: it has been running for (\d+) s")
    assert int(found[1]) >= 2


@pytest.mark.parametrize("ws", ["websockets-sansio", "websockets", "wsproto"])
def test_a_quick_stop_says_nothing_of_what_it_cuts(serve: Serve, ws: str) -> None:
    server = serve("--ws", ws, app=FULL, workers=1, noise=True)
    with (
        server.connect() as stream,
        server.connect() as sleep,
        connect(server.url.replace("http://", "ws://") + "/ws") as websocket,
    ):
        websocket.send("hello")
        assert websocket.recv(DEADLINE) == "hello"
        stream.send(request("GET", "/obstinate"))
        assert stream.head().status == 200
        sleep.send(request("GET", "/sleep?ms=60000"))
        assert server.get("/").status == 200
        server.signal(signal.SIGQUIT)
        assert server.wait(SOON) == 131
    assert not server.found("Traceback|ERROR|CancelledError")
