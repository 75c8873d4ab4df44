"""WSGI applications behind ASGI: the bridge, with a client made of two queues."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterserve.worker.body import ClientGoneError
from clusterserve.worker.threads import Threads
from clusterserve.worker.wsgi import HIGH_WATER, Bridge
from tests.helpers.loops import turns, until

Loop = asyncio.AbstractEventLoop
VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="nothing")


class Call:
    """One request to an application: what the client sends is put in, what it gets is in `sent`."""

    def __init__(self, app: Callable[..., Any], method: str = "GET", threads: Threads | None = None) -> None:
        self.threads = threads or Threads(2)
        self.scope = {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": "/", "raw_path": b"/",
            "query_string": b"", "root_path": "", "headers": [], "server": None, "client": None,
        }  # fmt: skip
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        #: Cleared: the client reads nothing.
        self.reads = asyncio.Event()
        self.reads.set()
        bridge = Bridge(app, self.threads)
        self.task = asyncio.get_running_loop().create_task(bridge(self.scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        return await self.incoming.get()

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def says(self, body: bytes, *, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leaves(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = self.sent[0]["headers"]
        return found

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1]["more_body"]


def ok(start_response: Any, *headers: tuple[str, str]) -> Any:
    return start_response("200 OK", list(headers))


class Parts:
    """An iterable whose `close` is noted."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.closed: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def close(self) -> None:
        self.closed.append(VAR.get())


async def test_a_response(loop: Loop) -> None:
    parts = Parts(b"a", b"", b"b")

    def app(environ: Any, start_response: Any) -> Any:
        VAR.set("the application's")
        ok(start_response, ("X-A", " b "), ("Connection", "close"), ("Transfer-Encoding", "chunked"))
        assert threading.current_thread().name.startswith("wsgi-")
        assert environ["wsgi.multithread"] is True
        return parts

    call = Call(app)
    await call.task
    assert (call.status, call.body, call.complete) == (200, b"ab", True)
    # Framing is the server's.
    assert call.headers == [(b"x-a", b"b"), (b"connection", b"close")]
    assert parts.closed == ["the application's"]
    assert VAR.get() == "nothing"
    await until(lambda: call.threads.busy == 0, "the thread is free")


async def test_the_head_can_be_replaced_until_something_is_sent(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response, ("X-A", "b"))
        yield b""
        try:
            raise ValueError("changed its mind")
        except ValueError as exc:
            start_response("503 Busy", [], (ValueError, exc, exc.__traceback__))
        yield b"sorry"

    call = Call(app)
    await call.task
    assert (call.status, call.headers, call.body) == (503, [], b"sorry")


async def test_and_not_afterwards(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        yield b"begun"
        exc = ValueError("too late")
        start_response("500 Oh", [], (ValueError, exc, None))

    call = Call(app)
    with pytest.raises(ValueError, match="too late"):
        await call.task
    assert (call.status, call.body, call.complete) == (200, b"begun", False)


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        (lambda start: [b"x"], RuntimeError, "has not called start_response"),
        (lambda start: [], RuntimeError, "has not called start_response"),
        (lambda start: (ok(start), ok(start)), RuntimeError, "twice"),
        (lambda start: (ok(start), ["text"])[1], TypeError, "consists of bytes, and this is str"),
        (lambda start: [ok(start, ("Content-Length", "many"))], ValueError, "many"),
    ],
)
async def test_faults_of_the_application(loop: Loop, fault: Any, error: Any, match: str) -> None:
    call = Call(lambda environ, start_response: fault(start_response))
    with pytest.raises(error, match=match):
        await call.task
    assert call.sent == []


async def test_it_raises_in_the_middle(loop: Loop) -> None:
    parts = Parts(b"a", ValueError("midway"))

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        return parts

    call = Call(app)
    with pytest.raises(ValueError, match="midway"):
        await call.task
    assert (call.body, call.complete, len(parts.closed)) == (b"a", False, 1)


async def test_what_it_raises_after_its_response_is_only_told(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response, ("Content-Length", "1"))
        yield b"a"
        raise ValueError("afterwards")

    call = Call(app)
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        await call.task
    assert call.complete
    assert "Exception in WSGI application, after its response" in caplog.text
    assert "afterwards" in caplog.text


