"""What clusterserve/worker/asgi.py and transport.py rely on in uvicorn beyond its documented API, one test each.

They run uvicorn alone, so that a release that breaks one of these fails here, by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.protocols.utils import get_local_addr, get_remote_addr

from clusterserve.settings import Settings
from clusterserve.worker.asgi import _PASSED, CANCELLED, CHATTER
from tests.helpers.loops import until
from tests.helpers.raw import request

Loop = asyncio.AbstractEventLoop


@pytest.fixture
def loop_class() -> type[Any]:
    """The contract is uvicorn's: one event loop is enough."""
    return asyncio.SelectorEventLoop


class Application:
    """`/hello` answers, `/wait` when it is told to."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.running = 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan here"
        self.running += 1
        try:
            if scope["path"] == "/wait":
                await self.go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"hello"})
        except asyncio.CancelledError as exc:
            self.cancelled.append(str(exc))
            raise
        finally:
            self.running -= 1


async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
    for event in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{event}"
        await send({"type": f"lifespan.{event}.complete"})


async def fails_to_start(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("the lifespan's own trouble")


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What uvicorn logs as `uvicorn.error`, filtered where asgi.py filters: at the logger."""
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("uvicorn.error")

    def remember(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(remember)
    yield records
    logger.removeFilter(remember)
    logger.setLevel(level)


def configuration(app: Any, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(app, log_config=None, **options)


@contextlib.asynccontextmanager
async def serving(server: uvicorn.Server) -> AsyncIterator[Any]:
    """The server at work on a real socket; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.get_running_loop().create_task(server.serve(sockets=[listener.dup()]))
        await until(lambda: server.started, "it is started")
        yield listener.getsockname()
        server.should_exit = True
        await task


async def ask(address: Any, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request("GET", path))
    return reader, writer


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


# ── Config ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", _PASSED)
def test_config_takes_a_setting_under_the_same_name(name: str) -> None:
    assert name in inspect.signature(uvicorn.Config).parameters
    settings = Settings.create(app="module:app", workers=1)
    config = configuration("module:app", **{name: getattr(settings, name)})
    if getattr(settings, name) is not None:
        assert getattr(config, name) == getattr(settings, name)


def test_config_takes_headers_and_a_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "7")
    config = configuration(Application(), headers=[("X-Name", "value")], workers=1)
    assert config.workers == 1
    config.load()
    assert (b"x-name", b"value") in config.encoded_headers


def test_config_app_may_be_replaced_before_load(application: Application) -> None:
    config = configuration("no.such.module:app", proxy_headers=False)
    config.app = application
    config.load()
    assert config.loaded_app is application


def test_config_app_may_be_a_factory(application: Application) -> None:
    config = configuration("no.such.module:app", proxy_headers=False, factory=True)
    config.app = lambda: application
    config.load()
    assert config.loaded_app is application


def test_config_loop_may_be_a_factory() -> None:
    made: list[Loop] = []

    def factory() -> Loop:
        made.append(asyncio.SelectorEventLoop())
        return made[-1]

    class Server(uvicorn.Server):
        async def serve(self, sockets: Any = None) -> None:
            assert asyncio.get_running_loop() is made[0]
            assert sockets == ["the sockets"]

    config = configuration(Application())
    config.loop = factory  # type: ignore[assignment]
    # Not `serve`: the loop is made by `run`.
    Server(config).run(sockets=["the sockets"])  # type: ignore[list-item]
    assert len(made) == 1
    assert made[0].is_closed()


def test_import_errors_say_what_was_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportFromStringError, match=r'^Could not import module "no_such_module"\.$'):
        import_from_string("no_such_module:app")
    with pytest.raises(ImportFromStringError, match=r'^Attribute "no_such" not found in module "os"\.$'):
        import_from_string("os:no_such")
    assert import_from_string("os:path.join") is os.path.join
    assert import_from_string(os) is os


def test_an_import_error_within_the_application_is_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contract_broken.py").write_text("import no_such_module_either\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        import_from_string("contract_broken:app")


# ── Server ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeServer:
    """All that uvicorn wants of a server."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def close(self) -> None:
        self.calls.append("close")

    async def wait_closed(self) -> None:
        self.calls.append("wait_closed")


class FakeSocket:
    """All that uvicorn wants of a socket."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


async def test_startup_passes_each_socket_to_create_server(
    loop: Loop, application: Application, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    servers: list[FakeServer] = []

    async def create_server(*arguments: Any, **options: Any) -> FakeServer:
        calls.append((arguments, options))
        servers.append(FakeServer())
        return servers[-1]

    monkeypatch.setattr(loop, "create_server", create_server)
    config = configuration(application, backlog=77)
    server = uvicorn.Server(config)
    sockets = [FakeSocket(), FakeSocket()]
    task = loop.create_task(server.serve(sockets=sockets))  # type: ignore[arg-type]
    await until(lambda: server.started, "it is started")
    assert [options for _, options in calls] == [{"sock": sock, "ssl": None, "backlog": 77} for sock in sockets]
    for (factory,), _ in calls:
        # Called without arguments, while the loop runs.
        assert type(factory()) is config.http_protocol_class
    assert all(not sock.closed for sock in sockets)
    server.should_exit = True
    await task
    assert [server.calls for server in servers] == [["close", "wait_closed"]] * 2
    assert all(sock.closed for sock in sockets)


async def test_should_exit_is_read_while_it_runs(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    server = uvicorn.Server(configuration(application))
    async with serving(server) as address:
        reader, writer = await ask(address, "/hello")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        assert not server.should_exit
    await leave(writer)


async def test_its_time_limit_is_read_when_it_begins_to_wait(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    config = configuration(application, timeout_graceful_shutdown=None)
    server = uvicorn.Server(config)
    async with serving(server) as address:
        _, writer = await ask(address, "/wait")
        await until(lambda: application.running, "the request runs")
        config.timeout_graceful_shutdown = 0.0  # type: ignore[assignment]
    (error,) = [record for record in records if record.msg == CANCELLED]
    assert (error.levelno, error.args) == (logging.ERROR, (1,))
    await until(lambda: application.cancelled, "it is cancelled")
    await leave(writer)


async def test_without_time_it_says_that_it_cancels_nothing(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    config = configuration(application)
    async with serving(uvicorn.Server(config)):
        config.timeout_graceful_shutdown = 0.0  # type: ignore[assignment]
    (error,) = [record for record in records if record.msg == CANCELLED]
    assert (error.levelno, error.args) == (logging.ERROR, (0,))


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_the_tasks_are_the_running_requests(
    loop: Loop, application: Application, records: list[logging.LogRecord], http: str
) -> None:
    server = uvicorn.Server(configuration(application, http=http))
    async with serving(server) as address:
        assert server.server_state.tasks == set()
        _, writer = await ask(address, "/wait")
        await until(lambda: application.running, "the request runs")
        (task,) = server.server_state.tasks
        assert isinstance(task, asyncio.Task)
        task.cancel("the contract")
        await until(lambda: not server.server_state.tasks, "it has ended")
        assert application.cancelled == ["the contract"]
        await leave(writer)


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_the_total_counts_the_requests_that_are_done(
    loop: Loop, application: Application, records: list[logging.LogRecord], http: str
) -> None:
    server = uvicorn.Server(configuration(application, http=http))
    async with serving(server) as address:
        reader, writer = await ask(address, "/hello")
        await reader.readuntil(b"hello")
        _, waiting = await ask(address, "/wait")
        await until(lambda: application.running, "the second request runs")
        assert server.server_state.total_requests == 1
        application.go.set()
        await until(lambda: server.server_state.total_requests == 2, "it is counted when it is done")
        for each in (writer, waiting):
            await leave(each)


async def test_cutting_what_it_waits_for_ends_its_waiting(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    """A second, quick order comes while it waits without limit."""
    server = uvicorn.Server(configuration(application, timeout_graceful_shutdown=None))
    async with serving(server) as address:
        _, writer = await ask(address, "/wait")
        await until(lambda: application.running, "the request runs")
        server.should_exit = True
        waiting = "Waiting for connections to close. (CTRL+C to force quit)"
        await until(lambda: waiting in {record.msg for record in records}, "it waits")
        for connection in tuple(server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        for task in tuple(server.server_state.tasks):
            task.cancel()
    assert CANCELLED not in {record.msg for record in records}
    await leave(writer)


async def test_a_connection_can_be_told_to_shut_down(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    """One that is idle is closed."""
    server = uvicorn.Server(configuration(application))
    async with serving(server) as address:
        reader, writer = await ask(address, "/hello")
        await reader.readuntil(b"hello")
        (connection,) = server.server_state.connections
        connection.shutdown()
        assert await reader.read() == b""
        await leave(writer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_its_signal_handlers_can_be_replaced_once_it_is_started(
    loop: Loop, application: Application, records: list[logging.LogRecord], number: int
) -> None:
    before = signal.getsignal(number)
    heard: list[int] = []
    server = uvicorn.Server(configuration(application))
    async with serving(server):
        assert signal.getsignal(number) == server.handle_exit
        signal.signal(number, lambda number, frame: heard.append(number))
        os.kill(os.getpid(), number)
        await until(lambda: heard, "the handler is called")
        assert not server.should_exit
    # And it puts back what was there.
    assert signal.getsignal(number) is before


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


def said(records: list[logging.LogRecord]) -> set[str]:
    return {record.msg for record in records if record.levelno == logging.INFO}


async def test_nothing_but_the_chatter_is_said_at_start_and_stop(
    loop: Loop, application: Application, records: list[logging.LogRecord]
) -> None:
    async with serving(uvicorn.Server(configuration(with_lifespan, lifespan="on"))):
        pass
    server = uvicorn.Server(configuration(application))
    async with serving(server) as address:
        _, writer = await ask(address, "/wait")
        await until(lambda: application.running, "the request runs")
        server.should_exit = True
        # First it waits for the connection, then for what the application makes of its end.
        await until(lambda: any("connections to close" in text for text in said(records)), "it waits")
        await leave(writer)
        await until(lambda: any("background tasks" in text for text in said(records)), "it waits for the task")
        application.go.set()
    # All of it, and nothing else.
    assert said(records) == CHATTER
    assert {record.levelno for record in records} == {logging.INFO}


async def test_a_lifespan_that_fails_is_told_as_errors_before_it_exits(
    loop: Loop, records: list[logging.LogRecord]
) -> None:
    server = uvicorn.Server(configuration(fails_to_start, lifespan="on"))
    with pytest.raises(SystemExit) as caught:
        await server.serve(sockets=[])
    assert caught.value.code == STARTUP_FAILURE == 3
    errors = [record for record in records if record.levelno == logging.ERROR]
    assert [record.msg for record in errors] == [
        "Exception in 'lifespan' protocol\n",
        "Application startup failed. Exiting.",
    ]
    assert errors[0].exc_info is not None
    assert isinstance(errors[0].exc_info[1], RuntimeError)
    assert not server.started


def test_the_loggers_have_these_names() -> None:
    config = uvicorn.config.LOGGING_CONFIG
    assert set(config["loggers"]) == {"uvicorn", "uvicorn.error", "uvicorn.access"}
    assert config["disable_existing_loggers"] is False


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Transport(asyncio.Transport):
    """Knows addresses, and no socket: as a handed-over connection in its first turn."""

    def __init__(self, peername: Any, sockname: Any) -> None:
        super().__init__({"peername": peername, "sockname": sockname})


@pytest.mark.parametrize(
    ("peername", "sockname"),
    [(("192.0.2.1", 4711), ("192.0.2.2", 80)), (("2001:db8::1", 4711), ("2001:db8::2", 80))],
)
def test_addresses_are_pairs(peername: Any, sockname: Any) -> None:
    transport = Transport(peername, sockname)
    assert get_remote_addr(transport) == peername
    assert get_local_addr(transport) == sockname


def test_a_unix_socket_has_a_path_and_its_client_nothing() -> None:
    transport = Transport(None, "/run/x.sock")
    assert get_remote_addr(transport) is None
    assert get_local_addr(transport) == ("/run/x.sock", None)


def test_this_is_the_range_that_is_promised() -> None:
    major, minor, *_ = (int(number) for number in uvicorn.__version__.split("."))
    assert (0, 51) <= (major, minor) < (0, 60)
