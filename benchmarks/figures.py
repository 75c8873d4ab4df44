"""Latencies, boiled down: the mean and the percentiles of one run, and the median of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Figures:
    """In the unit of the latencies they are of."""

    mean: float
    p50: float
    p90: float
    p99: float
    p999: float


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest of the values that at least `percent` of them do not exceed (the nearest rank)."""
    if not ascending:
        raise ValueError("nothing has no percentile")
    # Rounded first, as 99.9 / 100 × 1000 is a little more than 999.
    rank = math.ceil(round(percent / 100 * len(ascending), 9))
    return ascending[max(rank, 1) - 1]


def figures(latencies: Sequence[float]) -> Figures:
    ascending = sorted(latencies)
    return Figures(statistics.fmean(ascending), *(percentile(ascending, percent) for percent in (50, 90, 99, 99.9)))


def typical(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over the rounds."""
    return Figures(*(statistics.median(values) for values in zip(*map(astuple, rounds), strict=True)))
