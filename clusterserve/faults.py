"""Switches that break one mechanism each, so that a test can show that it would notice: never for use.

`CLUSTERSERVE_FAULTS=name,...` in the environment of the master and its workers.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "CLUSTERSERVE_FAULTS"

_ON: Final = frozenset(os.environ.get(VARIABLE, "").split(","))


def on(name: str) -> bool:
    """Whether this mechanism is broken on purpose."""
    return name in _ON
