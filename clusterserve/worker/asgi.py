"""Serving an ASGI application with uvicorn: the one file that touches uvicorn.

uvicorn's `Server` runs as it is.  What is relied upon beyond its documented API has a contract test each
(tests/worker/test_uvicorn_contract.py): `Config.app` may be replaced before `load`, which
calls it if `factory` is set and reads `interface` after that, a loop factory may be given as
`Config.loop`, `startup(sockets=…)` passes each socket to `loop.create_server`, `should_exit` and
`config.timeout_graceful_shutdown` are read when they are needed, `Config.ssl` may be set after `load` and is passed to
`loop.create_server`, a protocol class may have `alpn_protocols`, `server_state.tasks` are the running requests,
`server_state.total_requests` those that are done, and the texts of its start-up and shutdown lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from inspect import signature
from socket import socket
from typing import Any, Final, cast

import uvicorn
from uvicorn.importer import ImportFromStringError, import_from_string

from .. import faults
from ..channel.tally import Crowd
from ..checks import MAX_SECONDS
from ..core.address import Address
from ..core.atoms import Who
from ..core.head import HeadLimits
from ..credentials import Credentials, terms
from ..currentworker import CurrentWorker
from ..errors import BootError, SettingsError
from ..log_files import WorkerFiles
from ..logs import access_logger, configure_worker
from ..settings import Settings
from ..tracebacks import of_application
from .access import Access
from .application import Application
from .concurrency import limited
from .deadline import Deadline
from .draining import CANCELLED, Draining
from .heart import Heart
from .identity import HTTP_1_1, Identity
from .limits import look_at_bodies
from .link import Link
from .loop import cluster_loop
from .membership import Membership
from .output import stdout_for_logs
from .preparations import Prepared
from .protocols import Borrowing, http_protocol
from .refusals import UVICORNS, Refusals
from .server import BindSocket
from .title import Title

logger = logging.getLogger("uvicorn.error")

#: Settings that uvicorn's Config takes under the same name.
_PASSED: Final = (
    "ws", "ws_max_size", "ws_max_queue", "ws_ping_interval", "ws_ping_timeout", "ws_per_message_deflate",
    "lifespan", "log_level", "proxy_headers", "server_header", "date_header",
    "forwarded_allow_ips", "root_path", "backlog", "timeout_keep_alive", "h11_max_incomplete_event_size",
    "reset_contextvars",
)  # fmt: skip

#: What uvicorn says of every start and stop.  The master says it once for all; `--log-level debug` brings these back.
CHATTER: Final = frozenset(
    {
        "Started server process [%d]",
        "Waiting for application startup.",
        "Application startup complete.",
        "ASGI 'lifespan' protocol appears unsupported.",
        "Shutting down",
        "Waiting for connections to close. (CTRL+C to force quit)",
        "Waiting for background tasks to complete. (CTRL+C to force quit)",
        "Waiting for application shutdown.",
        "Application shutdown complete.",
        "Finished server process [%d]",
    }
)

#: Of the grace the master allows, what is left for the application's own shutdown (seconds, at most a fifth).
_LIFESPAN_SHARE: Final = 1.0

#: How long a worker that leaves waits for TLS handshakes that have begun (seconds).
_HANDSHAKES: Final = 2.0

#: What uvicorn's shutdown takes outside of its own time limit: noticing it, and a pause (seconds).
_UNTIMED: Final = 0.2


def preload(settings: Settings, log: WorkerFiles) -> Any:
    """The application, for every worker that will be forked from this process; raises `BootError` as `serve` does.

    Logging is configured before, as for an application that a worker imports, and not again in the workers: what the
    application has made of it stays.
    """
    _configure_logging(settings, log)
    config = uvicorn.Config(_nobody, interface="asgi3", **_passed(settings, "log_level", "http", "ws", "lifespan"))
    boot = _BootLog()
    logger.addFilter(boot)
    try:
        app = _imported(settings, boot)
        # Not for use: it imports the protocols, and says if one is missing.
        config.load()
        return app() if settings.factory else app
    except BootError:
        raise
    except ImportFromStringError as exc:
        raise BootError(f"The protocol of --http or --ws is missing. {exc}") from None
    except SystemExit as exc:
        raise _refused(settings, boot, exc) from None
    except BaseException as exc:
        # Also what is no error: a CancelledError, of a loop that is none of ours.
        raise _could_not_load(settings.app, boot, exc) from exc
    finally:
        logger.removeFilter(boot)
        boot.release()


def import_protocols(settings: Settings) -> None:
    """Import the protocols that are uvicorn's, for every worker that will be forked from this process."""
    # Another's may be the application's own, which each generation imports anew.  And if one is missing, the worker
    # will say so.
    known = [name for name in ("http", "ws") if ":" not in getattr(settings, name)]
    with contextlib.suppress(ImportError):
        uvicorn.Config(_nobody, interface="asgi3", **_passed(settings, *known)).load()


