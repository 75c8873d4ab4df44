"""WSGI with Flask: what it can do, one queue for the threads of all workers, and how it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers.raw import Client, request
from tests.helpers.server import KEEP, Serve, Server, run
from tests.helpers.waiting import eventually

APP = "tests.helpers.apps.flasky:app"


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def server(serve_module: Serve, gates: Path) -> Server:
    options = ("--threads", "4", *KEEP)
    return serve_module(*options, app=APP, workers=2, env={"GATES": str(gates)}, noise=True)


def reached(gates: Path, name: str) -> None:
    eventually((gates / f"{name}.reached").exists, f"a request waits at {name}")


def open_gate(gates: Path, name: str) -> None:
    (gates / name).touch()


# ── what it can do ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_flask_is_served_in_threads_of_every_worker(server: Server) -> None:
    eventually(lambda: {server.ask_id() for _ in range(4)} == {1, 2}, "both take turns")
    assert server.get("/whoami").json()["thread"].startswith("wsgi-")


def test_an_upload_however_it_is_framed(server: Server) -> None:
    lines = b"a line\n" * 50_000
    with server.connect() as client:
        assert client.ask("POST", "/upload", body=lines).json() == {"lines": 50_000, "encoding": None}
        client.send(request("POST", "/upload", "Transfer-Encoding: chunked", "Expect: 100-continue"))
        assert client.head().status == 100
        for part in (lines[:100], lines[100:300_000], lines[300_000:]):
            client.send(b"%x\r\n%b\r\n" % (len(part), part))
        client.send(b"0\r\n\r\n")
        assert client.response().json() == {"lines": 50_000, "encoding": "chunked"}
    files = {"file": ("f.txt", b"x" * 300_000)}
    answer = httpx.post(f"{server.url}/form", data={"name": "n"}, files=files, trust_env=False)
    assert answer.json() == {"name": "n", "file": "f.txt", "size": 300_000}


def test_a_response_is_sent_as_it_is_made(server: Server, gates: Path) -> None:
    with server.connect() as client:
        client.send(request("GET", "/stream/made"))
        assert client.head().headers["transfer-encoding"] == "chunked"
        assert client.chunk() == b"one\n"
        reached(gates, "made")
        open_gate(gates, "made")
        assert client.chunk() == b"two\n"
        assert client.chunk() == b""
        assert client.ask("GET", "/whoami").status == 200


def test_a_client_that_leaves_ends_its_response(server: Server, gates: Path) -> None:
    with server.connect() as client:
        client.send(request("GET", "/endless/left"))
        assert client.head().status == 200
        assert client.chunk()
    eventually((gates / "left.closed").exists, "the generator is closed")


def test_an_application_that_raises(server: Server) -> None:
    with server.connect() as client:
        assert client.ask("GET", "/raise").status == 500
        # The connection is good, and the thread too.
        client.send(request("GET", "/midway"))
        assert client.head().status == 200
        # An end that cannot be taken for one.
        assert client.rest() == b"5\r\nbegun\r\n"
    server.wait_for("RuntimeError: midway")


def test_the_environment(serve: Serve) -> None:
    server = serve("--root-path", "/api", "-k", "gthread", app=APP, workers=1)
    with server.connect() as client:
        found = client.ask("GET", "/environ?a=b", "X_User: intruder", "X-User: checked").json()
    assert found == {
        "SCRIPT_NAME": "/api", "PATH_INFO": "/environ", "QUERY_STRING": "a=b", "REMOTE_ADDR": "127.0.0.1",
        "HTTP_X_USER": "checked", "wsgi.multithread": False, "draining": False,
    }  # fmt: skip
    server.wait_for("said on wsgi.errors")
    assert [line.stream for line in server.lines if "said on wsgi.errors" in line.text] == ["err"]


def test_a_factory(serve: Serve) -> None:
    server = serve(app="tests.helpers.apps.flasky:create_app()", workers=1)
    assert server.get("/whoami").json()["id"] == 1
    assert len(server.found("The factory was called")) == 1


def test_what_cannot_be_told_is_asked_for_and_then_served(serve: Serve) -> None:
    app = "tests.helpers.apps.flasky:anything"
    for options in ([], ["--check-config"]):
        ended = run(app, "--bind", "127.0.0.1:0", "--workers", "2", *options)
        assert ended.code == 3
        (line,) = ended.lines("cannot tell which interface")
        assert line.endswith(f"'{app}' speaks: it is called with (*arguments); say --interface asgi3, asgi2 or wsgi")
        assert "Traceback" not in ended.text
    assert serve("--interface", "wsgi", app=app, workers=1).get("/whoami").status == 200


# ── one queue ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["auto", "request", "connection"])
def narrow(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Server:
    """Two workers with a thread each."""
    options = ("--dispatch", request.param, "--threads", "1", *KEEP)
    return serve(*options, app=APP, workers=2, env={"GATES": str(tmp_path)})


@contextlib.contextmanager
def held(server: Server, gates: Path, name: str) -> Iterator[Client]:
    """A request that occupies a thread until its gate is opened."""
    with server.connect() as client:
        client.send(request("GET", f"/hold/{name}"))
        reached(gates, name)
        yield client


def test_no_request_waits_behind_an_occupied_thread_while_another_is_free(narrow: Server, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(narrow.connect()) for _ in range(6)]
        # In `connection` each belongs to one of the two now, and both have some.
        eventually(
            lambda: {client.ask("GET", "/whoami").json()["id"] for client in clients} == {1, 2}, "both have some"
        )
        holder = stack.enter_context(held(narrow, tmp_path, "one"))
        served = {client.ask("GET", "/whoami").json()["id"] for client in clients for _ in range(3)}
        assert len(served) == 1
        # New ones neither.
        assert {narrow.ask_id() for _ in range(3)} == served
        # Now nobody is free: they wait in the master, and whoever is free first serves them.
        other = stack.enter_context(held(narrow, tmp_path, "two"))
        for client in clients:
            client.send(request("GET", "/whoami"))
        new = stack.enter_context(narrow.connect())
        new.send(request("GET", "/whoami"))
        assert not any(client.has_something() for client in (*clients, new))
        open_gate(tmp_path, "two")
        by = other.response().json()["id"]
        assert {by} == served
        assert {client.response().json()["id"] for client in (*clients, new)} == served
        open_gate(tmp_path, "one")
        assert {holder.response().json()["id"]} == {1, 2} - served


# ── hung ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_only_thread_that_hangs_costs_its_worker_and_nobody_else(serve: Serve, tmp_path: Path) -> None:
    """As with gunicorn's sync worker; the request that waits behind it is for the next worker."""
    server = serve("-k", "sync", "--timeout", "2", app=APP, workers=1, env={"GATES": str(tmp_path)})
    with held(server, tmp_path, "one") as client, server.connect() as waiting:
        waiting.send(request("GET", "/whoami"))
        server.wait_for(r"Worker 1 \(slot 0, pid \d+\) is hung: nothing has come of its threads for 2 s")
        assert client.response().status == 504
        # Where it hung.
        server.wait_for(r'flasky\.py", line \d+ in hold')
        assert waiting.response().json()["id"] == 2
    assert len(server.found("is hung")) == 1


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_in_threads_are_finished_when_the_cluster_stops(serve: Serve, tmp_path: Path) -> None:
    server = serve(app=APP, workers=1, env={"GATES": str(tmp_path)})
    with held(server, tmp_path, "one") as client:
        server.terminate()
        eventually(server.no_listener_left, "nobody listens any more")
        open_gate(tmp_path, "one")
        assert client.response().status == 200
    assert server.wait() == 0


