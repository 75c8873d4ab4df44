"""`ProgramOrders`: what a program orders, on its way from the program's threads to the engine's.

Nothing here waits, save `obeyed`.  An order for a cluster that does not run, or no longer, comes to nothing: who waits
for one hears that, a worker that is gone does not mind.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from ..core.envelope import Envelope
from ..emitter import Handler
from ..errors import ClusterError, ProtocolError
from ..pending import Pending
from .engine import Engine
from .home import Home
from .streams import Streams
from .thread import EngineThread

T = TypeVar("T")


class ProgramOrders:
    """Those of one `Cluster`, and of its `Worker`s (whose `Orders` it is)."""

    def __init__(self, thread: EngineThread, emit: Callable[..., bool]) -> None:
        self._thread = thread
        #: Has the cluster tell its handlers, for a worker.
        self.emit = emit
        #: Who answers requests of workers that have no handler of their own.
        self.request_handler: Handler | None = None
        #: Where handlers run, once the cluster is being started.
        self.home: Home | None = None

    def order(self, order: Callable[[Engine], asyncio.Future[T]], *, at_home: bool = True) -> Pending[T]:
        """`at_home`: done when the handlers have heard of everything that belongs to it."""
        done: Pending[T] = Pending()

        def settle(error: BaseException | None, change: asyncio.Future[T] | None = None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            elif change is not None:
                done.set_result(change.result())

        def over(error: BaseException | None, change: asyncio.Future[T] | None = None) -> None:
            if at_home and self.home is not None:
                self.home.post(settle, error, change)
            else:
                settle(error, change)

        def obey(engine: Engine) -> None:
            try:
                order(engine).add_done_callback(lambda change: over(change.exception(), change))
            except Exception as exc:  # noqa: BLE001 - whatever it is, somebody waits to hear of it
                over(exc)

        if self._thread.post(obey):
            # The loop may end without having come to it.
            self._thread.ended.add_done_callback(lambda ended: over(ClusterError("the cluster does not run")))
        else:
            over(ClusterError("the cluster does not run"))
        return done

    def obeyed(self, order: Callable[[Engine], asyncio.Future[None]]) -> None:
        """The same, and wait for it."""
        # On the home loop no event can be waited for.
        here = self.home is not None and self.home.is_here
        self.order(order, at_home=not here).result()

    # -- of a worker ----------------------------------------------------------------------------------------------

    def post_to(self, worker: int, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        engine = self._thread.engine
        if engine is not None:
            engine.outbox.post(worker, envelope, descriptors, done)
            return
        for fd in descriptors:
            os.close(fd)
        done(False)

    def misbehaved(self, worker: int, error: ProtocolError) -> None:
        self._thread.post(lambda engine: engine.misbehaved(worker, error))

    def disconnect_worker(self, worker: int) -> None:
        self._thread.post(lambda engine: engine.disconnect(worker))

    def destroy_worker(self, worker: int, number: int) -> None:
        self._thread.post(lambda engine: engine.destroy(worker, number))

    def signal_worker(self, worker: int, number: int) -> None:
        self._thread.post(lambda engine: engine.send_signal(worker, number))

    def streams_of(self, worker: int) -> Streams | None:
        """For `Workers`, on the engine's thread."""
        engine = self._thread.engine
        return None if engine is None else engine.seats[worker].process.streams