async def _nobody(scope: Any, receive: Any, send: Any) -> None:
    """In the place of an application where none is needed."""


def _imported(settings: Settings, boot: _BootLog) -> Any:
    """What the name of the application means; raises `BootError` if there is no such thing."""
    try:
        return import_from_string(settings.app)
    except ModuleNotFoundError as exc:
        if not _names(settings.app, exc.name):
            raise _could_not_load(settings.app, boot, exc) from None
        where, module = os.path.abspath(settings.app_dir or os.curdir), settings.app.partition(":")[0]
        reason = f'Could not import module "{module}": there is no "{exc.name}" in {where}, nor is it installed.'
        raise BootError(f"Error loading ASGI app. {reason}") from None
    except ImportFromStringError as exc:
        raise BootError(f"Error loading ASGI app. {exc}") from None
    except (Exception, SystemExit):
        raise
    except BaseException as exc:  # noqa: BLE001 - whoever calls us would take it for its own: a CancelledError, for one
        raise _could_not_load(settings.app, boot, exc) from None


def serve(
    settings: Settings,
    link: Link,
    worker: CurrentWorker | None = None,
    prepared: Prepared | None = None,
    files: Sequence[int] = (),
    credentials: Credentials | None = None,
) -> None:
    """Serve until the master says to drain.  Raises `BootError` if the application cannot be loaded or started.

    `worker` has its handlers on the application's loop, and is told what becomes of it.  `prepared` is what the
    template has made of which this process is a fork.  `files` are the descriptors of the log's files, from now on this
    function's own.
    `credentials` are for TLS.
    """
    prepared = prepared or Prepared()
    preloaded = prepared.app is not None
    borrowing = Borrowing(after_response=settings.borrows)
    worker = worker or CurrentWorker(0, 0, os.getpid())
    member = Membership(link, worker)
    access = _log(settings, link, worker, prepared.log, files)
    application = Application(settings, called=preloaded and settings.factory)
    refusals = UVICORNS if access is None else access.refusals
    config = _config(settings, link, borrowing, member, application, refusals)
    boot = _BootLog()
    logger.addFilter(boot)
    server = uvicorn.Server(config)
    title = Title(settings, lambda: _load(server))
    heart = Heart(settings, link.send, lambda: server.server_state.total_requests, application.stuck)
    draining = Draining(server.server_state.tasks, member.worker.id, member.worker.slot)
    link.on_stopping = draining.stopping.set
    logger.addFilter(draining)
    deadline = Deadline(server.server_state.tasks, settings.timeout_request) if settings.timeout_request else None
    if deadline is not None:
        logger.addFilter(deadline)
        if access is not None:
            access.overdue = deadline.ended
    _Drainer(server, link, borrowing, draining, member)
    expected = len(settings.binds)

    def listening(address: Address) -> None:
        nonlocal expected
        expected -= 1
        member.listens(address)
        if not expected:
            boot.release()
            member.started()
            heart.start(asyncio.get_running_loop())
            title.start(asyncio.get_running_loop())
            draining.watch(asyncio.get_running_loop())
            if deadline is not None:
                deadline.watch(asyncio.get_running_loop())
            if settings.timeout_request_body:
                look_at_bodies(
                    asyncio.get_running_loop(), server.server_state.connections, settings.timeout_request_body
                )
            # uvicorn has taken both for itself meanwhile.  A terminal's Ctrl-C and systemd's SIGTERM reach the whole
            # group, and what was accepted is served only if the master says who goes when.
            signal.signal(signal.SIGINT, _heed_the_master)
            signal.signal(signal.SIGTERM, lambda number, frame: link.ask_to_leave())

    link.on_listening = listening
    try:
        app = prepared.app if preloaded else _imported(settings, boot)
        config.app = partial(application.load, app, config)
        config.load()
        app = config.loaded_app
        if settings.limit_concurrency is not None and link.tally is not None:
            app = limited(app, Crowd(link.tally, link.place, settings.limit_concurrency))
        config.loaded_app = draining.announced(app if access is None else access.wrapped(app))
        if credentials is not None:
            protocols = getattr(config.http_protocol_class, "alpn_protocols", None) or HTTP_1_1
            # Who resumes a session is not asked for a certificate: the keys of other terms are not for us.
            inherited = prepared.tls if prepared.terms == terms(settings, credentials) else None
            identity = Identity(settings, credentials, protocols, inherited)
            config.ssl = identity.context
            link.on_renew = identity.renew
        # What exists now lives as long as the process: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        server.shutdown = member.says_goodbye(_after_handshakes(server, link))  # type: ignore[method-assign]
        shake = {"ssl_handshake_timeout": settings.timeout_request_header or MAX_SECONDS} if settings.tls else {}
        server.run(sockets=[cast("socket", BindSocket(bind, **shake)) for bind in settings.binds])
    except BootError:
        raise
    except ImportFromStringError as exc:
        # The application is imported first, and takes the place of its name.
        raise BootError(f"The protocol of --http or --ws is missing. {exc}") from None
    except SystemExit as exc:
        if expected:
            raise _refused(settings, boot, exc) from None
        raise
    except Exception as exc:
        if expected:
            raise _could_not_load(settings.app, boot, exc) from None
        raise


