"""What a worker tells of its tasks and threads."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator

from clusterserve.worker.stacks import tasks, thread_names


async def innermost(gate: asyncio.Event) -> None:
    await gate.wait()


async def numbers(gate: asyncio.Event) -> AsyncIterator[int]:
    await innermost(gate)
    yield 1


async def loops(gate: asyncio.Event) -> None:
    async for _ in numbers(gate):
        pass


def told_by(*coroutines: str, count: int = 1) -> str:
    async def main() -> str:
        gate = asyncio.Event()
        each = [globals()[name](gate) for name in coroutines for _ in range(count)]
        waiting = [asyncio.create_task(coroutine, name=f"n{number}") for number, coroutine in enumerate(each)]
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        text = tasks([loop])
        gate.set()
        await asyncio.gather(*waiting)
        return text

    return asyncio.run(main())


def test_the_innermost_call_comes_first() -> None:
    text = told_by("innermost")
    found = re.search(
        r"^Task n0 \(most recent call first\):\n  File .* in wait\n  File .* in innermost$", text, re.MULTILINE
    )
    assert found, text


def test_an_asynchronous_generator_is_followed() -> None:
    # What stands between an async for and its generator is made in C, and shows nothing of what is behind it.
    assert re.search(r"^Task n0 .*\n(?:  File .*\n)*?  File .* in loops$", told_by("loops"), re.MULTILINE)


def test_tasks_at_the_same_place_are_one_entry() -> None:
    text = told_by("innermost", count=50)
    assert len(re.findall(r" in innermost$", text, re.MULTILINE)) == 1
    assert "Task n0, n1, n10 and 47 more (most recent" in text


def test_it_is_bounded() -> None:
    async def main() -> str:
        namespace: dict[str, object] = {}
        for number in range(600):
            exec(f"async def {'f' * 200}{number}(gate):\n    await gate.wait()", namespace)  # a place for each
        gate = asyncio.Event()
        each = [namespace[f"{'f' * 200}{number}"] for number in range(600)]
        waiting = [asyncio.create_task(function(gate)) for function in each]  # type: ignore[operator]
        await asyncio.sleep(0)
        text = tasks([asyncio.get_running_loop()])
        gate.set()
        await asyncio.gather(*waiting)
        return text

    text = asyncio.run(main())
    assert len(text) < 101_000
    assert text.endswith("\n  ... and more than can be told here")


def test_threads_by_the_number_that_faulthandler_writes() -> None:
    name = threading.current_thread().name
    assert thread_names()[f"{threading.get_ident():016x}"] == name
