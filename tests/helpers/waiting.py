"""The one place where a test waits: for something it can observe, until a deadline that only failing tests meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Two cores that are busy with ten times as much must fit in; a passing test never notices how long it is.
DEADLINE = 40.0
# Between two questions, of which some read all of /proc: the first ones follow at once, the later ones leave the
# processor to what they ask about.
_PAUSE = 0.005
_LONGEST_PAUSE = 0.05


def eventually(predicate: Callable[[], T], what: str, *, within: float = DEADLINE) -> T:
    """Ask again and again until the answer is true, and return it."""
    deadline, pause = time.monotonic() + within, _PAUSE
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {what} (last answer: {answer!r})")
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 1.5)
    return answer
