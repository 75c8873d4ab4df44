"""Signals that end a run, turned into exceptions that unwind it, and kept off the few steps that must not be cut."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def install() -> None:
    """Let TERM and HUP unwind the run as Ctrl-C does, so that every `finally` stops what it started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)


@contextmanager
def held() -> Iterator[None]:
    """Keep the ending signals until the end of the block, which has to be short or bounded."""
    arrived: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, remember) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
