"""Tests that are coroutines, on both event loops.  A conftest takes what it needs from here by name."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from tests.helpers.waiting import DEADLINE

T = TypeVar("T")

LOOPS: dict[str, type[Any]] = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.Loop}

# The first loop of libuv opens a pipe for signals, which the process keeps.
uvloop.Loop().close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine runs on the loop of its `loop` fixture."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    loop: asyncio.AbstractEventLoop = pyfuncitem.funcargs["loop"]
    loop.run_until_complete(asyncio.wait_for(pyfuncitem.obj(**arguments), DEADLINE))
    return True


@pytest.fixture(params=LOOPS)
def loop_class(request: pytest.FixtureRequest) -> type[Any]:
    """The class of event loop under test."""
    return LOOPS[request.param]


@pytest.fixture
def complaints() -> list[dict[str, Any]]:
    """What the loop's exception handler was told; a test that expects something clears it."""
    return []


@pytest.fixture
def loop(loop_class: type[Any], complaints: list[dict[str, Any]]) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop, on which nothing may go wrong unnoticed."""
    with running(loop_class(), complaints) as loop:
        yield loop


@contextlib.contextmanager
def running(loop: asyncio.AbstractEventLoop, complaints: list[dict[str, Any]]) -> Iterator[asyncio.AbstractEventLoop]:
    """Closes `loop` at the end, and wants that nobody complained."""
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield loop
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        # Transports that were closed in the last turn get theirs to close their sockets.
        loop.run_until_complete(turns(3))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    assert complaints == []


async def turns(number: int) -> None:
    """Let the loop turn `number` times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def until(predicate: Callable[[], T], what: str) -> T:
    """As `eventually`, for the side that shares its loop with what it waits for.  The test's own deadline ends it."""
    try:
        answer = predicate()
        while not answer:
            await turns(1)
            answer = predicate()
    except asyncio.CancelledError:
        raise AssertionError(f"not in time: {what} (last answer: {answer!r})") from None
    return answer
