"""What all workers count in: never more than the limit, whoever runs when, and nobody is turned away for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.channel.tally import WANT, Crowd, Places, Tally
from tests.helpers.waiting import DEADLINE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def places() -> Iterator[Places]:
    places = Places()
    yield places
    places.close()


def crowds(places: Places, count: int, limit: int) -> list[Crowd]:
    return [Crowd(places.tally, places.take(100 + number), limit) for number in range(count)]


def test_all_together_are_let_in_up_to_the_limit(places: Places) -> None:
    first, second = crowds(places, 2, 3)
    assert [first.enter(), second.enter(), first.enter(), second.enter(), first.enter()] == [True] * 3 + [False] * 2
    second.leave()
    assert first.enter()
    assert not second.enter()


def test_what_a_dead_one_had_in_progress_is_over(places: Places) -> None:
    dead, alive = crowds(places, 2, 2)
    assert dead.enter()
    assert dead.enter()
    # It was about to begin another.
    places.tally.cells[1] |= WANT
    assert not alive.enter()
    places.free(100)
    assert alive.enter()


def test_two_workers_of_one_slot_have_a_place_each(places: Places) -> None:
    assert [places.take(worker) for worker in (1, 2, 3)] == [0, 1, 2]
    places.free(2)
    assert [places.take(4), places.take(5)] == [1, 3]


def test_who_was_there_first_sees_who_came_later(places: Places) -> None:
    (old,) = crowds(places, 1, 1)
    assert old.enter()
    old.leave()
    new = Crowd(places.tally, places.take(7), 1)
    assert new.enter()
    assert not old.enter()


def test_it_takes_no_memory_that_is_not_used(places: Places) -> None:
    places.tally.cells[1000] = 1
    assert os.fstat(places.tally.fd).st_blocks * 512 <= 2 * os.sysconf("SC_PAGESIZE")


class Turns:
    """Threads that run one step at a time, in the order that was drawn, then in turn."""

    def __init__(self, order: Sequence[int], count: int) -> None:
        self._order, self._alive = list(order), set(range(count))
        self._turn = threading.Condition()
        self._next = self._draw()
        self.who = threading.local()

    def _draw(self) -> int:
        while self._order:
            drawn = self._order.pop(0)
            if drawn in self._alive:
                return drawn
        later = [number for number in self._alive if number > getattr(self, "_next", -1)]
        return min(later or self._alive, default=-1)

    def step(self) -> None:
        """Wait until it is this thread's turn."""
        with self._turn:
            self._next = self._draw()
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: self._next == self.who.number, DEADLINE)

    def run(self, work: Callable[[int], None]) -> None:
        def body(number: int) -> None:
            self.who.number = number
            with self._turn:
                assert self._turn.wait_for(lambda: self._next == number, DEADLINE)
            try:
                work(number)
            finally:
                with self._turn:
                    self._alive.discard(number)
                    self._next = self._draw()
                    self._turn.notify_all()

        threads = [threading.Thread(target=body, args=(number,)) for number in tuple(self._alive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class SteppedCells(list[int]):
    """Cells every access to which is a step of its own."""

    def __init__(self, values: list[int], step: Callable[[], None], base: SteppedCells | None = None) -> None:
        super().__init__(values)
        self.step, self.base = step, base

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SteppedCells(list(range(index.start, index.stop)), self.step, self)
        self.step()
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.step()
        super().__setitem__(index, value)

    def __iter__(self) -> Iterator[int]:
        assert self.base is not None
        return (self.base[index] for index in super().__iter__())


@given(
    order=st.lists(st.integers(0, 3), max_size=120),
    inside=st.integers(0, 2),
    room=st.integers(0, 3),
    count=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_in_whatever_order_they_run(order: list[int], inside: int, room: int, count: int) -> None:
    """Of those who want to begin at the same time as many do as there is room for: not one more, and not one less."""
    turns = Turns(order, count)
    limit = inside + room
    # One more worker has `inside` in progress, and does nothing.
    cells = SteppedCells([count + 1, *([0] * count), inside], turns.step)
    tally = cast("Tally", SimpleNamespace(cells=cells))
    entered: list[bool] = [False] * count
    if not limit:
        return

    def enter(number: int) -> None:
        entered[number] = Crowd(tally, number, limit).enter()

    turns.run(enter)
    assert sum(entered) == min(room, count)
    assert list(list.__iter__(cells)) == [count + 1, *map(int, entered), inside]


@pytest.mark.parametrize("limit", [1, 3])
def test_many_processes_at_once(places: Places, limit: int) -> None:
    count = 4
    tokens = os.eventfd(limit, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    gate, opens = os.pipe()
    processes = []
    for worker in range(count):
        numbers = (places.tally.fd, tokens, gate, places.take(worker), limit)
        words = [sys.executable, "-m", "tests.helpers.rush", *map(str, numbers)]
        fds = (places.tally.fd, tokens, gate)
        processes.append(subprocess.Popen(words, cwd=ROOT, pass_fds=fds, stdout=subprocess.PIPE, text=True))
    for fd in (opens, gate):
        os.close(fd)
    told = [tuple(map(int, process.communicate(timeout=DEADLINE)[0].split())) for process in processes]
    os.close(tokens)
    assert sum(exceeded for _, exceeded in told) == 0
    # How often depends on who had a processor when; nothing stays behind.
    assert sum(entered for entered, _ in told) > 0
    assert sum(places.tally.cells[1 : 1 + count]) == 0
