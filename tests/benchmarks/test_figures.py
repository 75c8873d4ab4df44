"""Percentiles, by nearest rank."""

from __future__ import annotations

import pytest

from benchmarks.figures import Figures, figures, percentile, typical


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(number) for number in range(1, 1001)]
    assert [percentile(values, percent) for percent in (0, 50, 90, 99, 99.9, 100)] == [1, 500, 900, 990, 999, 1000]
    assert percentile([4.0], 99.9) == 4.0
    assert percentile([1.0, 2.0], 50) == 1.0


def test_nothing_has_none() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


def test_figures_of_a_run_and_of_runs() -> None:
    assert figures([3.0, 1.0, 2.0]) == Figures(2.0, 2.0, 3.0, 3.0, 3.0)
    runs = [Figures(*[float(number)] * 5) for number in (9, 1, 2)]
    assert typical(runs) == Figures(2.0, 2.0, 2.0, 2.0, 2.0)
