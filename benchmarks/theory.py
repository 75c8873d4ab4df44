"""The best that a first-come, first-served cluster could do: one queue, and whichever server is free takes its head.

Pure.  Simulated for given arrivals and services instead of computed for their distribution, so that a server is
compared with what was possible for the very requests it got.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from statistics import fmean

from benchmarks.schedule import Schedule


def single_queue(schedule: Schedule, servers: int) -> list[float]:
    """How long each request takes from its arrival to its end, in seconds, in order of arrival."""
    free_at = [0.0] * servers
    taken = []
    for arrival, service in zip(schedule.arrivals, schedule.services, strict=True):
        end = max(arrival, free_at[0]) + service
        heapq.heapreplace(free_at, end)
        taken.append(end - arrival)
    return taken


def with_path(schedule: Schedule, servers: int, path: float) -> float:
    """The mean that is possible if each request also takes its server `path` seconds on the way, against none."""
    longer = replace(schedule, services=tuple(service + path for service in schedule.services))
    return fmean(single_queue(longer, servers)) / fmean(single_queue(schedule, servers))
