"""The descriptors of the process that runs the tests: that none is left behind, and what happens when none is left."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import resource
from collections.abc import Iterator

import pytest

from tests.helpers import proc


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = proc.descriptors(os.getpid())
    yield

    def left() -> dict[int, str]:
        now = proc.descriptors(os.getpid())
        # The listing has a descriptor of its own.
        return {fd: what for fd, what in now.items() if before.get(fd) != what and not what.endswith("/fd")}

    if left():
        # Only then, because collecting takes longer than most of these tests.
        gc.collect()
    assert left() == {}


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """This process may open `count` descriptors more, and none above."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    # The listing's own descriptor is in it and closed again.
    free = (number for number in itertools.count() if number not in used or not is_open(number))
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
