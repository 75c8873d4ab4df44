"""The one place where a test waits: for something it can observe, until a deadline that only failing tests meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Two cores that are busy with ten times as much must fit in; a passing test never notices how long it is.
DEADLINE = 40.0
_PAUSE = 0.005


def eventually(predicate: Callable[[], T], what: str, *, within: float = DEADLINE) -> T:
    """Ask again and again until the answer is true, and return it."""
    deadline = time.monotonic() + within
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {what} (last answer: {answer!r})")
        time.sleep(_PAUSE)
    return answer