def _after_handshakes(server: uvicorn.Server, link: Link) -> Callable[..., Coroutine[Any, Any, None]]:
    """uvicorn's `shutdown`, which knows of a TLS connection when its handshake is done."""
    shutdown = server.shutdown

    async def finish(*args: Any, **options: Any) -> None:
        left: float = server.config.timeout_graceful_shutdown or 0.0
        await link.receiver.handshakes_done(min(_HANDSHAKES, left))
        await shutdown(*args, **options)

    return finish


def _load(server: uvicorn.Server) -> str:
    """What it does at this moment, for its title."""
    requests, connections = len(server.server_state.tasks), len(server.server_state.connections)
    return f"{'draining' if server.should_exit else 'listening'}, {requests} requests, {connections} connections"


def _names(app: str, module: str | None) -> bool:
    """Whether it is the application itself, or its package, that is missing, and not what it imports."""
    name = app.partition(":")[0]
    return module is not None and (name == module or name.startswith(f"{module}."))


def _could_not_load(app: str, boot: _BootLog, exc: BaseException) -> BootError:
    return BootError(f"the application {app!r} could not be loaded", boot.text() + of_application(exc))


def _refused(settings: Settings, boot: _BootLog, exc: SystemExit) -> BootError:
    """For an application that refuses to start, and may say why, as in sys.exit("SECRET_KEY is not set")."""
    why = f"{exc.code}\n" if isinstance(exc.code, str) else ""
    return BootError(f"the application {settings.app!r} could not be started", boot.text() + why)


def _configure_logging(settings: Settings, log: WorkerFiles) -> None:
    """Set up this process's log: handlers and filters, uvicorn's and ours."""
    try:
        with stdout_for_logs(log.places.error) if settings.capture_output else contextlib.nullcontext(1) as stdout:
            places = log.places if log.places.access != 1 else log.places._replace(access=stdout)
            configure_worker(settings, places)
    except SettingsError as exc:
        raise BootError(str(exc)) from None


def _log(
    settings: Settings, link: Link, worker: CurrentWorker, log: WorkerFiles | None, files: Sequence[int]
) -> Access | None:
    """Log to `files`, in a `log` that the template has set up, or of our own; returns what writes the access log, if
    uvicorn does not do that itself."""
    if log is None:
        log = WorkerFiles(settings, files)
        _configure_logging(settings, log)
    else:
        log.take(files)
    link.on_reopen = log.reopen
    ours = access_logger(settings)
    if ours is None:
        return None
    access = Access(ours, settings, Who(worker.id, worker.slot, os.getpid()))
    logger.addFilter(access)
    return access


def _passed(settings: Settings, *names: str) -> dict[str, Any]:
    """These settings, for uvicorn's Config, which is to set the levels of its loggers, and to leave the rest to us."""
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    # Without `workers` it reads WEB_CONCURRENCY, which may be blank.
    options["workers"] = 1
    return {**options, "log_config": None, "access_log": settings.access_log and not settings.own_access_log}


