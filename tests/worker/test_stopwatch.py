"""How long something held the loop, by a clock that is stopped while it is somebody else's turn."""

from __future__ import annotations

import time

from clusterserve.worker import stopwatch as module
from clusterserve.worker.stopwatch import EXACT, Stopwatch


def cheap(stopwatch: Stopwatch) -> None:
    """Something that takes next to no time, however busy the machine is."""
    before = None
    while before is None or stopwatch.spent - before > module._DOUBTFUL / 2:
        before = stopwatch.spent
        stopwatch.start()
        stopwatch.stop()


def test_what_passes_while_it_runs_adds_up() -> None:
    stopwatch = Stopwatch()
    for _ in range(2):
        stopwatch.start()
        time.sleep(0.01)
        stopwatch.stop()
    assert stopwatch.spent >= 0.02


def test_what_passes_while_it_stands_does_not_count() -> None:
    stopwatch = Stopwatch()
    cheap(stopwatch)
    before = stopwatch.spent
    time.sleep(0.01)
    stopwatch.stop()
    assert stopwatch.spent == before


def test_a_long_time_out_of_the_blue_counts_little_and_the_next_in_full() -> None:
    stopwatch = Stopwatch()
    for _ in range(EXACT):
        cheap(stopwatch)
    stopwatch.spent = 0.0
    stopwatch.start()
    time.sleep(0.01)
    stopwatch.stop()
    assert stopwatch.spent == module._DOUBTFUL
    stopwatch.start()
    time.sleep(0.01)
    stopwatch.stop()
    assert stopwatch.spent >= 0.01
