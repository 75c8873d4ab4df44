"""Policies as somebody else would write them: plain classes, nothing of ours imported."""

from __future__ import annotations

from typing import Any


class Newest:
    """Every connection to the youngest worker that is ready."""

    def __init__(self) -> None:
        self.workers: list[Any] = []

    def add(self, worker: Any) -> None:
        self.workers.append(worker)

    def remove(self, worker: Any) -> None:
        self.workers.remove(worker)

    def pick(self, connection: Any, now: float) -> Any:
        ready = [worker for worker in self.workers if worker.ready]
        return max(ready, key=lambda worker: worker.id, default=None)


class Raises(Newest):
    """One with a fault."""

    def pick(self, connection: Any, now: float) -> Any:
        raise LookupError("the policy's own trouble")


class NoPolicy:
    """A class that lacks every method."""