def test_a_thread_beyond_the_grace_time_does_not_keep_the_worker(serve: Serve, tmp_path: Path) -> None:
    server = serve("--timeout-graceful-shutdown", "2", app=APP, workers=1, env={"GATES": str(tmp_path)})
    with held(server, tmp_path, "one"):
        assert server.stop() == 0
    server.wait_for("GET /hold/one is cut off: it has been running for")
    # It has ended by itself, as one does whose requests are cut.
    assert not server.found("killed")


def test_a_request_that_takes_too_long_is_answered_and_its_worker_is_not_hung(serve: Serve, tmp_path: Path) -> None:
    """Two threads: one never comes back.  The heartbeat is the event loop's, which has nothing to do with that."""
    options = ("--timeout", "1", "--timeout-request", "4", "--threads", "2")
    server = serve(*options, app=APP, workers=1, env={"GATES": str(tmp_path)})
    with held(server, tmp_path, "one") as client:
        assert client.response().status == 504
        server.wait_for(r"GET /hold/one has been running for \d+\.\d s and is cancelled; its client is told so")
        # Its thread is lost until it ends, the other one serves.
        assert {server.ask_id() for _ in range(5)} == {1}
        open_gate(tmp_path, "one")
    assert [worker.id for worker in server.announced] == [1]
    assert not server.found("Traceback|does not answer|killed")