async def test_a_response_of_known_length_is_complete_with_its_last_byte(loop: Loop) -> None:
    go_on = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response, ("Content-Length", "3"))
        yield b"ab"
        yield b"cd"
        go_on.wait()
        yield b"e"

    call = Call(app)
    await until(lambda: call.complete, "it is complete")
    assert call.body == b"abc"
    # But its thread is not free.
    await turns(3)
    assert not call.task.done()
    assert call.threads.busy == 1
    go_on.set()
    await call.task
    assert call.body == b"abc"


async def test_a_response_without_a_body(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response, ("Content-Length", "0"))
        return []

    call = Call(app, "HEAD")
    await call.task
    assert (call.body, call.complete, call.headers) == (b"", True, [(b"content-length", b"0")])


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200 OK"), ("GET", "204 No Content"), ("GET", "304 Same")])
async def test_what_has_no_body_is_sent_none(loop: Loop, method: str, status: str) -> None:
    """Whatever the application says: a client would take it for its next response, or wait for it."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, [("Content-Length", "9"), ("ETag", "x")])
        return [] if status.startswith("304") else [b"some", b"thing"]

    call = Call(app, method)
    await call.task
    assert (call.body, call.complete) == (b"", True)
    # To HEAD the length tells what GET would get; elsewhere the server would wait for so much.
    lengths = [value for name, value in call.headers if name == b"content-length"]
    assert lengths == ([b"9"] if method == "HEAD" else [])


@pytest.mark.parametrize(
    "header", [("X-A", "b\r\nSet-Cookie: c"), ("X-A", "b\n"), ("X A", "b"), ("X-A:", "b"), ("", "b"), ("X-A", "b\0")]
)
async def test_a_header_that_would_not_be_one_is_told_to_whoever_sets_it(loop: Loop, header: tuple[str, str]) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        with pytest.raises(ValueError, match="a header cannot be sent: "):
            ok(start_response, header)
        start_response("500 Sorry", [("X-Tab", "a\tb"), ("X-Latin", "\xe9")])
        return [b"told"]

    call = Call(app)
    await call.task
    assert (call.status, call.body) == (500, b"told")
    assert call.headers == [(b"x-tab", b"a\tb"), (b"x-latin", b"\xe9")]


async def test_the_old_way_to_write(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write = ok(start_response)
        write(b"a")
        write(b"b")
        return [b"c"]

    call = Call(app)
    await call.task
    assert call.body == b"abc"


async def test_a_slow_client_holds_up_the_application_and_not_the_memory(loop: Loop) -> None:
    made: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        for number in range(20):
            made.append(number)
            yield b"x" * (HIGH_WATER // 4)

    call = Call(app)
    call.reads.clear()
    # The fifth is more than may wait.
    await until(lambda: len(made) >= 5, "it has made some")
    await asyncio.sleep(0.02)
    assert len(made) == 5
    call.reads.set()
    await call.task
    assert len(call.body) == 20 * (HIGH_WATER // 4)


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_leaves_ends_the_response(loop: Loop, reads: bool) -> None:
    closed = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        try:
            while True:
                yield b"x" * 1000
                time.sleep(0.001)
        finally:
            closed.set()

    call = Call(app)
    call.says(b"")
    await until(lambda: len(call.sent) > 2, "it streams")
    if not reads:
        call.reads.clear()
    call.leaves()
    await until(closed.is_set, "its generator is closed")
    call.reads.set()
    await call.task
    assert not call.complete
    await until(lambda: call.threads.busy == 0, "the thread is free")


async def test_a_request_that_is_cancelled_leaves_its_thread_when_that_writes(loop: Loop) -> None:
    go_on, closed = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        try:
            go_on.wait()
            yield b"nobody wants it"
        finally:
            closed.set()

    call = Call(app)
    await until(lambda: call.threads.busy == 1, "it runs")
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    # Nothing can end a thread: it is occupied.
    assert call.threads.busy == 1
    go_on.set()
    await until(lambda: call.threads.busy == 0, "the thread is free")
    assert closed.is_set()
    assert call.sent == []


async def test_a_response_that_the_server_refuses_does_not_cost_the_thread(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        for _ in range(100):
            yield b"x" * HIGH_WATER

    call = Call(app)

    async def refuse(message: Any) -> None:
        raise RuntimeError("Invalid HTTP header value.")

    call.send = refuse  # type: ignore[method-assign]
    call.task.cancel()
    task = loop.create_task(Bridge(app, call.threads)(call.scope, call.receive, refuse))
    with pytest.raises(RuntimeError, match="Invalid HTTP"):
        await task
    await until(lambda: call.threads.busy == 0, "the thread is free")


# ── the body ────────────────────────────────────────────────────────────────────────────────────────────────────────


def reader(read: Callable[[Any], Any]) -> tuple[Callable[..., Any], list[Any]]:
    found: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        found.append(read(environ["wsgi.input"]))
        ok(start_response)
        return [b"ok"]

    return app, found


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda body: body.read(), b"one\ntwo\nthree"),
        (lambda body: (body.read(2), body.read(3), body.read(100)), (b"on", b"e\nt", b"wo\nthree")),
        (lambda body: (body.readline(), body.readline(2), body.readline(99)), (b"one\n", b"tw", b"o\n")),
        (lambda body: body.readlines(), [b"one\n", b"two\n", b"three"]),
        (lambda body: list(body), [b"one\n", b"two\n", b"three"]),
        (lambda body: (body.read(), body.read(), body.readlines(), body.read(5)), (b"one\ntwo\nthree", b"", [], b"")),
    ],
)
async def test_every_way_to_read_a_body_that_comes_in_pieces(loop: Loop, read: Any, wanted: Any) -> None:
    app, found = reader(read)
    call = Call(app, "POST")
    for piece in (b"on", b"e\ntw", b"", b"o\nthr"):
        call.says(piece, more=True)
        await turns(2)
    call.says(b"ee")
    await call.task
    assert found == [wanted]


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_end_of_it(loop: Loop) -> None:
    def read(body: Any) -> Any:
        with pytest.raises(ClientGoneError):
            body.read()
        with pytest.raises(OSError, match="left in the middle"):
            body.read()
        return "noticed"

    app, found = reader(read)
    call = Call(app, "POST")
    call.says(b"half", more=True)
    call.leaves()
    await call.task
    assert found == ["noticed"]


async def test_an_application_that_does_not_care_is_not_to_blame(loop: Loop) -> None:
    app, found = reader(lambda body: body.read())
    call = Call(app, "POST")
    call.leaves()
    await call.task
    assert (found, call.sent) == ([], [])


async def test_a_body_is_read_while_the_response_is_written(loop: Loop) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        yield b"go:"
        yield from iter(lambda: environ["wsgi.input"].read(3), b"")

    call = Call(app, "POST")
    await until(lambda: call.body == b"go:", "it has begun")
    call.says(b"abc", more=True)
    await until(lambda: call.body == b"go:abc", "it answers")
    call.says(b"d")
    await call.task
    assert call.body == b"go:abcd"


async def test_a_piece_that_came_before_it_was_asked_for_does_not_wait_for_the_next(loop: Loop) -> None:
    go_on = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        yield b"go:"
        go_on.wait()
        yield environ["wsgi.input"].read(3)

    call = Call(app, "POST")
    await until(lambda: call.body == b"go:", "it has begun")
    call.says(b"abc", more=True)
    await until(call.incoming.empty, "whoever looks after the client has taken it in")
    await turns(5)
    go_on.set()
    await until(lambda: call.body == b"go:abc", "it answers")
    call.says(b"")
    await call.task


async def test_a_large_body_that_nobody_reads_is_not_taken_in(loop: Loop) -> None:
    go_on = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response)
        yield b"x"
        go_on.wait()
        yield b"%d" % len(environ["wsgi.input"].read())

    call = Call(app, "POST")
    for _ in range(10):
        call.says(bytes(40000), more=True)
    call.says(b"")
    await until(lambda: call.incoming.qsize() == 9, "two pieces are taken in")
    await turns(5)
    assert call.incoming.qsize() == 9
    go_on.set()
    await call.task
    assert call.body == b"x400000"


# ── beside requests ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_lifespan_is_as_long_as_it_is_wanted(loop: Loop) -> None:
    incoming = iter(["lifespan.startup", "lifespan.shutdown"])
    sent: list[str] = []

    async def receive() -> Any:
        return {"type": next(incoming)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await Bridge(lambda environ, start: None, Threads(1))({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_an_only_thread_of_which_nothing_comes_is_stuck(loop: Loop) -> None:
    go_on = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        body = environ["wsgi.input"].read(1)
        go_on.wait()
        ok(start_response)
        yield body
        go_on.clear()
        go_on.wait()

    call = Call(app, "POST", Threads(1))
    threads = call.threads
    assert not threads.stuck()
    await until(lambda: threads.busy == 1, "it runs")
    assert not threads.stuck()
    assert threads.stuck()
    # Who waits for it is no sign of life.
    waiting = Call(lambda environ, start_response: (ok(start_response), [b""])[1], threads=threads)
    await until(lambda: threads.busy == 2, "another waits")
    assert threads.stuck()
    call.says(b"x")
    # A piece of the body.
    await until(lambda: not threads.stuck(), "something has come of it")
    await until(threads.stuck, "and then nothing")
    go_on.set()
    await until(lambda: call.body == b"x", "a piece of the response")
    assert not threads.stuck()
    await until(threads.stuck, "nothing again")
    go_on.set()
    await call.task
    await waiting.task
    await until(lambda: threads.busy == 0, "it is done")
    # Nobody wants anything of it.
    assert not any(threads.stuck() for _ in range(3))


async def test_several_are_stuck_when_nobody_waits_for_any(loop: Loop) -> None:
    gate = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        gate.wait()
        ok(start_response)
        return [b"late"]

    threads = Threads(2)
    calls = [Call(app, threads=threads) for _ in range(3)]
    await until(lambda: threads.busy == 3, "they run, and one waits")
    # However long it takes: somebody waits for it.
    assert not any(threads.stuck() for _ in range(3))
    calls[0].task.cancel()
    await turns(3)
    assert (threads.lost, threads.stuck()) == (1, False)
    calls[1].task.cancel()
    await turns(3)
    assert (threads.lost, threads.stuck()) == (2, True)
    gate.set()
    await until(lambda: threads.busy == 0, "all are done")
    assert (threads.lost, threads.stuck()) == (0, False)
    await calls[2].task
    assert calls[2].body == b"late"


async def test_work_behind_a_complete_response_is_no_thread_lost(loop: Loop) -> None:
    gate = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        ok(start_response, ("Content-Length", "2"))
        yield b"a"
        yield b"b"
        gate.wait()

    call = Call(app, threads=Threads(2))
    await until(lambda: call.complete, "it is complete")
    # As uvicorn has it from then on.
    call.leaves()
    await turns(5)
    assert call.threads.lost == 0
    gate.set()
    await call.task


async def test_nothing_of_a_request_is_left_to_the_collector(loop: Loop) -> None:
    """What it had may be large, and the collector comes by rarely."""

    class Large:
        pass

    left: list[weakref.ref[Large]] = []

    def app(environ: Any, start_response: Any) -> Any:
        environ["large"] = large = Large()
        left.append(weakref.ref(large))
        environ["wsgi.input"].read()
        ok(start_response)
        return [b"done"]

    threads = Threads(1)
    gc.disable()
    try:
        for _ in range(3):
            call = Call(app, "POST", threads)
            call.says(b"abc")
            await call.task
            await until(lambda: threads.busy == 0, "its thread is free")
        del call
        await turns(3)
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()


async def test_no_more_threads_than_there_are_places(loop: Loop) -> None:
    threads, gate = Threads(2), threading.Event()
    names: set[str] = set()
    told: list[int] = []
    threads.on_begin = lambda: told.append(threads.busy)
    threads.on_end = lambda seconds: told.append(threads.busy)

    def job() -> None:
        names.add(threading.current_thread().name)
        gate.wait()

    for _ in range(4):
        threads.begin(loop, job)
    await until(lambda: len(names) == 2, "two run")
    assert threads.busy == 4
    gate.set()
    await until(lambda: threads.busy == 0, "all have ended")
    assert told == [1, 2, 3, 4, 3, 2, 1, 0]
    assert len(names) == 2
