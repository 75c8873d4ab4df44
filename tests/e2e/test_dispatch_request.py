"""`--dispatch request`: a connection goes back to the master after every response."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from itertools import product

import pytest

from tests.helpers import proc
from tests.helpers.apps.full import pattern
from tests.helpers.load import under_load
from tests.helpers.raw import Client, request
from tests.helpers.server import Serve, Server
from tests.helpers.waiting import eventually

APP = "tests.helpers.apps.borrowed:app"

GET = request("GET", "/whoami")


def start(serve: Serve, *options: str, workers: int = 2, **settings: object) -> Server:
    return serve("--dispatch", "request", *options, app=APP, workers=workers, **settings)


@pytest.fixture(scope="module", params=list(product(("uvloop", "asyncio"), ("httptools", "h11"))), ids="-".join)
def server(request: pytest.FixtureRequest, serve_module: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Every loop and parser; on TCP and on a unix socket at once."""
    loop, http = request.param
    path = tmp_path_factory.mktemp("s") / "s"
    binds = ["127.0.0.1:0", f"unix:{path}"]
    return start(serve_module, "--loop", loop, "--http", http, bind=binds, noise=True).warm()


@pytest.fixture(params=["tcp", "unix"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    with Client(server.addresses[0 if request.param == "tcp" else 1]) as client:
        yield client


def goes_on(client: Client) -> None:
    """The connection serves whatever comes next, and has no byte left of what came before."""
    assert not client.has_something()
    # By whichever: a worker that still has something to do is passed over.
    assert {client.ask("GET", "/whoami").json()["id"] for _ in range(4)} <= {1, 2}


def test_one_connection_is_served_by_the_workers_in_turn(client: Client) -> None:
    eventually(
        lambda: {client.ask("GET", "/whoami").json()["id"] for _ in range(8)} == {1, 2}, "both serve the one connection"
    )
    goes_on(client)


def test_pipelining(client: Client) -> None:
    sizes = [1, 70_000, 0, 3]
    client.send(b"".join(request("GET", f"/bytes?n={size}") for size in sizes))
    for size in sizes:
        assert client.response().body == pattern(size)
    goes_on(client)


def test_a_next_request_partly_sent(client: Client) -> None:
    client.send(GET + GET[:25])
    assert client.response().status == 200
    client.send(GET[25:] + GET[:1])
    assert client.response().status == 200
    client.send(GET[1:])
    assert client.response().status == 200
    goes_on(client)


def test_a_body_in_a_second_segment(client: Client) -> None:
    for size in (10, 300_000):
        body = pattern(size)
        client.send(request("POST", "/echo", f"Content-Length: {size}"))
        client.send(body)
        assert client.response().body == body
    goes_on(client)


def test_a_chunked_upload(client: Client) -> None:
    client.send(request("POST", "/echo", "Transfer-Encoding: chunked"))
    for part in (b"5\r\nabcde\r\n", b"1\r\nf\r", b"\n0\r\n", b"\r\n"):
        client.send(part)
    assert client.response().body == b"abcdef"
    goes_on(client)


def test_expect_100_continue(client: Client) -> None:
    client.send(request("POST", "/echo", "Expect: 100-continue", "Content-Length: 4"))
    assert client.head().status == 100
    client.send(b"body")
    assert client.response().body == b"body"
    goes_on(client)


def test_a_big_response_to_a_slow_reader(server: Server) -> None:
    size = 8_000_000
    for address in server.addresses[:2]:
        with Client(address, receive_buffer=4096) as client:
            client.send(request("GET", f"/bytes?n={size}"))
            head = client.head()
            assert head.headers["content-length"] == str(size)
            # Others are served meanwhile.
            assert [server.get("/whoami").status for _ in range(4)] == [200] * 4
            assert client.read(size) == pattern(size)
            goes_on(client)


def test_an_answer_before_the_body(client: Client) -> None:
    body = pattern(400_000)
    client.send(request("POST", "/early", f"Content-Length: {len(body)}"))
    assert client.response().text == "early"
    client.send(body)
    goes_on(client)


def test_a_websocket_after_a_request(client: Client) -> None:
    assert client.ask("GET", "/whoami").status == 200
    key = base64.b64encode(os.urandom(16)).decode()
    client.send(
        request(
            "GET",
            "/ws",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
        )
    )
    assert client.head().status == 101
    for text in (b"one", b"two", b"three"):
        # Masked with zeros.
        client.send(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
        assert client.read(2 + len(text)) == bytes([0x81, len(text)]) + text


def test_what_ends_after_its_response(client: Client) -> None:
    client.send(request("GET", "/whoami", "Connection: close"))
    assert client.response().status == 200
    assert client.rest() == b""


def test_http_1_0(client: Client) -> None:
    client.send(request("GET", "/whoami", version="1.0"))
    assert client.response().status == 200
    assert client.rest() == b""


def test_without_a_body(client: Client) -> None:
    assert client.ask("HEAD", "/whoami").body == b""
    assert client.ask("GET", "/empty").status == 204
    goes_on(client)


def test_a_client_that_half_closes(client: Client) -> None:
    client.send(GET + GET)
    client.half_close()
    assert client.response().status == 200
    assert client.response().status == 200
    assert client.rest() == b""


def test_a_client_that_half_closes_after_its_response(client: Client) -> None:
    assert client.ask("GET", "/whoami").status == 200
    client.half_close()
    assert client.rest() == b""


def test_what_runs_on_after_the_response(server: Server, client: Client) -> None:
    done = len(server.found("The background is done"))
    assert client.ask("GET", "/background").text == "foreground"
    goes_on(client)
    server.wait_for("The background is done", count=done + 1)


def test_an_application_that_raises_midway(client: Client) -> None:
    client.send(request("GET", "/midway"))
    assert client.head().status == 200
    assert client.rest() == b"half"


def test_a_request_that_is_malformed(client: Client) -> None:
    assert client.ask("GET", "/whoami").status == 200
    client.send(b"no request\r\n\r\n")
    assert client.response().status == 400
    assert client.rest() == b""


def test_nothing_waits_behind_a_blocked_worker(serve: Serve) -> None:
    server = start(serve).warm()
    with server.connect() as busy, server.connect() as kept:
        assert kept.ask("GET", "/whoami").status == 200
        # Released by its client's half of a pipe, not by a time: it blocks until we have seen what we wanted.
        busy.send(request("GET", f"/until?path={server.scratch / 'go'}"))
        server.wait_for("The loop is held")
        answers = [kept.ask("GET", "/whoami").json()["id"] for _ in range(10)]
        assert len(set(answers)) == 1
        assert not busy.has_something()
        (server.scratch / "go").touch()
        assert busy.response().text == "released"
        # It says that it is free after the client has its answer, and may be held up in between.
        eventually(
            lambda: {kept.ask("GET", "/whoami").json()["id"] for _ in range(10)} == {1, 2}, "both take turns again"
        )
    (server.scratch / "go").unlink()


def test_an_idle_connection_is_closed_at_keep_alive_and_others_are_not(serve: Serve) -> None:
    server = start(serve, "--timeout-keep-alive", "2")
    with server.connect() as idle, server.connect() as busy:
        assert idle.ask("GET", "/whoami").status == 200
        assert busy.ask("GET", "/whoami").status == 200
        busy.send(request("GET", "/sleep?ms=2500"))
        assert idle.rest() == b""
        assert busy.response().status == 200
        goes_on(busy)


def test_a_stop_finishes_requests_and_closes_what_is_idle(serve: Serve) -> None:
    server = start(serve)
    with server.connect() as idle, server.connect() as busy:
        assert idle.ask("GET", "/whoami").status == 200
        busy.send(request("GET", "/sleep?ms=700"))
        server.terminate()
        assert idle.rest() == b""
        assert busy.response().status == 200
        assert busy.rest() == b""
    assert server.wait() == 0


def test_under_load_and_no_descriptor_is_left(serve: Serve) -> None:
    server = start(serve).warm()
    pids = [server.pid, *(worker.pid for worker in server.workers)]

    def count() -> list[int]:
        # Sockets only: libuv opens /dev/null with its first stream, and keeps it.
        return [len(proc.socket_inodes(pid)) for pid in pids]

    before = count()
    with under_load(server.address, clients=4) as load:
        load.answered(150)
        clients = [server.connect() for _ in range(20)]
        for client in clients:
            assert client.ask("GET", "/whoami").status == 200
        for client in clients:
            client.close()
        load.answered(20)
    eventually(lambda: count() == before, f"all descriptors are closed, as before: {before}")


@pytest.mark.parametrize("policy", ["least", "hash"])
def test_other_policies(serve: Serve, policy: str) -> None:
    server = start(serve, "--policy", policy)
    with server.connect() as client:
        ids = {client.ask("GET", "/whoami").json()["id"] for _ in range(8)}
    assert ids <= {1, 2}
    if policy == "hash":
        assert len(ids) == 1
