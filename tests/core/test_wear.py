"""When a worker is worn, and that it stays so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.heartbeat import MISSED, SLOWEST, pace
from clusterserve.core.wear import Wear

MIB = 1 << 20


def test_without_limits_nothing_wears() -> None:
    wear = Wear()
    wear.count(10**9)
    wear.weigh(1 << 50)
    assert wear.reason(0.0, 1e9) == ""


def test_requests() -> None:
    wear = Wear(requests=100)
    wear.count(99)
    assert wear.reason(0.0, 1.0) == ""
    wear.count(103)
    assert wear.reason(0.0, 1.0) == "has served 103 requests"


def test_a_worker_that_counts_backwards_is_not_believed() -> None:
    wear = Wear(requests=100)
    wear.count(100)
    wear.count(0)
    assert wear.reason(0.0, 1.0) == "has served 100 requests"


def test_age_counts_from_when_it_listens() -> None:
    wear = Wear(lifetime=60.0)
    assert wear.reason(1000.0, 1059.9) == ""
    assert wear.reason(1000.0, 1060.0) == "has served for 60 s"


@given(st.floats(0, 1e9), st.floats(0.001, 1e6))
def test_age_is_due_at_the_very_deadline(since: float, lifetime: float) -> None:
    """Else a plan that is asked for again at its own deadline would find nothing to do, and a deadline that is over."""
    assert Wear(lifetime=lifetime).reason(since, since + lifetime)


def test_memory() -> None:
    wear = Wear(rss=512 * MIB)
    wear.weigh(512 * MIB)
    assert wear.reason(0.0, 1.0) == ""
    wear.weigh(600 * MIB)
    assert wear.reason(0.0, 1.0) == "holds 600 MiB of memory, more than 512"


def test_memory_must_be_too_much_several_times_in_a_row() -> None:
    wear = Wear(rss=MIB, samples=3)
    for rss in (2, 2, 1, 2, 2):
        wear.weigh(rss * MIB)
        assert wear.reason(0.0, 1.0) == ""
    wear.weigh(3 * MIB)
    assert wear.reason(0.0, 1.0) == "holds 3 MiB of memory, more than 1"


@given(
    st.lists(
        st.one_of(st.tuples(st.just("count"), st.integers(0, 30)), st.tuples(st.just("weigh"), st.integers(0, 30)))
    )
)
def test_once_worn_always_worn(facts: list[tuple[str, int]]) -> None:
    wear = Wear(requests=20, lifetime=50.0, rss=20, samples=2)
    worn = False
    for now, (what, value) in enumerate(facts):
        getattr(wear, what)(value)
        assert wear.reason(0.0, float(now)) or not worn
        worn = worn or bool(wear.reason(0.0, float(now)))


@pytest.mark.parametrize(("timeout", "seconds"), [(30.0, 1.0), (4.0, 1.0), (2.0, 0.5), (0.4, 0.1), (0.0, 1.0)])
def test_the_pace_of_heartbeats(timeout: float, seconds: float) -> None:
    assert pace(timeout) == pytest.approx(seconds)
    assert pace(timeout) <= SLOWEST
    assert not timeout or pace(timeout) <= timeout / MISSED
