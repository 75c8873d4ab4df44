"""The thread that tells of events."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterserve.core.events import BecameReady, Scaled, StartedReload, Stopped
from clusterserve.master.events import MOST_WAITING, EventThread
from tests.helpers.waiting import DEADLINE, eventually

Start = Callable[..., EventThread]


@pytest.fixture
def start() -> Iterator[Start]:
    threads: list[EventThread] = []

    def start(**listeners: Callable[..., Any]) -> EventThread:
        thread = EventThread(lambda: {name: [listener] for name, listener in listeners.items()})
        thread.start()
        threads.append(thread)
        return thread

    yield start
    for thread in threads:
        thread.finish(DEADLINE)
        assert not thread._thread.is_alive()


def test_it_tells_in_order_on_one_thread_that_is_not_ours(start: Start) -> None:
    told: list[Any] = []
    names: set[str] = set()

    def plain(workers: int, before: int) -> None:
        names.add(threading.current_thread().name)
        told.append((workers, before))

    async def coroutine() -> None:
        names.add(threading.current_thread().name)
        # However long it takes, what comes after it waits.
        await asyncio.sleep(0.01)
        told.append("ready")

    thread = start(scale=plain, ready=coroutine)
    for number in range(50):
        thread.emit(Scaled(number + 1, number))
        thread.emit(BecameReady())
        # Nobody listens to this one.
        thread.emit(StartedReload())
    thread.finish(DEADLINE)
    assert told == [each for number in range(50) for each in ((number + 1, number), "ready")]
    assert names == {"clusterserve-events"}
    # Nobody is left to hear it, and nobody minds.
    thread.emit(BecameReady())
    assert len(told) == 100


def test_several_listen_to_one_event() -> None:
    told: list[str] = []
    thread = EventThread(lambda: {"ready": [lambda: told.append("one"), lambda: told.append("two")]})
    thread.start()
    thread.emit(BecameReady())
    thread.finish(DEADLINE)
    assert told == ["one", "two"]


@pytest.mark.parametrize("trouble", [RuntimeError("its own trouble"), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_one_that_raises_harms_nothing(
    start: Start, caplog: pytest.LogCaptureFixture, trouble: BaseException, kind: str
) -> None:
    told: list[str] = []

    def plain() -> None:
        raise trouble

    async def coroutine() -> None:
        raise trouble

    thread = start(ready=plain if kind == "plain" else coroutine, stopped=lambda: told.append("stopped"))
    thread.emit(BecameReady())
    thread.emit(Stopped())
    thread.finish(DEADLINE)
    assert told == ["stopped"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().endswith(f"{kind} of {__name__} raised")
    assert record.exc_info is not None
    assert record.exc_info[1] is trouble
    # The traceback is the listener's, from its first line.
    assert record.exc_info[2] is not None
    assert record.exc_info[2].tb_frame.f_code.co_name == kind


def test_one_that_blocks_delays_only_those_behind_it(start: Start) -> None:
    go, blocked = threading.Event(), threading.Event()
    told: list[str] = []

    def block() -> None:
        blocked.set()
        assert go.wait(DEADLINE)
        told.append("blocked")

    thread = start(ready=block, reload=lambda: told.append("reload"))
    thread.emit(BecameReady())
    assert blocked.wait(DEADLINE)
    # Returns, though nobody listens now.
    thread.emit(StartedReload())
    assert told == []
    go.set()
    thread.finish(DEADLINE)
    assert told == ["blocked", "reload"]


def test_what_a_coroutine_leaves_running_goes_on_between_events(start: Start) -> None:
    done = threading.Event()
    tasks = []

    async def ready() -> None:
        async def later() -> None:
            await asyncio.sleep(0.01)
            done.set()

        tasks.append(asyncio.create_task(later()))

    start(ready=ready).emit(BecameReady())
    assert done.wait(DEADLINE)


def test_one_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    go, hangs = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        go.wait(DEADLINE)

    thread = EventThread(lambda: {"ready": [hang]})
    thread.start()
    thread.emit(BecameReady())
    assert hangs.wait(DEADLINE)
    began = time.monotonic()
    thread.finish(0.01)
    assert time.monotonic() - began < DEADLINE / 2
    assert "hang of" in caplog.messages[0]
    assert caplog.messages[0].endswith("did not return within 0.01 s and is left behind")
    go.set()
    thread.finish(DEADLINE)
    assert not thread._thread.is_alive()


def test_there_is_a_limit_to_what_waits(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    go, blocked = threading.Event(), threading.Event()
    told: list[int] = []

    def block() -> None:
        blocked.set()
        go.wait(DEADLINE)

    thread = start(ready=block, scale=lambda workers, before: told.append(workers))
    thread.emit(BecameReady())
    assert blocked.wait(DEADLINE)
    for number in range(MOST_WAITING + 7):
        thread.emit(Scaled(number, number))
    assert len(caplog.records) == 1
    assert f"{MOST_WAITING} events wait, and more are lost" in caplog.messages[0]
    go.set()
    eventually(lambda: len(told) == MOST_WAITING, "what has waited is told")
    thread.emit(Scaled(-1, -1))
    thread.finish(DEADLINE)
    assert told == [*range(MOST_WAITING), -1]


@pytest.mark.parametrize("trouble", [ValueError("trouble"), SystemExit(1)])
def test_what_keeps_the_listeners_from_being_loaded(trouble: BaseException) -> None:
    def load() -> Any:
        assert threading.current_thread().name == "clusterserve-events"
        raise trouble

    thread = EventThread(load)
    with pytest.raises(type(trouble)) as caught:
        thread.start()
    assert caught.value is trouble
    thread.finish(DEADLINE)


def test_a_task_that_would_end_the_program(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    tasks = []
    told: list[str] = []

    async def leave() -> None:
        raise SystemExit(5)

    async def ready() -> None:
        tasks.append(asyncio.create_task(leave()))
        await asyncio.sleep(0)

    thread = start(ready=ready, reload=lambda: told.append("reload"))
    thread.emit(BecameReady())
    eventually(lambda: "A task of a listener's tried to end the program" in caplog.messages, "it is told")
    thread.emit(StartedReload())
    eventually(lambda: told == ["reload"], "events are told as before")


def test_what_is_still_running_is_cancelled_at_the_end(start: Start) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def ready() -> None:
        tasks.append(asyncio.create_task(asyncio.Event().wait()))

    thread = start(ready=ready)
    thread.emit(BecameReady())
    thread.finish(DEADLINE)
    assert tasks[0].cancelled()
