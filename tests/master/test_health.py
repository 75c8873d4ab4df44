"""Heartbeats and memory, on a clock that a test sets forward."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from typing import Any

import pytest

from clusterserve.core.lifecycle import WorkerEvent
from clusterserve.core.roster import Limits, Roster
from clusterserve.master.health import Health, proportional, resident
from clusterserve.settings import Settings

from .rig import SkewedLoop


class Ward:
    """One worker that listens, and who looks after it."""

    def __init__(self, loop: SkewedLoop, **values: Any) -> None:
        settings = Settings.create(app="module:app", workers=1, **values)
        self.loop = loop
        self.roster = Roster(Limits(timeout=settings.timeout))
        #: How often it was said that `plan` may have something to say.
        self.changes = 0
        self.health = Health(loop, settings, self.roster, lambda: [(1, os.getpid())], self._changed)
        self.member = self.roster.spawned(0, 1, loop.time(), self.health.wear())
        for event in (WorkerEvent.ONLINE, WorkerEvent.LISTENING):
            self.roster.happened(1, event, loop.time())
        self.health.start()

    def _changed(self) -> None:
        self.changes += 1

    def passes(self, seconds: float, *, step: float) -> None:
        while seconds > 0:
            self.loop.forward(step)
            self.loop.turn()
            seconds -= step


@pytest.fixture
def loop() -> Any:
    loop = SkewedLoop()
    loop.freeze()
    yield loop
    loop.close()
    assert loop.faults == []


def test_a_silent_worker_is_noticed(loop: SkewedLoop) -> None:
    ward = Ward(loop, timeout=4)
    # The first look only sets the clock.
    ward.passes(5, step=1.001)
    assert ward.changes == 0
    ward.passes(2, step=1.001)
    assert ward.changes > 0
    assert ward.roster.hung(ward.member)
    ward.health.close()


def test_one_that_beats_is_not(loop: SkewedLoop) -> None:
    ward = Ward(loop, timeout=4)
    for _ in range(10):
        ward.passes(3, step=1.001)
        ward.health.heard(1, 0)
    assert ward.changes == 0
    ward.health.close()


def test_a_long_sleep_is_one_look(loop: SkewedLoop) -> None:
    ward = Ward(loop, timeout=4)
    for _ in range(4):
        ward.passes(3600, step=3600)
    assert ward.changes == 0
    assert ward.member.silence == pytest.approx(3.0)
    ward.health.close()


def test_one_that_is_worn_by_requests(loop: SkewedLoop) -> None:
    ward = Ward(loop, limit_max_requests=10)
    ward.health.heard(1, 9)
    assert ward.changes == 0
    ward.health.heard(1, 10)
    assert ward.changes == 1
    ward.health.close()


def test_one_that_is_worn_by_memory(loop: SkewedLoop) -> None:
    ward = Ward(loop, timeout=0, workers_max_rss=1, rss_sample_interval=10, rss_samples=2)
    ward.passes(10.001, step=10.001)
    assert ward.changes == 0
    ward.passes(10.001, step=10.001)
    assert ward.changes == 1
    assert ward.member.worn(loop.time()).startswith("holds ")
    ward.health.close()


def test_memory_of_one_that_leaves_is_its_own(loop: SkewedLoop) -> None:
    ward = Ward(loop, timeout=0, workers_max_rss=1, rss_sample_interval=10)
    ward.roster.drained(1, False, loop.time())
    ward.passes(10.001, step=10.001)
    assert ward.changes == 0
    ward.health.close()


def test_nothing_is_looked_at_without_need_or_after_the_end(loop: SkewedLoop) -> None:
    for values in ({"timeout": 0}, {"timeout": 4, "workers_max_rss": 1}):
        ward = Ward(loop, **values)
        if values["timeout"]:
            ward.health.close()
        ward.passes(60, step=10)
        assert ward.changes == 0
        assert ward.member.silence == 0.0


def test_each_worker_has_limits_of_its_own(loop: SkewedLoop) -> None:
    ward = Ward(
        loop, limit_max_requests=100, limit_max_requests_jitter=50, workers_lifetime=10, workers_lifetime_jitter=5
    )
    wears = [ward.health.wear() for _ in range(200)]
    assert {wear.requests for wear in wears} <= set(range(100, 151))
    assert all(10 <= wear.lifetime <= 15 for wear in wears)
    assert len({wear.requests for wear in wears}) > 10
    assert len({wear.lifetime for wear in wears}) > 10
    ward.health.close()


def test_a_jitter_of_no_limit_is_no_limit(loop: SkewedLoop) -> None:
    ward = Ward(loop, limit_max_requests_jitter=50, workers_lifetime_jitter=5)
    assert (ward.member.wear.requests, ward.member.wear.lifetime) == (0, 0.0)
    ward.health.close()


def test_resident_memory() -> None:
    # Not from the heap: what other tests have freed there is resident already.
    with mmap.mmap(-1, 64 << 20) as ballast:
        before = resident(os.getpid())
        for page in range(0, len(ballast), mmap.PAGESIZE):
            ballast[page] = 1
        assert 60 << 20 < resident(os.getpid()) - before < 80 << 20
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert resident(gone.pid) == 0


FORKS = """
import os, sys
ballast = bytearray(64 << 20)
reads, writes = os.pipe()
pid = os.fork()
if not pid:
    os.close(writes)
    os.read(reads, 1)
    os._exit(0)
print(pid, flush=True)
sys.stdin.read()
os.close(writes)
os.waitpid(pid, 0)
"""


def test_what_two_processes_share_counts_half_for_each() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert resident(pid) > 64 << 20
        assert 32 << 20 < proportional(pid) < 48 << 20
        process.stdin.close()
        process.wait()
    assert proportional(pid) == 0
