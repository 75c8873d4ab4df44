"""How often a worker's event loop says that it turns.  Both ends count by it."""

from __future__ import annotations

from typing import Final

#: The longest pause (seconds): the requests served so far travel with it, and are not older than that.
SLOWEST: Final = 1.0

#: So many heartbeats must fail to come before a worker is taken for hung: one that is merely late is none.
MISSED: Final = 4


def pace(timeout: float) -> float:
    """Seconds between two heartbeats, when a worker may be silent for `timeout` seconds (0: for ever)."""
    return min(timeout / MISSED, SLOWEST) if timeout else SLOWEST
