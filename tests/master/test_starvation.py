"""Who is late because it has no processor, and who because it holds its own loop: asked of real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.core.lateness import EXCUSES
from clusterserve.core.policies import Least
from clusterserve.master.starvation import Starvation
from tests.helpers import proc
from tests.helpers.waiting import eventually

from .rig import Rig

SPIN = "print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def program(source: str, processor: int | None = None) -> Iterator[int]:
    """A process of its own, by its pid."""
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    try:
        if processor is not None:
            os.sched_setaffinity(process.pid, {processor})
        if "print" in source:
            assert process.stdout is not None
            process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def starvation() -> Iterator[Starvation]:
    starvation = Starvation()
    yield starvation
    starvation.close()


@pytest.fixture
def starving() -> Iterator[int]:
    """A process that is ready to run and, but for a moment now and then, does not."""
    processor = min(os.sched_getaffinity(0))
    with program(SPIN, processor) as pid, program(SPIN, processor):
        # It runs only where nobody else wants to, beside somebody who always does.
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        eventually(lambda: proc.state(pid) == "R", "it is ready to run")
        yield pid
        # To die, too, a process must run.
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))


def ran(pid: int) -> float:
    """How long it has run (seconds)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_a_process_without_a_processor_starves(starvation: Starvation, starving: int) -> None:
    # The first look has nothing to compare with, and believes it.
    assert starvation.starves(starving, 0.0)
    assert starvation.starves(starving, 0.9)


def test_a_process_that_runs_does_not_starve(starvation: Starvation) -> None:
    with program(SPIN) as pid:
        eventually(lambda: proc.state(pid) == "R", "it runs")
        starvation.starves(pid, 0.0)
        before = ran(pid)
        eventually(lambda: ran(pid) - before > 0.02, "it has run for a while")
        # On a busy machine that took longer: here it counts as all the time there was.
        assert not starvation.starves(pid, 0.02)


def test_a_look_of_long_ago_says_nothing(starvation: Starvation) -> None:
    with program(SPIN) as pid:
        eventually(lambda: proc.state(pid) == "R", "it runs")
        starvation.starves(pid, 0.0)
        before = ran(pid)
        eventually(lambda: ran(pid) - before > 0.02, "it has run for a while")
        assert starvation.starves(pid, 5.0)


def test_what_was_seen_can_be_forgotten(starvation: Starvation) -> None:
    with program(SPIN) as pid:
        eventually(lambda: proc.state(pid) == "R", "it runs")
        starvation.starves(pid, 0.0)
        before = ran(pid)
        eventually(lambda: ran(pid) - before > 0.02, "it has run for a while")
        starvation.forget(pid)
        assert starvation.starves(pid, 0.02)
    starvation.forget(pid)


def test_what_was_opened_is_closed() -> None:
    starvation = Starvation()
    with program("input()") as pid:
        starvation.starves(pid, 0.0)
        opened = {f"/proc/{pid}/task/{pid}/{name}" for name in ("stat", "schedstat")}
        assert opened <= set(proc.descriptors(os.getpid()).values())
        starvation.forget(pid)
        assert not opened & set(proc.descriptors(os.getpid()).values())


@pytest.mark.parametrize("source", ["import signal; signal.pause()", "import os; os.kill(os.getpid(), 19)"])
def test_who_sleeps_or_is_stopped_does_not_starve(starvation: Starvation, source: str) -> None:
    with program(source) as pid:
        eventually(lambda: proc.state(pid) in "ST", "it is not running")
        eventually(lambda: not starvation.starves(pid, 0.0), "it does not starve")


def test_who_is_gone_does_not_starve(starvation: Starvation) -> None:
    with program("pass") as pid:
        eventually(lambda: proc.state(pid) == "Z", "it is dead")
        assert not starvation.starves(pid, 0.0)
    assert not starvation.starves(pid, 0.0)


def test_a_worker_without_a_processor_keeps_its_offers(rig: Rig, starving: int) -> None:
    listener = rig.listen(policy=Least())
    late = rig.worker(listener, pid=starving)
    rig.connect(listener)
    rig.loop.until(lambda: late.record.unacked, "it is offered")
    other = rig.worker(listener)
    for number in range(1, EXCUSES + 1):
        rig.late()
        assert late.record.excuses == number
        assert not late.record.stalled
    # Not for ever: whatever the kernel says, the client has waited long enough.
    rig.late()
    assert late.record.stalled
    other.receive()


def test_a_worker_that_is_stopped_does_not(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    with program("import os; os.kill(os.getpid(), 19)") as pid:
        eventually(lambda: proc.state(pid) == "T", "it is stopped")
        late = rig.worker(listener, pid=pid)
        rig.connect(listener)
        rig.loop.until(lambda: late.record.unacked, "it is offered")
        other = rig.worker(listener)
        rig.late()
        other.receive()
        assert not late.record.excuses
        os.kill(pid, signal.SIGCONT)
