"""`--profile DIR`: what this process spends its time on, in a file for `pstats`."""

from __future__ import annotations

import contextlib
import cProfile
import os
import sys
from collections.abc import Iterator

from ..currentworker import CurrentWorker


@contextlib.contextmanager
def profiled(directory: str, worker: CurrentWorker) -> Iterator[None]:
    """Profile this thread within the block, and write the file at its end, also when that is an exception.

    The file is there as a whole or not at all, and names worker, slot and pid.  A directory that cannot be written is
    told on stderr.
    """
    profile = cProfile.Profile()
    name = f"worker-{worker.id}-slot-{worker.slot}-pid-{worker.pid}.prof"
    path = os.path.join(os.path.abspath(directory), name)
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            profile.dump_stats(f"{path}.part")
            os.replace(f"{path}.part", path)
        except OSError as exc:
            print(f"clusterserve: the profile of worker {worker.id} cannot be written: {exc}", file=sys.stderr)
