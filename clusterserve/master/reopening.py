"""Reopening the log's files, and who has yet to say that it writes to the new ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from ..core.messages import Reopen, Reopened
from ..errors import ClusterError
from ..log_files import LogFiles
from .changes import Changes
from .crew import Seat

logger = logging.getLogger("clusterserve")


class Reopening:
    """One per cluster.  Borrows `files`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, files: LogFiles) -> None:
        self._files = files
        self._number = 0
        self._waiting: set[int] = set()
        self._changes = Changes(loop)

    def order(self, seats: Mapping[int, Seat]) -> asyncio.Future[None]:
        """Reopen here and there.  Done when no line goes to the old files any more, or fails with `ClusterError`."""
        done = self._changes.begin()
        try:
            self._files.reopen()
        except ClusterError as exc:
            logger.error("The log stays where it is: %s", exc)
            self._changes.over(exc)
            return done
        self._number += 1
        # Those who were asked before are asked again: this is what counts, for who waits for that as well.
        self._waiting = {
            id for id, seat in seats.items() if seat.channel.send(Reopen(self._number), self._files.descriptors)
        }
        self._look()
        return done

    def answered(self, worker: int, answer: Reopened) -> None:
        """A worker has done so."""
        if answer.trouble:
            logger.error("Worker %d still logs to the files before: %s", worker, answer.trouble)
        if answer.number == self._number:
            self.gone(worker)

    def gone(self, worker: int) -> None:
        """A worker will write nothing any more."""
        if worker in self._waiting:
            self._waiting.remove(worker)
            self._look()

    def close(self) -> None:
        """Nobody will answer any more."""
        self._changes.over(ClusterError("the cluster has stopped"))

    def _look(self) -> None:
        if not self._waiting and self._changes:
            logger.info("The log's files are reopened")
            self._changes.over()
