"""Schedules: a mix is read as it is meant, and the same seed gives the same requests."""

from __future__ import annotations

import pytest

from benchmarks.schedule import Mix, poisson

MIX = Mix.parse("0.95:2,0.05:150")


def test_a_mix() -> None:
    assert MIX.parts == ((0.95, 0.002), (0.05, 0.15))
    assert MIX.mean == pytest.approx(0.0094)
    assert str(MIX) == "0.95:2,0.05:150"


@pytest.mark.parametrize("text", ["", "1", "0.5:2", "0.5:2,0.6:3", "1:x", "1:-2", "-1:2,2:2", "1:nan", "1:inf", "1:2,"])
def test_no_mix(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Mix.parse(text)


def test_a_schedule_is_its_seed() -> None:
    first = poisson(MIX, 500, 4, "7")
    assert first == poisson(MIX, 500, 4, "7")
    assert first != poisson(MIX, 500, 4, "8")


def test_arrivals_ascend_within_the_time_at_about_the_rate() -> None:
    schedule = poisson(MIX, 500, 40, "1")
    assert list(schedule.arrivals) == sorted(schedule.arrivals)
    assert 0 < schedule.arrivals[0] < schedule.arrivals[-1] < 40
    # The deviation of 20,000 such arrivals is 141.
    assert len(schedule) == pytest.approx(20_000, abs=700)
    assert sum(service == 0.15 for service in schedule.services) == pytest.approx(1000, abs=160)
