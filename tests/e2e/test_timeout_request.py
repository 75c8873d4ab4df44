"""`--timeout-request`: a request that runs for too long is ended, in every mode; nothing else is."""

from __future__ import annotations

import os
import signal

import pytest

from tests.helpers.raw import request
from tests.helpers.server import KEEP, Serve
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"
TIMEOUT = "2"
ENDED = r"ERROR: +{} has been running for \d+\.\d s and is cancelled; {}"

MODES = pytest.mark.parametrize(
    "mode",
    [
        ("--dispatch", "auto", "--http", "h11"),
        ("--dispatch", "request"),
        ("--dispatch", "connection"),
        ("--policy", "none", "--loop", "asyncio"),
    ],
    ids=["auto", "request", "connection", "none"],
)


@MODES
def test_it_is_answered_504_and_a_response_that_has_begun_ends(serve: Serve, mode: tuple[str, ...]) -> None:
    server = serve(*mode, *KEEP, "--timeout-request", TIMEOUT, workers=1)
    with server.connect() as client, server.connect() as begun, server.connect() as other:
        assert other.ask("GET", "/").status == 200
        # Not the first on its connection, and with a body that never ends.
        assert client.ask("GET", "/").status == 200
        client.send(request("GET", "/sleep?ms=60000", "Content-Length: 10", body=b"half"))
        begun.send(request("GET", "/stream?ms=60000"))
        assert begun.head().status == 200
        assert client.response().status == 504
        assert client.rest() == b""
        server.wait_for(ENDED.format("GET /sleep", "its client is told so"))
        # All that was sent, and then the end, but not as of a response that is complete.
        rest = begun.rest()
        assert b"data: " in rest
        assert not rest.endswith(b"0\r\n\r\n")
        server.wait_for(ENDED.format("GET /stream", "the connection is closed"))
        # Who is idle is not too slow.
        assert other.ask("GET", "/").status == 200
    assert server.get("/").status == 200
    assert not server.found("Traceback|CancelledError")


def test_what_a_hung_worker_had_read_is_answered_504(serve: Serve) -> None:
    """A request that merely awaits shares its loop with one that holds it: both had read, neither answered."""
    server = serve("--timeout", "3", app=FULL, workers=1)
    with server.connect() as waits, server.connect() as holds, server.connect() as idle:
        assert idle.ask("GET", "/").status == 200
        waits.send(request("GET", "/sleep?ms=60000"))
        assert server.get("/").status == 200
        holds.send(request("GET", "/hold"))
        server.wait_for("Holding the event loop")
        assert waits.response().status == 504
        assert holds.response().status == 504
        assert waits.rest() == holds.rest() == b""


def test_what_a_killed_worker_had_read_is_answered_502(serve: Serve) -> None:
    server = serve("--timeout", "3", workers=1)
    with server.connect() as client:
        client.send(request("GET", "/sleep?ms=60000"))
        assert server.get("/").status == 200
        os.kill(server.workers[0].pid, signal.SIGKILL)
        assert client.response().status == 502
    eventually(lambda: server.workers, "it is replaced")
