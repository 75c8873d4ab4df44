"""`--limit-request-*` and `--timeout-request-body`: acted upon as the bytes arrive, and the worker goes on unharmed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.raw import Client, request
from tests.helpers.server import Server, serving

FULL = "tests.helpers.apps.full:app"
PAUSE = "1"
MODES = [
    ("--http", "h11", "--dispatch", "auto"),
    ("--http", "httptools", "--dispatch", "request"),
    ("--http", "httptools", "--dispatch", "connection"),
    ("--http", "httptools", "--policy", "none", "--loop", "asyncio"),
    ("--http", "h11", "--policy", "none", "--loop", "asyncio"),
]


@pytest.fixture(scope="module", params=MODES, ids=lambda mode: "-".join(mode[1::2]))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving() as serve:
        yield serve(*request.param, "--timeout-request-body", PAUSE, app=FULL, workers=1)


def target(line: int) -> str:
    """One whose request's line is so long."""
    return "/".ljust(line - len("GET  HTTP/1.1"), "x")


def goes_on(server: Server, client: Client, status: int) -> None:
    """The client is told and the connection ends; the worker serves others."""
    response = client.response()
    assert response.status == status
    assert response.headers["connection"] == "close"
    assert client.rest() == b""
    assert server.get("/").status == 200
    assert len(server.announced) == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("GET", target(4094)), 404),
        (request("GET", target(4095)), 414),
        (request("GET", "/", *("A: b" for _ in range(99))), 200),
        (request("GET", "/", *("A: b" for _ in range(100))), 431),
        (request("GET", "/", "A: ".ljust(8188, "b")), 200),
        (request("GET", "/", "A: ".ljust(8189, "b")), 431),
        # Not at their end: what comes is too much whatever follows.
        (b"GET /" + b"x" * 5000, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 9000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 102, 431),
    ],
    ids=["line", "line+1", "fields", "fields+1", "field", "field+1", "open line", "open field", "open fields"],
)
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_limits_are_gunicorns(server: Server, sent: bytes, status: int, pieces: int) -> None:
    with server.connect() as client:
        # Not the first request on its connection.
        assert client.ask("GET", "/").status == 200
        size = -(-len(sent) // pieces)
        for start in range(0, len(sent), size):
            client.send(sent[start : start + size])
            if start + size < len(sent):
                # All of it is read before more comes.
                assert server.get("/").status == 200
        if status < 400 or status == 404:
            assert client.response().status == status
        else:
            goes_on(server, client, status)


def test_large_bodies_are_no_heads(server: Server) -> None:
    with server.connect() as client:
        for body in (b"x" * 300_000, b"\n" * 300_000):
            assert client.ask("POST", "/", body=body).status == 405


def test_a_body_that_pauses_is_answered_408(server: Server) -> None:
    with server.connect() as client:
        # A handler that reads no body does not hold it up either.
        client.send(request("GET", "/sleep?ms=3000", "Content-Length: 10", body=b"half"))
        goes_on(server, client, 408)
        server.wait_for("WARNING: +The body of a request has paused for too long, answered 408")


def test_when_the_response_has_begun_it_ends(server: Server) -> None:
    with server.connect() as client:
        client.send(request("POST", "/echo", "Content-Length: 10", body=b"half"))
        # Read, sent back, and told that there is no more.
        assert client.head().status == 200
        assert client.rest() == b"half"
    assert server.get("/").status == 200
