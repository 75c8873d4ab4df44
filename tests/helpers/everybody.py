"""A Python that every user of this machine may run, for tests whose workers are somebody else's."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

#: A user who may do nothing.
NOBODY: Final = 65534


def environment() -> dict[str, str]:
    """What such a Python needs to find this project and what it depends on."""
    # Not the standard library's: it has its own.
    packages = [path for path in sys.path if path.endswith("-packages")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *packages])}


@functools.cache
def python() -> str | None:
    """Its path: ours, or another of our version; None if there is none, or if we are not root."""
    if os.geteuid() != 0:
        return None
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin")):
        if candidate is not None and _runs(candidate):
            return candidate
    return None


def _runs(candidate: str) -> bool:
    program = [candidate, "-c", "import clusterserve.master.cluster, uvicorn"]
    try:
        return not subprocess.run(
            program, user=NOBODY, group=NOBODY, extra_groups=[], env=environment(), cwd="/", stderr=subprocess.DEVNULL
        ).returncode
    except PermissionError:
        return False
