"""How a worker's application and log learn that it leaves; the contracts with uvicorn among them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from clusterserve.worker.draining import CANCELLED, LOOK, NAMED, RAISED, Draining

Scope = dict[str, Any]


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What uvicorn's logger says."""
    logger = logging.getLogger("uvicorn.error")
    handler, propagate, level = Handler(), logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield handler.said
    logger.removeHandler(handler)
    logger.propagate = propagate
    logger.setLevel(level)


class Cycle:
    """As uvicorn runs a request."""

    def __init__(self, scope: Scope | None) -> None:
        self.scope = scope

    async def run_asgi(self) -> None:
        try:
            await asyncio.Event().wait()
        except BaseException:
            logging.getLogger("uvicorn.error").exception(RAISED)


def logged(draining: Draining, message: str, *args: object, exc: BaseException | None = None) -> bool:
    info = None if exc is None else (type(exc), exc, None)
    return draining.filter(logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, message, args, info))


class TestTheExtension:
    def test_every_scope_has_it(self) -> None:
        draining = Draining(set(), worker=7, slot=2)
        seen: list[Scope] = []

        async def app(scope: Scope, receive: str, send: str) -> str:
            seen.append(scope)
            return f"{receive} {send}"

        call = draining.announced(app)
        websocket = {"type": "websocket", "extensions": {"websocket.http.response": {}}}
        for scope in ({"type": "http"}, {"type": "http"}, websocket):
            assert asyncio.run(call(scope, "receive", "send")) == "receive send"
        told = {"draining": draining.event, "stopping": draining.stopping, "worker": 7, "slot": 2}
        assert [each["extensions"]["clusterserve"] for each in seen] == [told] * 3
        assert "websocket.http.response" in seen[2]["extensions"]
        # What somebody adds to one is not in the other.
        assert seen[0]["extensions"] is not seen[1]["extensions"]

    def test_no_coroutine_of_ours_stands_in_between(self) -> None:
        async def app(scope: Scope, receive: str, send: str) -> None:
            pass

        coroutine = Draining(set()).announced(app)({"type": "http"}, "", "")
        assert coroutine.cr_code is app.__code__
        coroutine.close()

    def test_uvicorn_serves_the_application_that_takes_the_place_of_the_loaded_one(self) -> None:
        """`config.loaded_app` is looked up by each connection, and by the lifespan."""

        async def app(scope: Scope, receive: Any, send: Any) -> None:
            pass

        async def other(scope: Scope, receive: Any, send: Any) -> None:
            pass

        async def look() -> None:
            config = uvicorn.Config(app, log_config=None)
            config.load()
            config.loaded_app = other
            server = uvicorn.Server(config)
            assert config.loaded
            for kind in (config.http_protocol_class, config.ws_protocol_class):
                protocol: Any = kind(config=config, server_state=server.server_state, app_state={})  # type: ignore[misc, call-arg]
                assert protocol.app is other

        asyncio.run(look())


def test_the_event() -> None:
    draining = Draining(set())
    assert not draining.event.is_set()
    draining.begin()
    draining.begin()
    assert draining.event.is_set()


class TestWhatIsCutOff:
    def run(self, draining: Draining, cycles: list[Any], tasks: set[asyncio.Task[None]], turns: int = 1) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            running = [loop.create_task(cycle.run_asgi()) for cycle in cycles]
            tasks.update(running)
            await asyncio.sleep(0)
            assert logged(draining, CANCELLED, len(tasks))
            for task in running:
                task.cancel()
            await asyncio.wait(running)

        asyncio.run(main())

    def test_it_is_named(self, said: list[str]) -> None:
        tasks: set[asyncio.Task[None]] = set()
        scopes: list[Scope | None] = [
            {"type": "http", "method": "GET", "path": "/a\nb"},
            {"type": "websocket", "path": "/chat"},
            None,
        ]
        self.run(Draining(tasks), [Cycle(scope) for scope in scopes], tasks)
        cut = " is cut off: it has been running for 0 s, beyond the grace time"
        assert {line for line in said if "cut off" in line} == {
            f"GET /a%0Ab{cut}",
            f"WebSocket /chat{cut}",
            f"A request{cut}",
        }

    def test_there_are_many(self, said: list[str]) -> None:
        tasks: set[asyncio.Task[None]] = set()
        scope = {"type": "http", "method": "GET", "path": "/"}
        self.run(Draining(tasks), [Cycle(scope) for _ in range(NAMED + 7)], tasks)
        lines = [line for line in said if "cut off" in line]
        assert len(lines) == NAMED + 1
        assert lines[-1] == "7 more requests are cut off"

    def test_its_age(self, said: list[str]) -> None:
        """Counted from the first look at it, and the oldest first."""
        tasks: set[asyncio.Task[None]] = set()
        draining = Draining(tasks)

        class Loop(asyncio.SelectorEventLoop):
            skew = 0.0

            def time(self) -> float:
                return super().time() + self.skew

        async def main(loop: Loop) -> None:
            for path in ("/old", "/new"):
                tasks.add(loop.create_task(Cycle({"method": "GET", "path": path}).run_asgi()))
                draining.watch(loop)
                loop.skew += 40 * LOOK
                await asyncio.sleep(0)
            logged(draining, CANCELLED, 2)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        loop = Loop()
        try:
            loop.run_until_complete(main(loop))
        finally:
            loop.close()
        ages = [line.split(" is cut off: it has been running for ") for line in said if "cut off" in line]
        assert [(name, int(rest.split()[0])) for name, rest in ages] == [("GET /old", 80), ("GET /new", 40)]


class TestTheTraceback:
    def test_of_what_was_cut_is_left_out(self) -> None:
        async def main() -> None:
            draining = Draining(set())
            assert logged(draining, RAISED, exc=asyncio.CancelledError())
            draining.cut()
            assert not logged(draining, RAISED, exc=asyncio.CancelledError())
            # The application's own trouble is told, and so is everything else.
            assert logged(draining, RAISED, exc=ValueError("trouble"))
            assert logged(draining, RAISED)
            assert logged(draining, "anything else", exc=asyncio.CancelledError())

        asyncio.run(main())

    def test_cutting_cancels_what_is_running(self) -> None:
        async def main() -> None:
            tasks = {asyncio.ensure_future(asyncio.Event().wait()) for _ in range(3)}
            draining = Draining(tasks)  # type: ignore[arg-type]
            await asyncio.sleep(0)
            draining.cut()
            done, _ = await asyncio.wait(tasks)
            assert all(task.cancelled() for task in done)

        asyncio.run(main())
