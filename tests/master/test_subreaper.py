"""Taking orphans in, for moments."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from tests.helpers.server import ROOT
from tests.helpers.waiting import DEADLINE

SOURCE = """
    import ctypes
    from clusterserve.master.subreaper import Subreaper

    def is_one():
        found = ctypes.c_int()
        libc.prctl(37, ctypes.byref(found), 0, 0, 0)
        return found.value

    libc = ctypes.CDLL(None)
    for before in (0, 1):
        libc.prctl(36, before, 0, 0, 0)
        reaper = Subreaper()
        states = [is_one()]
        for step in (reaper.enter, reaper.enter, reaper.leave, reaper.leave):
            step()
            states.append(is_one())
        print(*states)
"""


def test_it_is_as_it_was_when_the_last_has_left() -> None:
    """In a process of its own: it is a property of the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SOURCE)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=DEADLINE, check=True,
    )  # fmt: skip
    assert done.stdout == "0 1 1 1 0\n1 1 1 1 1\n"
