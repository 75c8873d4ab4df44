"""The single queue: by hand, and against the formula where there is one."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.schedule import Schedule
from benchmarks.theory import single_queue, with_path


def test_by_hand() -> None:
    schedule = Schedule((0.0, 1.0, 2.0, 3.0), (10.0, 10.0, 1.0, 1.0))
    # The third waits for the first (2 → 10), the fourth follows it or the second (both at 11).
    assert single_queue(schedule, 2) == [10.0, 10.0, 9.0, 9.0]
    assert single_queue(schedule, 4) == [10.0, 10.0, 1.0, 1.0]
    assert single_queue(schedule, 1) == [10.0, 19.0, 19.0, 19.0]


def test_one_server_with_exponential_times_is_what_the_textbook_says() -> None:
    chance = random.Random(1)
    now, arrivals, services = 0.0, [], []
    for _ in range(400_000):
        now += chance.expovariate(0.5)
        arrivals.append(now)
        services.append(chance.expovariate(1.0))
    mean = statistics.fmean(single_queue(Schedule(tuple(arrivals), tuple(services)), 1))
    # M/M/1: 1 / (service rate - arrival rate).
    assert mean == pytest.approx(2.0, rel=0.03)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), max_size=60), st.integers(1, 5))
def test_one_more_server_harms_nobody(requests: list[tuple[float, float]], servers: int) -> None:
    arrivals, now = [], 0.0
    for gap, _ in requests:
        now += gap
        arrivals.append(now)
    schedule = Schedule(tuple(arrivals), tuple(service for _, service in requests))
    few, more = single_queue(schedule, servers), single_queue(schedule, servers + 1)
    for with_few, with_more, service in zip(few, more, schedule.services, strict=True):
        assert service - 1e-9 <= with_more <= with_few + 1e-9


def test_a_longer_path_is_a_longer_service() -> None:
    schedule = Schedule((0.0, 1.0), (2.0, 2.0))
    # One server: 2 and 3 seconds; with a path of one second 3 and 5.
    assert with_path(schedule, 1, 1.0) == pytest.approx(4.0 / 2.5)
    assert with_path(schedule, 2, 0.0) == 1.0