def _config(
    settings: Settings,
    link: Link,
    borrowing: Borrowing,
    member: Membership,
    application: Application,
    refusals: Refusals,
) -> uvicorn.Config:
    options = _passed(settings, *_PASSED)
    # Under `none` the workers accept, and everything is uvicorn's.
    handed = settings.policy != "none"
    limits = HeadLimits(settings.limit_request_line, settings.limit_request_fields, settings.limit_request_field_size)
    options["http"] = http_protocol(settings.http, borrowing if handed else None, limits, refusals)
    if settings.http2:
        if "http2" not in signature(uvicorn.Config).parameters:
            raise BootError(f"--http2 needs a newer uvicorn than {uvicorn.__version__}, which has none")
        options["http2"] = True
    # What makes the application of what was imported is ours.
    config = uvicorn.Config(settings.app, headers=list(settings.headers), factory=True, **options)
    loop_class = cluster_loop(_loop_class(settings.loop), link)

    def factory() -> asyncio.AbstractEventLoop:
        loop = loop_class()
        link.attach(loop)
        link.receiver.timed = settings.own_access_log
        member.begin(loop)
        if handed:
            link.receiver.borrow(
                link.kept if settings.borrows else None,
                keep=settings.dispatch != "request",
                head_timeout=settings.timeout_request_header,
                capacity=settings.worker_connections,
            )
            if application.threads is not None:
                link.receiver.keeping.employ(application.threads)
        return loop

    config.loop = factory  # type: ignore[assignment]
    return config


def _loop_class(name: str) -> type[Any]:
    """The event loop class of uvicorn's `--loop`: auto, asyncio, uvloop, or module:Class."""
    if name == "auto":
        try:
            import uvloop
        except ImportError:
            return asyncio.SelectorEventLoop
        return uvloop.Loop
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    try:
        found = import_from_string("uvloop:Loop" if name == "uvloop" else name)
    except (ImportError, ImportFromStringError) as exc:
        raise BootError(f"the event loop {name!r} cannot be had: {exc}") from None
    if not isinstance(found, type) or not issubclass(found, asyncio.AbstractEventLoop):
        raise BootError(f"--loop {name!r} is no event loop class; name one, as in 'uvloop:Loop'")
    return found


class _BootLog(logging.Filter):
    """Keeps uvicorn's lines about starting and stopping to itself, and holds its errors until it is clear who reports.

    N workers with one broken application would print one traceback N times: held errors go to the master if the boot
    fails, and to the log if it succeeds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] | None = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.INFO and record.msg in CHATTER:
            return logger.getEffectiveLevel() < logging.INFO
        if record.msg == CANCELLED and record.args == (0,):
            # Nothing was running: an error that did not happen.
            return False
        if self._held is not None and record.levelno >= logging.ERROR:
            self._held.append(record)
            return False
        return True

    def release(self) -> None:
        """The boot has succeeded: what was held is said now, and nothing is held any more."""
        held, self._held = self._held or [], None
        for record in held:
            logger.handle(record)

    def text(self) -> str:
        """What was held, as text."""
        formatter = logging.Formatter("%(message)s")
        return "".join(formatter.format(record).rstrip() + "\n" for record in self._held or [])


class _Drainer:
    """Does what the master's Drain asks, with uvicorn's own means."""

    def __init__(
        self, server: uvicorn.Server, link: Link, borrowing: Borrowing, draining: Draining, member: Membership
    ) -> None:
        self._server = server
        self._borrowing = borrowing
        self._draining = draining
        self._link = link
        self._member = member
        self._gives_back = not faults.on("idle-given-back")
        link.on_drain = self.drain

    def drain(self, grace: float, quick: bool, keep: bool) -> None:
        """Finish within `grace` seconds; `quick` cuts what is running, the application's shutdown runs all the same.

        `keep`: other workers go on, so idle connections go back to the master instead of being closed.
        """
        keep = keep and self._gives_back
        self._draining.begin()
        self._member.drains()
        quick = quick or self._member.in_a_hurry
        self._borrowing.after_response = keep
        left = 0.0 if quick else max(0.0, grace - _UNTIMED - min(_LIFESPAN_SHARE, grace / 5))
        # Read by uvicorn when it begins to wait; a second, quick order comes while it waits and ends what it waits for.
        self._server.config.timeout_graceful_shutdown = left  # type: ignore[assignment]
        self._server.should_exit = True
        if self._gives_back:
            self._link.receiver.stop_keeping(last=not keep)
        if quick:
            self._link.receiver.cut()
            self._draining.cut()


def _heed_the_master(number: int, frame: Any) -> None:
    """Do nothing: see `worker.main`."""
