"""The engine's thread: a cluster beside a program, on an event loop of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import uvloop

from ..core.events import Event
from ..core.reconcile import Stop
from ..errors import ClusterError
from ..pending import Pending
from ..settings import Settings
from .engine import Engine
from .hooks import told_of_events

T = TypeVar("T")


class EngineThread:
    """From `start` to its end, which `order_stop` brings about.

    `emit` is told of every event, on that thread.  A thread of its own also for the workers' sake: the kernel kills
    them when the thread that spawned them ends.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        #: Done when the engine has settled; fails if it never does.
        self.settled: Pending[None] = Pending()
        #: Done when everything is over and closed.
        self.ended: Pending[None] = Pending()
        self._begun = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        #: For that thread alone.
        self.engine: Engine | None = None
        self._ordered = Stop.NO
        self._thread: threading.Thread | None = None
        self._once = threading.Lock()
        self._claimed = False

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    def claim(self) -> None:
        """Who calls this first may `start` it; raises `ClusterError` the second time."""
        with self._once:
            if self._claimed:
                raise ClusterError("a Cluster starts once; make a new one")
            self._claimed = True

    def start(self, settings: Settings) -> None:
        # Known before it runs: a Ctrl-C in `Thread.start` must not lose it.
        self._thread = threading.Thread(target=self._run, args=(settings,), name="clusterserve", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until it has ended."""
        # A Ctrl-C in `Thread.start` may have come before there was a thread; if it has begun, it ends.
        if self._thread is not None and (self._begun.wait(1.0) or self._thread.is_alive()):
            self._thread.join()

    def order_stop(self, quick: bool) -> None:
        """Have the engine stop, as soon as there is one.  Does nothing if it does not run."""
        if self._thread is None:
            return
        if quick or self._ordered is Stop.NO:
            self._ordered = Stop.QUICK if quick else Stop.GRACEFUL
        if self._loop is not None:
            # A closed loop has ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._obey)

    def post(self, order: Callable[[Engine], object]) -> bool:
        """Have `order` called there, soon; False if it does not run.  Never waits."""
        if self._loop is None or self.ended.done():
            return False

        def obey() -> None:
            if self.engine is not None:
                order(self.engine)

        try:
            self._loop.call_soon_threadsafe(obey)
        except RuntimeError:
            return False
        return True

    def ask(self, question: Callable[[Engine], T]) -> T:
        """The answer of the engine, given on its own loop.  Raises `ClusterError` if it does not run."""
        answer: Pending[T] = Pending()

        def ask(engine: Engine) -> None:
            try:
                answer.set_result(question(engine))
            except Exception as exc:  # noqa: BLE001 - whatever it is, somebody waits to hear of it
                answer.set_exception(exc)

        if self.post(ask):
            # The loop may end without having come to it.
            either: list[concurrent.futures.Future[Any]] = [answer, self.ended]
            concurrent.futures.wait(either, return_when=concurrent.futures.FIRST_COMPLETED)
        if not answer.done():
            raise ClusterError("the cluster does not run")
        return answer.result()

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self, settings: Settings) -> None:
        """An end is reported when all is closed: whoever hears of it finds nothing left."""
        self._begun.set()
        failure: Exception | None = None
        try:
            with told_of_events(settings) as tell_hooks:

                def emit(event: Event) -> None:
                    tell_hooks(event)
                    self._emit(event)

                loop = uvloop.new_event_loop()
                try:
                    loop.run_until_complete(self._serve(settings, loop, emit))
                finally:
                    self.engine = None
                    loop.close()
        except Exception as exc:  # noqa: BLE001 - whatever it is, somebody waits to hear of it
            failure = exc
        told = self.settled.done()
        if not told:
            self.settled.set_exception(failure or ClusterError("it was stopped before it had started"))
        self.ended.set_result(None)
        if told and failure is not None:
            raise failure

    async def _serve(self, settings: Settings, loop: asyncio.AbstractEventLoop, emit: Callable[[Event], None]) -> None:
        engine = Engine(settings, loop, emit)
        # Before it starts: who hears that it is ready may ask at once, and is heard after this turn of the loop.
        self._loop, self.engine = loop, engine
        engine.start()
        self._obey()
        either: list[asyncio.Future[Any]] = [engine.settled, engine.finished]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if engine.settled.done():
            error = engine.settled.exception()
            if error is None:
                self.settled.set_result(None)
            else:
                self.settled.set_exception(error)
        failure = await engine.finished
        if failure is not None:
            raise failure

    def _obey(self) -> None:
        if self.engine is not None:
            self.engine.stop(self._ordered)
