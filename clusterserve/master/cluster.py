"""`Cluster`: the engine inside another program."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import uvloop

from ..core.distributor import Statistics
from ..core.reconcile import Stop
from ..errors import BootError, ClusterError, SettingsError
from ..settings import Settings
from .engine import Engine

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
        self.settings = Settings.create(app=app, **settings)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._ended: concurrent.futures.Future[BootError | None] = concurrent.futures.Future()

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
        except asyncio.CancelledError:
            self._order_stop(quick=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._order_stop(quick=False)
        await asyncio.wrap_future(self._ended)

    # -- looking in -----------------------------------------------------------------------------------------------

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
        if self._thread is not None:
            raise ClusterError("a Cluster starts once; make a new one")
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        # A thread of its own also for the workers' sake: the kernel kills them when the thread that spawned them ends.
        self._thread = threading.Thread(target=self._run, args=(started,), name="clusterserve", daemon=True)
        self._thread.start()
        return started

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        loop = uvloop.new_event_loop()
        try:
            self._ended.set_result(loop.run_until_complete(self._serve(loop, started)))
        except ClusterError as exc:
            self._ended.set_result(None)
            started.set_exception(exc)
        finally:
            loop.close()

    async def _serve(
        self, loop: asyncio.AbstractEventLoop, started: concurrent.futures.Future[None]
    ) -> BootError | None:
        engine = Engine(self.settings, loop)
        engine.start()
        self._loop, self._engine = loop, engine
        either: list[asyncio.Future[Any]] = [engine.settled, engine.finished]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if engine.finished.done():
            started.set_exception(engine.finished.result() or ClusterError("it was stopped before it had started"))
        else:
            started.set_result(None)
        error = await engine.finished
        self._engine = None
        return error

    def _order_stop(self, quick: bool) -> None:
        how = Stop.QUICK if quick else Stop.GRACEFUL

        def order() -> None:
            if self._engine is not None:
                self._engine.stop(how)

        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(order)
        except RuntimeError:
            # Its loop is closed: it has ended by itself.
            return

    def _ask(self, question: Callable[[Engine], T]) -> T:
        """Ask the engine on its own loop."""
        if self._engine is None or self._loop is None:
            raise ClusterError("the cluster does not run")

        async def ask() -> T:
            if self._engine is None:
                raise ClusterError("the cluster does not run")
            return question(self._engine)

        coroutine = ask()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except RuntimeError:
            coroutine.close()
            raise ClusterError("the cluster does not run") from None
