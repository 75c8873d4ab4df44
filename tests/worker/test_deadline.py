"""`--timeout-request` in a worker: uvicorn's own protocols on the loop's own transports, and what is relied upon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from clusterserve.worker.deadline import GATEWAY_TIMEOUT, Deadline
from clusterserve.worker.draining import RAISED
from tests.helpers.loops import until
from tests.helpers.raw import request

Loop = asyncio.AbstractEventLoop
TIMEOUT = 0.4
GET = request("GET", "/a\nb".replace("\n", "%0A"))

KINDS: list[Any] = [H11Protocol, HttpToolsProtocol]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


class App:
    """Never ends of itself; says how it did end."""

    def __init__(self) -> None:
        self.start = False
        self.complete = False
        self.ended: list[str] = []
        self.calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        if self.start or self.complete:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": not self.complete})
        try:
            await asyncio.Event().wait()
        except BaseException as exc:
            self.ended.append(type(exc).__name__)
            raise


class Rig:
    """A server's end of a connection with one of uvicorn's protocols on it, and the client's end."""

    def __init__(self, loop: Loop, app: App, kind: Any) -> None:
        self.loop, self.app = loop, app
        self.state = ServerState()
        self.config = uvicorn.Config(app, http=kind, lifespan="off", log_config=None)
        self.config.load()
        self.kind = kind
        self.deadline = Deadline(self.state.tasks, TIMEOUT)
        self.logger = logging.getLogger("uvicorn.error")
        self.said: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(self.handler)
        self.logger.addFilter(self.deadline)
        self.client, self.server = socket.socketpair()
        self.client.setblocking(False)

    async def connect(self) -> Any:
        def factory() -> Any:
            return self.kind(config=self.config, server_state=self.state, app_state={}, _loop=self.loop)

        _, protocol = await self.loop.connect_accepted_socket(factory, self.server)
        self.deadline.watch(self.loop)
        return protocol

    async def rest(self) -> bytes:
        data = b""
        while part := await self.loop.sock_recv(self.client, 65536):
            data += part
        return data

    def close(self) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.removeFilter(self.deadline)
        self.client.close()


Make = Callable[[Any], Rig]


@pytest.fixture
def make(loop: Loop) -> Iterator[Make]:
    rigs: list[Rig] = []

    def make_one(kind: Any) -> Rig:
        rigs.append(Rig(loop, App(), kind))
        return rigs[-1]

    yield make_one
    for rig in rigs:
        rig.close()


@kinds
async def test_who_has_heard_nothing_hears_504(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    await rig.connect()
    began = loop.time()
    await loop.sock_sendall(rig.client, GET)
    assert await rig.rest() == GATEWAY_TIMEOUT
    assert loop.time() - began >= TIMEOUT
    await until(lambda: not rig.state.tasks, "the task has ended")
    assert rig.app.ended == ["CancelledError"]
    # One line, and no traceback: the order was ours.
    (line,) = rig.said
    assert line.startswith("GET /a%0Ab has been running for 0.")
    assert line.endswith(" s and is cancelled; its client is told so (504)")
    assert not rig.state.connections


@kinds
async def test_who_has_heard_something_hears_no_more(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    rig.app.start = True
    await rig.connect()
    await loop.sock_sendall(rig.client, GET)
    answer = await rig.rest()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"half")
    await until(lambda: not rig.state.tasks, "the task has ended")
    assert rig.said[0].endswith("; the connection is closed")


@kinds
async def test_what_runs_on_behind_its_response_is_left_alone(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    rig.app.complete = True
    await rig.connect()
    began = loop.time()
    await loop.sock_sendall(rig.client, GET)
    await until(lambda: loop.time() - began > 2 * TIMEOUT, "twice the time passes")
    assert len(rig.state.tasks) == 1
    assert rig.said == []
    for task in rig.state.tasks:
        task.cancel()
    await until(lambda: not rig.state.tasks, "the task has ended")
    # This order was not ours.
    assert rig.said == [RAISED]


def test_time_in_which_nobody_could_look_hardly_counts() -> None:
    """1. A request begins.  2. The machine sleeps for long.  Result: it has nearly all of its time when that wakes."""
    clock = SimpleNamespace(now=100.0, later=[])
    clock.time, clock.call_later = lambda: clock.now, lambda *call: clock.later.append(call)
    deadline = Deadline({cast("Any", "task")}, 8.0)
    ended: list[float] = []
    deadline._end = lambda loop, task, age: ended.append(age)  # type: ignore[method-assign]
    deadline.watch(clock)
    for pause in (1.0, 3600.0, 1.0, 1.5, 1.0, 1.0):
        clock.now += pause
        deadline.watch(clock)
    assert ended == []
    clock.now += 0.5
    deadline.watch(clock)
    assert ended == [8.0]


@kinds
async def test_a_client_that_goes_on_sending_can_read_the_answer(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    await rig.connect()
    await loop.sock_sendall(rig.client, request("POST", "/", "Content-Length: 100000000"))
    answer = b""
    while not answer.endswith(GATEWAY_TIMEOUT):
        await loop.sock_sendall(rig.client, b"x" * 65536)
        try:
            answer += rig.client.recv(65536)
        except BlockingIOError:
            await asyncio.sleep(0)
    # What it sends now is read and forgotten, until it has had its time.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            await loop.sock_sendall(rig.client, b"x" * 65536)


@kinds
async def test_what_waits_behind_it_never_begins(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    await rig.connect()
    await loop.sock_sendall(rig.client, GET + GET)
    assert await rig.rest() == GATEWAY_TIMEOUT
    await until(lambda: not rig.state.tasks, "the task has ended")
    assert rig.app.calls == 1


@kinds
async def test_its_client_has_left(loop: Loop, make: Make, kind: Any) -> None:
    rig = make(kind)
    await rig.connect()
    await loop.sock_sendall(rig.client, GET)
    await until(lambda: rig.state.tasks, "it runs")
    rig.client.close()
    await until(lambda: not rig.state.tasks, "the task has ended")
    assert rig.said[0].endswith("; its client has left")


async def test_what_is_no_request_is_left_alone(loop: Loop) -> None:
    class Other:
        scope: Any = None

        async def run_asgi(self) -> None:
            await asyncio.Event().wait()

    class WebSocket(Other):
        scope = {"type": "websocket", "path": "/"}  # noqa: RUF012

    tasks = {loop.create_task(each().run_asgi()) for each in (Other, WebSocket)}
    deadline = Deadline(tasks, 0.01)
    deadline.watch(loop)
    began = loop.time()
    await until(lambda: loop.time() - began > 0.1, "time passes")
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
