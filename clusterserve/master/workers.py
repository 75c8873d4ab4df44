"""`Workers`: `cluster.workers`, and the books behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping

from ..core.events import AboutWorker, Exited, Forked
from .worker import Orders, Process, Worker


class Workers(Mapping[int, Worker]):
    """The workers by id, oldest first: from fork until each is both disconnected and dead.

    Live: it changes right before the handlers of an event run, and in `fork`.
    """

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        # Replaced, never changed: whoever walks through it, on whatever thread, sees it as it was.
        self._workers: Mapping[int, Worker] = {}
        self._changing = threading.Lock()
        # For the engine's thread alone: everybody that lives, whether or not it has been told of.
        self._known: dict[int, Worker] = {}
        self._forking = False
        self.home: asyncio.AbstractEventLoop | None = None

    def __getitem__(self, id: int) -> Worker:
        return self._workers[id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def __repr__(self) -> str:
        return repr(dict(self._workers))

    # -- on the engine's thread -----------------------------------------------------------------------------------

    def about(self, event: AboutWorker, pickled: bool) -> Worker:
        """The worker that an event is about, which has just happened; `pickled`: how later workers' messages are."""
        name = event.worker
        worker = self._known.get(name.id)
        if worker is None:
            process = None
            if isinstance(event, Forked):
                process = Process(name.pid, streams=self._orders.streams_of(name.id))
            worker = self._known[name.id] = Worker(
                name.id, slot=name.slot, process=process, orders=self._orders, pickled=pickled
            )
            assert self.home is not None
            worker.settle(self.home)
        if isinstance(event, Exited) and not self._forking:
            del self._known[name.id]
        return worker

    def forked(self, fork: Callable[[], int]) -> Worker:
        """The worker whose id `fork` returns, even if its whole life has been told by then."""
        self._forking = True
        try:
            id = fork()
        finally:
            self._forking = False
        worker = self._known[id]
        if worker.process is None:
            # It never lived.
            del self._known[id]
        return worker

    # -- on the home loop, or where `fork` was called -------------------------------------------------------------

    def enter(self, worker: Worker) -> None:
        """It is among the workers from now on, unless it is gone by now."""
        with self._changing:
            if worker.id not in self._workers and not worker.is_dead():
                self._workers = dict(sorted([*self._workers.items(), (worker.id, worker)]))

    def tell(self, worker: Worker, event: AboutWorker) -> None:
        """`event` is told of next."""
        with self._changing:
            worker.advance(event)
        if isinstance(event, Forked):
            self.enter(worker)
        elif worker.is_dead():
            with self._changing:
                self._workers = {id: each for id, each in self._workers.items() if each is not worker}
