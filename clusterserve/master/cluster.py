"""`Cluster`: the engine inside another program."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from ..core.distributor import Statistics
from ..core.events import Event
from ..core.reconcile import Stop
from ..errors import ClusterError, SettingsError
from ..settings import Settings
from .engine import Engine
from .hooks import told_of_events

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerInfo:
    """A worker as it was when asked: `state` is none, online, listening, draining, disconnected or dead."""

    id: int
    slot: int
    pid: int
    state: str


class Cluster:
    """A cluster that runs beside your program, from `start` (or `with`, or `async with`) to `stop`.

        with Cluster("package.module:app", workers=2, bind="127.0.0.1:0") as cluster:
            httpx.get(cluster.url)

    The engine has a thread and an event loop of its own; yours, your signal handlers and your child processes are left
    alone.  Any thread may start it, also one that ends before the cluster does.  `settings` are those of the command
    line, with underscores.  Raises `SettingsError` at once for what cannot be.
    """

    def __init__(self, app: str, **settings: Any) -> None:
        if not isinstance(app, str):
            raise SettingsError(
                f"an application is given as an import string like 'package.module:app', not as {type(app).__name__}: "
                "each worker imports it afresh"
            )
        self._settings = Settings.create(app=app, **settings)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._ordered = Stop.NO
        self._starting = threading.Lock()
        self._ended: concurrent.futures.Future[None] = _promise()

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, and return when every worker listens.

        Raises `BindError` if an address cannot be had, `BootError` (with the worker's own traceback) if the application
        cannot be loaded or started, `ClusterError` if it was started before.
        """
        started = self._begin()
        try:
            started.result()
        except BaseException:
            # A Ctrl-C as well: `with` does not stop what did not start.
            self.stop(quick=True)
            raise

    def stop(self, *, quick: bool = False) -> None:
        """Stop and return when every process is gone: requests in flight finish within `timeout_graceful_shutdown`.

        `quick` cuts them.  Does nothing if it does not run.
        """
        self._order_stop(quick)
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Cluster:
        started = self._begin()
        try:
            await asyncio.wrap_future(started)
        except BaseException:
            await self._leave(quick=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave(quick=False)

    async def _leave(self, quick: bool) -> None:
        """Stop, and wait until nothing is left; who is cancelled meanwhile is in a hurry."""
        self._order_stop(quick)
        try:
            await asyncio.wrap_future(self._ended)
        except asyncio.CancelledError:
            self._order_stop(quick=True)
            await asyncio.wrap_future(self._ended)
            raise
        finally:
            if self._thread is not None and self._ended.done():
                self._thread.join()

    # -- change ---------------------------------------------------------------------------------------------------

    def scale(self, workers: int) -> None:
        """Have `workers` workers, and return when it is so.

        Raises `BootError` if workers die again and again before they are of use: the cluster goes on trying to have as
        many as it was told.  Raises `ClusterError` if it does not run.
        """
        if workers < 1:
            raise SettingsError(f"a cluster has at least 1 worker, not {workers}")
        self._change(lambda engine: engine.scale(workers))

    def reload(self) -> None:
        """Replace every worker by a fresh one, one at a time, and return when it is done.

        Raises `BootError` if a replacement cannot start: the old workers go on then.
        """
        self._change(Engine.reload)

    def _change(self, order: Callable[[Engine], asyncio.Future[None]]) -> None:
        done: concurrent.futures.Future[None] = _promise()

        def finished(change: asyncio.Future[None]) -> None:
            error = change.exception()
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self._ask(lambda engine: order(engine).add_done_callback(finished))
        # The loop may end without having come to it.
        either: list[concurrent.futures.Future[Any]] = [done, self._ended]
        concurrent.futures.wait(either, return_when=concurrent.futures.FIRST_COMPLETED)
        if not done.done():
            raise ClusterError("the cluster does not run")
        done.result()

    # -- looking in -----------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What it was made with; frozen, itself and what it holds."""
        return self._settings

    @property
    def urls(self) -> list[str]:
        """Where each bind is reached from this machine; "unix:PATH" for a unix socket."""
        return self._ask(lambda engine: [listener.url for listener in engine.handles if listener.pinned])

    @property
    def url(self) -> str:
        """The first of `urls`."""
        return self.urls[0]

    @property
    def workers(self) -> list[WorkerInfo]:
        """Every worker that is not dead, oldest first."""
        return [WorkerInfo(id, slot, pid, state.value) for id, slot, pid, state in self._ask(Engine.states)]

    def statistics(self) -> Statistics:
        """Connections by state and by worker, now."""
        return self._ask(Engine.statistics)

    def __repr__(self) -> str:
        state = "new" if self._thread is None else "stopped" if self._ended.done() else "running"
        return f"<Cluster {self.settings.app!r} {state}>"

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _begin(self) -> concurrent.futures.Future[None]:
        with self._starting:
            if self._thread is not None:
                raise ClusterError("a Cluster starts once; make a new one")
            started: concurrent.futures.Future[None] = _promise()
            # A thread of its own also for the workers' sake: the kernel kills them when the thread that spawned them
            # ends.
            thread = threading.Thread(target=self._run, args=(started,), name="clusterserve", daemon=True)
            thread.start()
            self._thread = thread
        return started

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        """The thread.  An end is reported when all is closed: whoever hears of it finds nothing left."""
        failure: Exception | None = None
        try:
            with told_of_events(self.settings) as emit:
                loop = uvloop.new_event_loop()
                try:
                    loop.run_until_complete(self._serve(loop, emit, started))
                finally:
                    self._engine = None
                    loop.close()
        except Exception as exc:  # noqa: BLE001 - whatever it is, somebody waits to hear of it
            failure = exc
        told = started.done()
        if not told:
            started.set_exception(failure or ClusterError("it was stopped before it had started"))
        self._ended.set_result(None)
        if told and failure is not None:
            raise failure

    async def _serve(
        self,
        loop: asyncio.AbstractEventLoop,
        emit: Callable[[Event], None],
        started: concurrent.futures.Future[None],
    ) -> None:
        engine = Engine(self.settings, loop, emit)
        engine.start()
        self._loop, self._engine = loop, engine
        self._obey()
        either: list[asyncio.Future[Any]] = [engine.settled, engine.finished]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if engine.settled.done():
            started.set_result(None)
        error = await engine.finished
        if error is not None:
            raise error

    def _order_stop(self, quick: bool) -> None:
        """Have the engine stop, as soon as there is one."""
        if self._thread is None:
            return
        if quick or self._ordered is Stop.NO:
            self._ordered = Stop.QUICK if quick else Stop.GRACEFUL
        if self._loop is not None:
            # A closed loop has ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._obey)

    def _obey(self) -> None:
        if self._engine is not None:
            self._engine.stop(self._ordered)

    def _ask(self, question: Callable[[Engine], T]) -> T:
        """Ask the engine on its own loop."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def ask() -> None:
            if self._engine is not None:
                answer.set_result(question(self._engine))

        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(ask)
                # The loop may end without having come to it.
                either: list[concurrent.futures.Future[Any]] = [answer, self._ended]
                concurrent.futures.wait(either, return_when=concurrent.futures.FIRST_COMPLETED)
        if not answer.done():
            raise ClusterError("the cluster does not run")
        return answer.result()


def _promise() -> concurrent.futures.Future[Any]:
    """A future that cannot be cancelled: who awaits it may be, and the engine's thread sets it all the same."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future
