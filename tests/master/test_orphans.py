"""Reaping, on a process that has become a reaper as process 1 is one; a program of its own, lest it be the tests."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, ctypes, os, subprocess, sys
from clusterserve.master import orphans

orphans._PAUSE = 0.05
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER

async def main():
    ours = subprocess.Popen(["true"])
    line = subprocess.run(["sh", "-c", "sleep 0.1 >/dev/null & echo $!"], stdout=subprocess.PIPE).stdout
    orphan = int(line)
    reaper = orphans.Orphans(asyncio.get_running_loop(), lambda: [ours.pid])
    reaper.start()
    while os.path.exists(f"/proc/{orphan}"):
        await asyncio.sleep(0.01)
    # It has had its looks, and has left alone what is waited for.
    assert orphans.zombies(os.getpid()) == {ours.pid}
    assert ours.wait() == 0
    reaper.close()
    print("done")

asyncio.run(main())
"""


def test_strangers_are_reaped_and_ours_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
