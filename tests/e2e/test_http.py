"""HTTP and WebSockets as clients really send them, over each event loop, parser and WebSocket implementation.

After every test the very same worker must serve, and neither it nor the master may hold a socket more than before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.helpers.apps.full import pattern
from tests.helpers.raw import request
from tests.helpers.server import Server, serving
from tests.helpers.waiting import DEADLINE, eventually

COMBINATIONS = [
    ("uvloop", "httptools", "websockets-sansio"),
    ("uvloop", "h11", "wsproto"),
    ("asyncio", "httptools", "wsproto"),
    ("asyncio", "h11", "websockets"),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="-".join)
def shared(request: pytest.FixtureRequest) -> Iterator[Server]:
    loop, http, ws = request.param
    # uvicorn itself warns of what it calls "websockets" today.
    quiet = {"PYTHONWARNINGS": "ignore:The `websockets` implementation"} if ws == "websockets" else {}
    with serving() as serve:
        server = serve("--loop", loop, "--http", http, "--ws", ws, app="tests.helpers.apps.full:app", env=quiet)
        assert server.get("/whoami").status == 200
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    [worker] = shared.workers
    before = shared.sockets()
    yield shared
    assert shared.get("/whoami").json() == {"id": worker.id, "slot": worker.slot, "pid": worker.pid}
    eventually(lambda: shared.sockets() <= before, f"no socket more than the {before} before the test")


def websocket_url(server: Server) -> str:
    return server.url.replace("http://", "ws://") + "/ws"


# ── requests and responses ──────────────────────────────────────────────────────────────────────────────────────────


def test_hello_with_the_usual_headers(server: Server) -> None:
    with server.client() as client:
        response = client.get("/")
    assert response.status_code == 200
    assert response.text.startswith("Hello from worker 1 (slot 0, pid ")
    assert response.headers["server"] == "uvicorn"
    assert "GMT" in response.headers["date"]
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


def test_the_scope_names_the_real_client_and_server(server: Server) -> None:
    with server.connect(source="127.0.0.7") as client:
        scope = client.ask("GET", "/scope?a=1&b=%20").json()
        assert scope["client"] == ["127.0.0.7", client.port]
    assert scope["server"] == ["127.0.0.1", server.address.port]
    assert (scope["scheme"], scope["path"], scope["query"]) == ("http", "/scope", "a=1&b=%20")
    assert scope["http_version"] == "1.1"
    assert ["host", "test"] in scope["headers"]


def test_many_requests_on_one_connection(server: Server) -> None:
    with server.connect() as client:
        for size in range(100):
            assert client.ask("GET", f"/bytes?n={size}").body == pattern(size)


def test_a_request_after_silence_on_a_new_connection(server: Server) -> None:
    with server.connect() as early, server.connect() as late:
        # `late` was accepted before this answer, and has said nothing since.
        assert early.ask("GET", "/").status == 200
        assert late.ask("GET", "/").status == 200


@pytest.mark.parametrize("cut", ["bytes", "lines", "before the body", "inside the body"])
def test_a_request_in_pieces(server: Server, cut: str) -> None:
    whole = request("POST", "/echo", "X-Long: " + "x" * 50, body=b"0123456789")
    head, _, body = whole.partition(b"\r\n\r\n")
    pieces = {
        "bytes": [whole[i : i + 1] for i in range(len(whole))],
        "lines": whole.splitlines(keepends=True),
        "before the body": [head + b"\r\n\r\n", body],
        "inside the body": [head + b"\r\n\r\n" + body[:3], body[3:]],
    }[cut]
    assert b"".join(pieces) == whole
    with server.connect() as client:
        for piece in pieces:
            client.send(piece)
        assert client.response().body == b"0123456789"
        assert client.ask("GET", "/bytes?n=3").body == pattern(3)


def test_query_errors_are_the_clients_fault(server: Server) -> None:
    with server.client() as client:
        for target in (
            "/sleep?ms=x",
            "/block?ms=-1",
            "/stream?n=1.5",
            "/stream?n=1&ms=",
            "/sleep?ms=1e3",
            "/crash?code=256",
        ):
            response = client.get(target)
            assert response.status_code == 400, target
            assert "must be a whole number from 0 to" in response.text


def test_sleep_and_block_answer_when_they_are_done(server: Server) -> None:
    with server.client() as client:
        assert client.get("/sleep?ms=1").text.startswith("Slept 1 ms in worker 1 ")
        assert client.get("/block?ms=1").text.startswith("Held the event loop 1 ms in worker 1 ")


def test_not_found_and_not_allowed(server: Server) -> None:
    with server.client() as client:
        assert client.get("/nowhere").status_code == 404
        assert client.get("/echo").status_code == 405
        assert client.post("/", content=b"x" * 100_000).status_code == 405


def test_head_has_no_body(server: Server) -> None:
    with server.connect() as client:
        response = client.ask("HEAD", "/")
        assert response.status == 200
        assert int(response.headers["content-length"]) > 0
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


def test_http_1_0_ends_the_connection(server: Server) -> None:
    with server.connect() as client:
        client.send(b"GET /bytes?n=10 HTTP/1.0\r\n\r\n")
        response = client.response()
        assert (response.status, response.body) == (200, pattern(10))
        assert client.rest() == b""


def test_http_1_0_with_a_body_of_unknown_length(server: Server) -> None:
    with server.connect() as client:
        client.send(b"GET /bytes?n=100000&chunk=1000&length=0 HTTP/1.0\r\n\r\n")
        # uvicorn sends chunks even here when httptools parses; what counts is that nothing is missing at the end.
        assert client.response().body == pattern(100_000)
        assert client.rest() == b""


def test_connection_close_is_answered_and_done(server: Server) -> None:
    with server.connect() as client:
        response = client.ask("GET", "/bytes?n=10", "Connection: close")
        assert response.headers["connection"] == "close"
        assert response.body == pattern(10)
        assert client.rest() == b""


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────────────────

FIVE_MB = pattern(5_000_000)


def test_a_big_body_there_and_back_with_a_length(server: Server) -> None:
    with server.client() as client:
        response = client.post("/echo", content=FIVE_MB)
    assert response.headers["content-length"] == str(len(FIVE_MB))
    assert response.content == FIVE_MB


def test_a_big_body_there_and_back_in_chunks(server: Server) -> None:
    with server.client() as client:
        pieces = (FIVE_MB[start : start + 70_001] for start in range(0, len(FIVE_MB), 70_001))
        response = client.post("/echo", content=pieces)
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.content == FIVE_MB


def test_a_slow_body_is_answered_piece_by_piece(server: Server) -> None:
    with server.connect() as client:
        client.send(request("POST", "/echo", "Transfer-Encoding: chunked"))
        for number in range(20):
            piece = b"piece %d" % number
            client.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            if number == 0:
                assert client.head().status == 200
            # The answer to this piece comes before the next one is sent, so every piece is a segment of its own.
            assert client.chunk() == piece
        client.send(b"0\r\n\r\n")
        assert client.chunk() == b""
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


def test_a_slow_body_with_a_length(server: Server) -> None:
    body = pattern(20)
    with server.connect() as client:
        client.send(request("POST", "/echo", f"Content-Length: {len(body)}"))
        for position in range(len(body)):
            client.send(body[position : position + 1])
            if position == 0:
                assert client.head().headers["content-length"] == str(len(body))
            assert client.read(1) == body[position : position + 1]
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


@pytest.mark.parametrize("query", ["", "&chunk=65536", "&length=0", "&chunk=1000003&length=0"])
def test_twenty_megabytes_to_a_slow_reader(server: Server, query: str) -> None:
    size = 20_000_000
    with server.connect(receive_buffer=32_768) as client:
        client.send(request("GET", f"/bytes?n={size}{query}"))
        seen = -1

        def stuck() -> bool:
            nonlocal seen
            before, seen = seen, client.waiting()
            return 0 < seen == before

        eventually(stuck, "the server can send no more until the client reads")
        body = client.response().body
        assert len(body) == size
        assert hashlib.sha256(body).digest() == hashlib.sha256(pattern(size)).digest()
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


def test_a_big_echo_to_a_client_that_reads_late(server: Server) -> None:
    with server.connect(receive_buffer=32_768) as client:
        sender = threading.Thread(target=client.send, args=(request("POST", "/echo", body=FIVE_MB),))
        sender.start()
        eventually(client.has_something, "the answer begins")
        assert client.response().body == FIVE_MB
        sender.join(DEADLINE)


def test_expect_100_continue(server: Server) -> None:
    with server.connect() as client:
        client.send(request("POST", "/echo", "Content-Length: 5", "Expect: 100-continue"))
        assert client.head().status == 100
        client.send(b"hello")
        response = client.response()
        assert (response.status, response.body) == (200, b"hello")
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


def test_expect_100_continue_that_is_not_wanted(server: Server) -> None:
    with server.connect() as client:
        client.send(request("POST", "/nowhere", "Content-Length: 5", "Expect: 100-continue"))
        # The final answer at once, since nobody reads the body.
        assert client.head().status == 404


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_server_sent_events(server: Server) -> None:
    with server.client() as client, client.stream("GET", "/stream?n=5&ms=1") as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        data = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert [event["tick"] for event in data] == [1, 2, 3, 4, 5]


def test_the_connection_outlives_a_stream(server: Server) -> None:
    with server.connect() as client:
        assert client.ask("GET", "/stream?n=3&ms=0").body.count(b"data: ") == 3
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)


def test_a_client_that_leaves_an_endless_stream(server: Server) -> None:
    with server.connect() as client:
        client.send(request("GET", "/stream?ms=1"))
        client.head()
        for _ in range(3):
            assert b"data: " in client.chunk()


# ── pipelining ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.connect() as client:
        client.send(
            request("GET", "/bytes?n=1")
            + request("POST", "/echo", body=b"two")
            + request("HEAD", "/bytes?n=3")
            + request("GET", "/sleep?ms=1")
            + request("GET", "/bytes?n=5")
        )
        assert client.response().body == pattern(1)
        assert client.response().body == b"two"
        assert client.response("HEAD").headers["content-length"] == "3"
        assert client.response().text.startswith("Slept")
        assert client.response().body == pattern(5)
        assert client.ask("GET", "/bytes?n=6").body == pattern(6)


def test_many_pipelined_requests(server: Server) -> None:
    with server.connect() as client:
        client.send(b"".join(request("GET", f"/bytes?n={size}") for size in range(200)))
        for size in range(200):
            assert client.response().body == pattern(size)


def test_a_pipeline_that_ends_the_connection(server: Server) -> None:
    with server.connect() as client:
        client.send(request("GET", "/bytes?n=1") + request("GET", "/bytes?n=2", "Connection: close"))
        assert client.response().body == pattern(1)
        assert client.response().body == pattern(2)
        assert client.rest() == b""


def test_a_pipelined_request_cut_in_two(server: Server) -> None:
    second = request("GET", "/bytes?n=2")
    with server.connect() as client:
        client.send(request("GET", "/bytes?n=1") + second[:10])
        assert client.response().body == pattern(1)
        client.send(second[10:])
        assert client.response().body == pattern(2)


# ── clients that misbehave ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost test\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00\x80\xff" * 60,  # a TLS client's first words
        b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: x\r\n\r\n",
    ],
    ids=["nonsense", "header without colon", "TLS", "bad length"],
)
def test_malformed_requests_get_400(server: Server, data: bytes) -> None:
    with server.connect() as client:
        client.send(data)
        response = client.response()
        assert response.status == 400
        assert response.body == b"Invalid HTTP request received."
        assert client.rest() == b""


def test_a_malformed_request_after_a_good_one(server: Server) -> None:
    with server.connect() as client:
        assert client.ask("GET", "/").status == 200
        client.send(b"nonsense\r\n\r\n")
        assert client.response().status == 400
        assert client.rest() == b""


def test_a_client_that_says_all_and_half_closes(server: Server) -> None:
    with server.connect() as client:
        client.send(request("GET", "/bytes?n=10"))
        client.half_close()
        assert client.response().body == pattern(10)
        assert client.rest() == b""


def test_a_client_that_half_closes_while_the_handler_waits(server: Server) -> None:
    with server.connect() as client:
        client.send(request("GET", "/sleep?ms=20"))
        client.half_close()
        # uvicorn takes the half-close for a disconnect, so an answer is no duty here, but an end is.
        assert client.rest()[:12] in (b"", b"HTTP/1.1 200")


@pytest.mark.parametrize("how", ["nothing", "half a head", "half a body"])
@pytest.mark.parametrize("end", ["close", "half_close", "reset"])
def test_a_client_that_leaves_too_early(server: Server, how: str, end: str) -> None:
    said = {
        "nothing": b"",
        "half a head": b"GET / HTTP/1.1\r\nHo",
        "half a body": request("POST", "/echo", "Content-Length: 10") + b"12345",
    }[how]
    with server.connect() as client:
        client.send(said)
        if how == "half a body":
            assert client.head().status == 200
        getattr(client, end)()
        if end == "half_close":
            client.rest()


def test_a_client_that_leaves_in_the_middle_of_a_big_answer(server: Server) -> None:
    with server.connect(receive_buffer=32_768) as client:
        client.send(request("GET", "/bytes?n=20000000&chunk=100000"))
        assert client.head().status == 200
        client.read(1000)
        client.reset()


def test_a_head_that_never_ends_is_bounded(server: Server) -> None:
    with server.connect() as client:
        try:
            client.send(request("GET", "/", *(f"X-{number}: {'x' * 4000}" for number in range(100))))
            status = client.response().status
        except (ConnectionError, EOFError):
            return
        assert status in (200, 400, 413, 431)


def test_a_handler_that_raises(shared: Server) -> None:
    shared.noise = True
    [worker] = shared.workers
    before = len(shared.found("the handler's own trouble"))
    with shared.connect() as client:
        assert client.ask("GET", "/fail").status == 500
    shared.wait_for("RuntimeError: the handler's own trouble", count=before + 1)
    assert shared.get("/whoami").json()["pid"] == worker.pid


# ── WebSockets ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_websocket_echo(server: Server) -> None:
    with connect(websocket_url(server)) as websocket:
        for message in ("text", "", "ä€𝄞", b"bytes", b"\x00\xff"):
            websocket.send(message)
            assert websocket.recv(DEADLINE) == message
        websocket.ping().wait(DEADLINE)
        websocket.close(4000, "enough")
    assert websocket.protocol.close_code == 4000


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_big_websocket_messages(server: Server, compression: str | None) -> None:
    with connect(websocket_url(server), compression=compression, max_size=None) as websocket:
        for size in (125, 126, 65_535, 65_536, 2_000_000):
            message = pattern(size)
            websocket.send(message)
            assert websocket.recv(DEADLINE) == message
        text = pattern(500_000).hex()
        websocket.send(text)
        assert websocket.recv(DEADLINE) == text


def test_a_websocket_message_in_fragments(server: Server) -> None:
    with connect(websocket_url(server)) as websocket:
        websocket.send(f"{number}," for number in range(50))
        assert websocket.recv(DEADLINE) == "".join(f"{number}," for number in range(50))


def test_many_websockets_at_once(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        websockets = [stack.enter_context(connect(websocket_url(server))) for _ in range(20)]
        for number, websocket in enumerate(websockets):
            websocket.send(f"to {number}")
        for number, websocket in enumerate(websockets):
            assert websocket.recv(DEADLINE) == f"to {number}"


def test_a_websocket_beside_requests(server: Server) -> None:
    with connect(websocket_url(server)) as websocket, server.client() as client:
        for number in range(5):
            websocket.send(str(number))
            assert client.get("/").status_code == 200
            assert websocket.recv(DEADLINE) == str(number)


def test_a_websocket_that_nobody_answers(server: Server) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(server.url.replace("http://", "ws://") + "/nowhere")
    assert caught.value.response.status_code == 403


def test_a_websocket_handshake_in_pieces(server: Server) -> None:
    handshake = request(
        "GET",
        "/ws",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    with server.connect() as client:
        for position in range(len(handshake)):
            client.send(handshake[position : position + 1])
        head = client.head()
        assert head.status == 101
        assert head.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        # A masked text frame "Hi" and its echo, unmasked.
        client.send(b"\x81\x82\x00\x00\x00\x00Hi")
        assert client.read(4) == b"\x81\x02Hi"


def test_a_websocket_after_requests_on_the_same_connection(server: Server) -> None:
    with server.connect() as client:
        assert client.ask("GET", "/bytes?n=5").body == pattern(5)
        client.send(
            request(
                "GET",
                "/ws",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert client.head().status == 101
        client.send(b"\x81\x82\x00\x00\x00\x00Hi")
        assert client.read(4) == b"\x81\x02Hi"


def test_a_websocket_client_that_vanishes(server: Server) -> None:
    with server.connect() as client:
        client.send(
            request(
                "GET",
                "/ws",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            )
        )
        assert client.head().status == 101
        client.reset()


def test_httpx_keeps_its_connections(server: Server) -> None:
    with server.client() as client:
        ports = {tuple(client.get("/scope").json()["client"]) for _ in range(10)}
        assert len(ports) == 1


def test_httpx_with_many_connections_at_once(server: Server) -> None:
    with server.client() as client:
        results: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: results.append(client.get("/sleep?ms=5"))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    assert [result.status_code for result in results] == [200] * 20
