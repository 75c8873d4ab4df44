"""`Cluster`: the engine inside another program."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

from ..checks import SettingValueError, near_match
from ..contradictions import NEEDS_FORK
from ..core.distributor import Statistics
from ..core.events import EVENTS, AboutWorker, BecameReady, Disconnected, Event, Exited, Forked, Messaged, arguments
from ..current import current_worker
from ..debugport import DEFAULT, exact_port, require_debugpy
from ..debugport import debug_port as check_debug_port
from ..defaults import check_policy
from ..emitter import Emitter, H
from ..errors import ClusterError, SettingsError
from ..launch import LAUNCH_CHECKS, environment, main_script, make_places
from ..messenger import broadcast
from ..pending import Pending
from ..settings import OF_THE_PROCESS, Settings
from .engine import Engine
from .home import Home
from .orders import ProgramOrders
from .thread import EngineThread
from .worker import WORKER_EVENTS, Worker
from .workers import Workers

CLUSTER_EVENTS: Final = ("setup", "message", *EVENTS)


class Cluster(Emitter):
    """A cluster that runs beside your program, from `start` (or `with`, or `async with`) to `stop`.

        with Cluster("package.module:app", workers=2, bind="127.0.0.1:0") as cluster:
            httpx.get(cluster.url)

    Workers serve the application `app`, or run a program, `exec` ("script.py" or "-m package.module"); without either
    they run the script that runs now, which asks `clusterserve.is_worker` (Node).  The other `settings` are those of
    the command line, with underscores, and of `setup`.  Raises `SettingsError` at once for what cannot be, and
    `ClusterError` in a worker.

    The engine has a thread and an event loop of its own; yours, your signal handlers and your child processes are left
    alone.  Any thread may start it, also one that ends before the cluster does.

    Handlers (`on`, `once`, `wait_for`) run on your event loop with `async with`, and else on one thread of ours, in the
    order in which things happened.  There they must not wait for later events, save in a coroutine.
    """

    def __init__(self, app: str | None = None, **settings: Any) -> None:
        worker = current_worker()
        if worker is not None:
            raise ClusterError(f"this process is worker {worker.id}: only the master has a Cluster")
        super().__init__(CLUSTER_EVENTS)
        if app is not None and not isinstance(app, str):
            raise SettingsError(
                f"an application is given as an import string like 'package.module:app', not as {type(app).__name__}: "
                "each worker imports it afresh"
            )
        if app is None and "exec" not in settings:
            # What the script is called with may still change: it is looked up at the first `setup` or `start`.
            settings["exec"] = ""
        for name in OF_THE_PROCESS:
            if settings.get(name) is not None:
                raise SettingsError(f"{name} is for run() and the command line: this process is the program's own")
        self._settings = Settings.create(app=app, **settings)
        make_places(self._settings)
        self._place: Home | None = None
        self._thread = EngineThread(self._emitted)
        self._orders = ProgramOrders(self._thread, self.emit)
        self._workers = Workers(self._orders)
        self._started: Pending[None] = Pending()
        #: Those of `setup` calls before there was anybody to tell.
        self._early: list[Settings] = []

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, and return when every worker serves and every handler has heard of it.

        With `respawn=False`, when the addresses of `bind` are open.  Raises `BindError` if an address cannot be had,
        `BootError` (with the worker's own traceback) if the application cannot be loaded or started, or the workers of
        one slot die again and again; `ClusterError` if it was started before.
        """
        self._thread.claim()
        try:
            self._begin(None)
            self._started.result()
        except BaseException:
            # A Ctrl-C as well: `with` does not stop what did not start.
            self.stop(quick=True)
            raise

    def stop(self, *, quick: bool = False) -> None:
        """Stop and return when every process is gone: requests in flight finish within `timeout_graceful_shutdown`.

        It serves on for `shutdown_delay` before.  `quick` does not, and cuts them.  Does nothing if it does not run.
        """
        self._thread.order_stop(quick)
        self._thread.join()
        if self._place is not None:
            self._place.finish()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Cluster:
        self._thread.claim()
        try:
            self._begin(asyncio.get_running_loop())
            await self._started
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
        self._thread.order_stop(quick)
        if not self._thread.is_started:
            return
        try:
            await self._thread.ended
        except asyncio.CancelledError:
            self._thread.order_stop(quick=True)
            await self._thread.ended
            raise
        finally:
            if self._thread.ended.done():
                self._thread.join()

    def _begin(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._fill_defaults()
        home = self._place = self._orders.home = Home(loop)
        home.start()
        self.settle(home.loop)
        self._workers.home = home.loop
        for settings in self._early:
            home.post(self.emit, "setup", settings)
        # A success is told by `ready`, at home.
        self._thread.settled.add_done_callback(self._failed)
        self._thread.start(self._settings)

    def _failed(self, settled: concurrent.futures.Future[None]) -> None:
        error = settled.exception()
        if error is not None:
            self._started.set_exception(error)

    # -- how workers are launched ---------------------------------------------------------------------------------

    def setup(self, **settings: Any) -> None:
        """Change how later workers are launched; those that are there stay as they are.

        Takes `exec`, `args`, `cwd`, `env`, `uid`, `gid`, `silent`, `stdio`, `interpreter`, `serialization`,
        `debug_port`, `debug_wait` and `profile`, and leaves what is not named.  Each call, an empty one too, tells
        `setup` with the settings as they are then.
        """
        for name in settings:
            if name not in LAUNCH_CHECKS:
                raise SettingsError(f"setup cannot change {name!r}{near_match(name, LAUNCH_CHECKS)}")
        if settings.get("exec") and self._settings.app:
            raise SettingsError("app and exec exclude each other: workers serve an application or run a program")
        checked: dict[str, Any] = {name: LAUNCH_CHECKS[name](name, value) for name, value in settings.items()}
        if callable(checked.get("debug_port")) and self._settings.respawn:
            raise SettingValueError("debug_port", checked["debug_port"], NEEDS_FORK)
        new = dataclasses.replace(self._settings, **checked)
        make_places(new)
        self._settings = new
        self._fill_defaults()
        if self._place is None:
            self._early.append(self._settings)
        else:
            new = self._settings
            self._thread.post(lambda engine: engine.setup(new))
            self._place.post(self.emit, "setup", new)

    def _fill_defaults(self) -> None:
        if not self._settings.app and not self._settings.exec:
            script = main_script()
            self._settings = dataclasses.replace(
                self._settings, exec=script["exec"], args=self._settings.args or script["args"]
            )

    @property
    def scheduling_policy(self) -> str:
        """`SCHED_RR`, `SCHED_LEAST`, `SCHED_HASH`, `SCHED_NONE` or "package.module:Class".

        May be changed until the cluster starts; after that raises `ClusterError`.
        """
        return self._settings.policy

    @scheduling_policy.setter
    def scheduling_policy(self, policy: str) -> None:
        if self._thread.is_started:
            raise ClusterError(f"the scheduling policy stays {self._settings.policy!r} once the cluster has started")
        self._settings = dataclasses.replace(self._settings, policy=check_policy(policy))

    # -- change ---------------------------------------------------------------------------------------------------

    def fork(self, env: Mapping[str, str] | None = None) -> Worker:
        """Start one worker more, with these variables besides what it inherits.

        With `respawn` (the default) one more is wanted from now on, and replacements inherit `env` as well.  One whose
        process cannot be started tells `error`, with the exception (an OSError), and `exit`.  Raises `ClusterError` if
        the cluster does not run, or is stopping, and `SettingsError` (a ValueError) if no process can be given such
        variables, or `debug_port` is a function and gives no port.
        """
        variables = environment("env", env or {})
        # A function of the program's is called here, and not by the engine.
        function = self._settings.debug_port
        port = exact_port("debug_port", function()) if callable(function) else None
        worker = self._thread.ask(lambda engine: self._workers.forked(lambda: engine.fork(variables, port)))
        self._workers.enter(worker)
        return worker

    def disconnect(self) -> Pending[None]:
        """Have every worker finish what it holds and leave; done when all are dead.

        The cluster can `fork` again then; a cluster that respawns is scaled to none.
        """
        return self._orders.order(Engine.disconnect_all)

    def start_debugging(self, debug_port: str | int | None = None) -> Pending[dict[int, str]]:
        """Let debuggers (debugpy) attach to every worker, those to come included.

        `debug_port` is as in `setup`, but no function; without it the one that is set counts, or 127.0.0.1:5678.  Done
        when every worker that is there listens for its debugger, with `debug_addresses`: a worker takes a second or
        two for it, in which it serves nobody, and one that starts does it when its application is there.  Before the
        start it is only noted.
        """
        port = self._settings.debug_port if debug_port is None else check_debug_port("debug_port", debug_port)
        if callable(port):
            raise SettingsError("start_debugging takes a port, not a function: the workers are there already")
        port = DEFAULT if port is None else port
        require_debugpy("debug_port", port)
        self._settings = dataclasses.replace(self._settings, debug_port=port)
        if not self._thread.is_started:
            return Pending.of({})
        return self._orders.order(lambda engine: engine.start_debugging(port))

    def log_stacks(self) -> None:
        """Log the stacks of every worker's threads and tasks, as SIGPWR does for the command line.

        Does nothing if the cluster does not run, and never waits: the log has them within about a second.
        """
        self._thread.post(Engine.show_stacks)

    def reopen_logs(self) -> Pending[None]:
        """Open the log's files (`access_logfile`, `error_logfile`) again, as SIGUSR1 does for the command line.

        For when they were renamed: files of the old names are made.  The workers' own `FileHandler`s of Python's
        logging follow.  Done when no line goes to the old files any more; a worker that holds its event loop takes as
        long as it does that.  Fails with `ClusterError` if a file cannot be opened, or the cluster does not run.
        """
        return self._orders.order(Engine.reopen_logs)

    @property
    def debug_addresses(self) -> dict[int, str]:
        """Where debuggers can attach now, HOST:PORT by worker's id."""
        return self._thread.ask(Engine.debuggers)

    def scale(self, workers: int) -> None:
        """Have `workers` workers, and return when it is so.

        Raises `BootError` if workers die again and again before they are of use: the cluster goes on trying to have as
        many as it was told.  Raises `ClusterError` if it does not run, or if the number is the program's business.
        """
        if workers < 1:
            raise SettingsError(f"a cluster has at least 1 worker, not {workers}")
        self._orders.obeyed(lambda engine: engine.scale(workers))

    def reload(self) -> None:
        """Replace every worker by a fresh one, one at a time, and return when it is done.

        Raises `BootError` if a replacement cannot start: the old workers go on then.
        """
        self._orders.obeyed(Engine.reload)

    # -- messages -------------------------------------------------------------------------------------------------

    def broadcast(self, obj: Any, *sockets: Any, keep_open: bool | None = None) -> Pending[int]:
        """Send a message to every worker that is connected; the result is for how many of them the kernel has it.

        It is encoded once.  Sockets are as in `Worker.send`; each worker gets copies.
        """
        return broadcast(self._workers.values(), obj, sockets, keep_open)

    def on_request(self, handler: H | None = None) -> Any:
        """Answer the workers' requests with what `handler(worker, obj)`, or `handler(worker, obj, sockets)`, returns.

        Without a handler, a decorator; otherwise as `Worker.on_request`, which goes before it for that one worker.
        """
        if handler is None:
            return self.on_request
        if not callable(handler):
            raise TypeError(f"a handler of requests is a function, not {handler!r}")
        self._orders.request_handler = handler
        return handler

    # -- telling --------------------------------------------------------------------------------------------------

    def _emitted(self, event: Event) -> None:
        """On the engine's thread."""
        assert self._place is not None
        engine = self._thread.engine
        pickled = engine is not None and engine.settings.serialization == "pickle"
        worker = self._workers.about(event, pickled) if isinstance(event, AboutWorker) else None
        self._place.post(self._tell, event, worker)

    def _tell(self, event: Event, worker: Worker | None) -> None:
        """On the home loop."""
        assert self._place is not None
        if isinstance(event, AboutWorker) and worker is not None:
            self._workers.tell(worker, event)
            if isinstance(event, Messaged):
                if self._place.is_open:
                    worker.received(event.envelope, event.riders)
                return
            if isinstance(event, Disconnected | Exited):
                worker.channel_closed()
        # A program's loop may be closed before the cluster ends: then nobody is left to be told.
        if self._place.is_open:
            details = arguments(event)
            if worker is not None:
                details = (worker, *details[1:])
                if isinstance(event, Forked):
                    sys.audit("clusterserve.fork", worker.id, worker.slot, worker.pid)
                if event.name in WORKER_EVENTS:
                    worker.emit(event.name, *details[1:])
            self.emit(event.name, *details)
        if isinstance(event, BecameReady) and not self._started.done():
            self._started.set_result(None)

    # -- looking in -----------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """What it was made with, and `setup` has changed; frozen, itself and what it holds."""
        return self._settings

    @property
    def urls(self) -> list[str]:
        """Where each bind is reached from this machine; "unix:PATH" for a unix socket."""
        return self._thread.ask(lambda engine: [listener.url for listener in engine.handles if listener.pinned])

    @property
    def url(self) -> str:
        """The first of `urls`."""
        return self.urls[0]

    @property
    def workers(self) -> Mapping[int, Worker]:
        """The workers by id, oldest first, from `fork` until each is dead.  Live: as far as handlers have been told."""
        return self._workers

    def statistics(self) -> Statistics:
        """Connections by state and by worker, now."""
        return self._thread.ask(Engine.statistics)

    def __repr__(self) -> str:
        state = "running" if self._thread.is_started else "new"
        what = self.settings.app or self.settings.exec
        return f"<Cluster {what!r} {'stopped' if self._thread.ended.done() else state}>"
