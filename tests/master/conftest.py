"""Fixtures of the master's tests.  Each test must leave as many descriptors and children as it found."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import uvloop

pytest.register_assert_rewrite("master.rig")

from tests.helpers import proc  # noqa: E402

from .rig import Rig, SkewedLoop  # noqa: E402


def children() -> list[int]:
    """Processes of ours, those included that are dead and not yet waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    return proc.children(os.getpid())


@pytest.fixture(autouse=True, scope="session")
def libuv() -> None:
    """The first loop of a process makes a pipe that all share."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = children(), proc.descriptors(os.getpid())
    yield
    after = children(), proc.descriptors(os.getpid())
    if after[1].keys() != before[1].keys():
        # What a cycle of objects held is not lost yet.
        gc.collect()
        after = children(), proc.descriptors(os.getpid())
    assert {number: after[1][number] for number in after[1].keys() - before[1].keys()} == {}
    assert after[1].keys() == before[1].keys()
    assert after[0] == before[0]


@pytest.fixture
def loop() -> Iterator[SkewedLoop]:
    """An event loop on whose callbacks nothing may raise."""
    loop = SkewedLoop()
    yield loop
    loop.close()
    assert loop.faults == []


@pytest.fixture
def rig(loop: SkewedLoop) -> Iterator[Rig]:
    """A dispatcher for whom time stands still: nobody is late because the machine is busy, only when a test says so."""
    loop.freeze()
    rig = Rig(loop)
    yield rig
    rig.close()
