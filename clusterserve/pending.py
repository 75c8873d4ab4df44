"""`Pending`: something under way in another thread.  Await it in a coroutine, or ask for its `result` anywhere else."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


class Pending(concurrent.futures.Future[T]):
    """A result that is still to come.

    `await pending` on any event loop, or `pending.result(timeout)` in a thread that may wait.  It cannot be cancelled:
    who awaits it may be, and what is under way goes on.  Nobody needs to ask: an error that nobody asks for is lost.
    What `add_done_callback` is given may run on a thread of the cluster's, and must not wait for anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    @classmethod
    def of(cls, result: T) -> Pending[T]:
        """One that is done."""
        pending: Pending[T] = cls()
        pending.set_result(result)
        return pending


class Delivery(Pending[None]):
    """A message on its way: done when the kernel has it; fails with `ClusterError` if the channel closes first.

    It is false if the channel is closed, or if so much waits already that the sender should await this one first
    (Node: what `send` returns); the message is queued in the latter case all the same.
    """

    def __init__(self, accepted: bool = True) -> None:
        super().__init__()
        self._accepted = accepted

    def __bool__(self) -> bool:
        return self._accepted
