"""A warning about something that may go on for as long as it likes, and is said once in a while."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Final

logger = logging.getLogger("clusterserve.dispatch")

#: Said no more often than this (seconds).
PAUSE: Final = 10.0


class Complaint:
    """All that is said through one of these counts as the same."""

    def __init__(self) -> None:
        self._silent_until = 0.0

    def warn(self, message: str, *arguments: object) -> None:
        """A warning, as `logger.warning`, unless there was one within the last `PAUSE` seconds."""
        now = monotonic()
        if now >= self._silent_until:
            self._silent_until = now + PAUSE
            logger.warning(f"{message} (said once in %g s)", *arguments, PAUSE)
