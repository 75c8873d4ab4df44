"""Where a program's handlers run."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from clusterserve.master import home as module
from clusterserve.master.home import Home
from tests.helpers.waiting import DEADLINE, eventually


def test_a_thread_of_its_own_calls_in_order_and_to_the_end() -> None:
    told: list[object] = []
    home = Home()
    home.post(told.append, "before it was started")
    home.start()
    for number in range(100):
        home.post(told.append, number)
    home.post(lambda: told.append(threading.current_thread().name))
    home.post(lambda: told.append(home.is_here))
    assert not home.is_here
    home.finish(DEADLINE)
    assert told == ["before it was started", *range(100), "clusterserve-events", True]
    assert not home.is_open
    # Nobody is left to run it: the books are kept all the same, here.
    home.post(told.append, "late")
    assert told[-1] == "late"
    home.finish(DEADLINE)


def test_one_that_was_never_started_leaves_nothing() -> None:
    home = Home()
    home.finish()
    assert not home.is_open


def test_it_may_be_ended_by_what_it_calls() -> None:
    home = Home()
    home.start()
    done = threading.Event()

    def end() -> None:
        home.finish()
        done.set()

    home.post(end)
    assert done.wait(DEADLINE)
    home.finish(DEADLINE)
    assert not home.is_open


def test_coroutines_get_to_their_end_and_those_without_one_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_WORDS", 0.2)
    told: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def ends() -> None:
        await asyncio.sleep(0.01)
        told.append("ended")

    async def never_ends() -> None:
        await asyncio.Event().wait()

    home = Home()
    home.start()
    for function in (ends, never_ends):
        home.post(lambda function=function: tasks.append(asyncio.get_running_loop().create_task(function())))
    home.finish(DEADLINE)
    assert told == ["ended"]
    assert [task.cancelled() for task in tasks] == [False, True]


def test_who_tries_to_end_the_program_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    home = Home()
    home.start()
    told: list[str] = []

    def leave() -> None:
        raise SystemExit(5)

    home.post(leave)
    home.post(told.append, "goes on")
    eventually(lambda: told, "what comes after it is told")
    home.finish(DEADLINE)
    assert "A handler tried to end the program" in caplog.messages


def test_one_that_does_not_return_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    home = Home()
    home.start()
    go = threading.Event()
    home.post(go.wait, DEADLINE)
    home.finish(0.01)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    go.set()
    home.finish(DEADLINE)
    assert not home.is_open


def test_somebody_elses_loop() -> None:
    told: list[object] = []

    async def main() -> Home:
        home = Home(asyncio.get_running_loop())
        home.start()
        assert home.is_here
        heard = asyncio.Event()
        home.post(told.append, "one")
        threading.Thread(target=home.post, args=(heard.set,)).start()
        await asyncio.wait_for(heard.wait(), DEADLINE)
        home.finish()
        assert home.is_open
        return home

    home = asyncio.run(main())
    assert not home.is_open
    home.post(told.append, "two")
    assert told == ["one", "two"]
