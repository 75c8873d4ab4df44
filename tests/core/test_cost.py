"""What a request costs: which applications are worth a hand-off, and how many of their requests begin at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.cost import CHEAP, Cost


def after(*times: float, requests: int = 1) -> Cost:
    cost = Cost()
    for seconds in times:
        cost.took(seconds, requests)
    return cost


def test_it_starts_as_free() -> None:
    assert Cost().cheap
    assert Cost().batch == 16


@pytest.mark.parametrize(("seconds", "cheap"), [(CHEAP / 2, True), (CHEAP * 0.99, True), (CHEAP * 1.5, False)])
def test_what_they_all_take_decides(seconds: float, cheap: bool) -> None:
    assert after(*[seconds] * 200).cheap is cheap


def test_a_batch_is_shared_by_its_requests() -> None:
    assert after(*[CHEAP * 8] * 200, requests=16).cheap
    assert not after(*[CHEAP * 8] * 200, requests=4).cheap


def test_one_outlier_makes_nothing_expensive() -> None:
    """What lies behind it is taken back; for the others nothing has changed."""
    assert after(*[0.00005] * 100, 0.150).cheap
    assert after(*[0.00005] * 100, 0.150, 0.150, 0.150).cheap


def test_expensive_is_not_for_ever() -> None:
    cost = after(*[0.150] * 100)
    assert not cost.cheap
    for _ in range(100):
        cost.took(0.00005, 1)
    assert cost.cheap


@given(st.floats(0.0, 1.0))
def test_a_batch_holds_the_loop_no_longer_than_one_that_is_cheap(seconds: float) -> None:
    cost = after(*[seconds] * 50)
    assert 1 <= cost.batch <= 16
    assert cost.batch == 1 or cost.batch * cost.average <= CHEAP
