"""uvicorn's server as a worker runs it, in this process: the master is a thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from clusterserve.channel.board import Board
from clusterserve.core.messages import Closed, Leave, Listen, Listening
from clusterserve.currentworker import CurrentWorker
from clusterserve.errors import BootError
from clusterserve.settings import Settings
from clusterserve.tracebacks import of_application
from clusterserve.worker.asgi import CHATTER, _BootLog, _Drainer, _loop_class, import_protocols, serve
from clusterserve.worker.draining import CANCELLED, Draining
from clusterserve.worker.link import Link
from clusterserve.worker.membership import Membership
from clusterserve.worker.protocols import Borrowing
from clusterserve.worker.receiver import Receiver
from clusterserve.worker.server import FauxServer
from tests.helpers.raw import request
from tests.helpers.waiting import DEADLINE
from tests.worker.remote import Remote, settings

APP = "tests.worker.apps:app"
LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


@pytest.fixture
def loggers() -> Iterator[None]:
    """uvicorn's loggers, as they were before it configured them."""
    found = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, [*logger.handlers], [*logger.filters]) for logger in found]
    yield
    for logger, (level, propagate, handlers, filters) in zip(found, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers
        logger.filters[:] = filters


@pytest.fixture
def run(loggers: None) -> Iterator[Callable[..., Remote]]:
    """Serves in this thread while `master` talks to it from another; returns when both have ended."""
    opened = contextlib.ExitStack()

    def run(master: Callable[[Remote], None], values: Settings) -> Remote:
        remote = Remote()
        opened.callback(remote.close)
        connections = remote.connections.dup()
        opened.callback(connections.close)
        board, kept = Board.create(), select.epoll()
        opened.callback(board.close)
        opened.callback(kept.close)
        faults: list[BaseException] = []

        def talk() -> None:
            try:
                master(remote)
            except BaseException as exc:  # noqa: BLE001 - told below, in the test's own thread
                faults.append(exc)
                # So that it does not serve for ever.
                remote.drain(quick=True)

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            serve(values, Link(remote.theirs, connections, board, kept))
        finally:
            gc.unfreeze()
            remote.theirs.close()
            thread.join(DEADLINE)
        for fault in faults:
            raise fault
        return remote

    yield run
    opened.close()


def nothing(remote: Remote) -> None:
    """A master that has nothing to say."""


# ── a whole life ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_it_serves_until_it_is_told_to_finish(run: Any, loop: str, capfd: pytest.CaptureFixture[str]) -> None:
    def master(remote: Remote) -> None:
        remote.grant()
        assert remote.get("/path") == sys.path
        remote.drain()

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    remote = run(master, settings(APP, loop=loop))
    assert remote.goodbye() == [Closed(1)]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    # Starting and stopping are the master's to tell.
    assert capfd.readouterr() == ("", "")


def test_it_is_told_who_may_speak_first_and_how_many_may_wait(run: Any) -> None:
    def master(remote: Remote) -> None:
        for key, bind in enumerate(("127.0.0.1:0", "127.0.0.1:0", "unix:/run/x.sock")):
            asked = remote.expect(Listen)
            assert (asked.bind, asked.backlog, asked.client_speaks_first) == (bind, 77, True)
            remote.answer(asked, key)
            remote.expect(Listening)
        remote.drain()

    run(master, settings(APP, bind=["127.0.0.1:0", "127.0.0.1:0", "unix:/run/x.sock"], backlog=77))


def test_at_debug_level_uvicorn_tells_its_life(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    def master(remote: Remote) -> None:
        remote.grant()
        remote.drain()

    run(master, settings(APP, log_level="debug"))
    assert "Started server process" in capfd.readouterr().err


def test_a_log_configuration_of_its_own(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    log = tmp_path / "log.txt"
    file.write_text(
        '{"version": 1, "disable_existing_loggers": false,'
        f'"handlers": {{"file": {{"class": "logging.FileHandler", "filename": "{log}"}}}},'
        '"loggers": {"uvicorn.access": {"handlers": ["file"], "level": "INFO", "propagate": false}}}'
    )

    def master(remote: Remote) -> None:
        remote.grant()
        remote.get("/path")
        remote.drain()

    run(master, settings(APP, log_config=str(file), access_log=True))
    assert '"GET /path HTTP/1.1" 200' in log.read_text()
    for handler in logging.getLogger("uvicorn.access").handlers:
        handler.close()


def test_signals_ask_the_master(run: Any) -> None:
    def master(remote: Remote) -> None:
        remote.grant()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        remote.expect(Leave)
        remote.get("/path")
        remote.drain()

    run(master, settings(APP))


class TestStopping:
    """A request that does not end by itself."""

    def waiting(self, remote: Remote, capfd: pytest.CaptureFixture[str]) -> socket.socket:
        remote.grant()
        client = remote.hand(request("GET", "/wait"))
        out = ""
        while "in the handler" not in out:
            out += capfd.readouterr().out
        return client

    def test_quickly(self, run: Any, capfd: pytest.CaptureFixture[str]) -> None:
        def master(remote: Remote) -> None:
            with self.waiting(remote, capfd) as client:
                remote.drain(30.0, quick=True)
                assert client.recv(1) == b""

        run(master, settings(APP))
        # It was told to: no error of anybody's.
        assert capfd.readouterr().err == ""

    def test_quickly_after_all(self, run: Any, capfd: pytest.CaptureFixture[str]) -> None:
        """The second order ends the waiting that the first has begun."""

        def master(remote: Remote) -> None:
            with self.waiting(remote, capfd) as client:
                remote.drain(30.0)
                remote.expect(Closed)
                remote.drain(30.0, quick=True)
                assert client.recv(1) == b""

        run(master, settings(APP))

    def test_when_its_time_is_over(self, run: Any, capfd: pytest.CaptureFixture[str]) -> None:
        def master(remote: Remote) -> None:
            with self.waiting(remote, capfd) as client:
                remote.drain(0.4)
                remote.expect(Closed)
                client.recv(1)

        run(master, settings(APP))
        err = capfd.readouterr().err
        assert "GET /wait is cut off: it has been running for 0 s" in err
        assert "Cancel 1 running task(s), timeout graceful shutdown exceeded" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(("grace", "left"), [(30.0, 28.8), (5.0, 3.8), (1.0, 0.6), (0.1, 0.0), (0.0, 0.0)])
    def test_the_applications_own_shutdown_has_its_share(self, grace: float, left: float) -> None:
        class Server:
            config = type("Config", (), {"timeout_graceful_shutdown": None})
            should_exit = False

        server: Any = Server()
        remote = Remote()
        link = Link(remote.theirs, remote.connections.dup(), Board.create(), remote.kept)
        draining = Draining(set())
        member = Membership(link, CurrentWorker(1, 0, os.getpid()))
        _Drainer(server, link, Borrowing(), draining, member)
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            link.attach(loop)
            member.begin(loop)
            link.on_drain(grace, False, False)
            link.receiver.close()
            loop.remove_reader(remote.theirs)
        assert server.config.timeout_graceful_shutdown == pytest.approx(left)
        assert server.should_exit
        assert draining.event.is_set()
        remote.close()


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestBootErrors:
    def fails(self, run: Any, app: str, **values: Any) -> BootError:
        with pytest.raises(BootError) as caught:
            run(nothing, settings(app, **values))
        return caught.value

    @pytest.mark.parametrize(
        ("app", "reason"),
        [
            ("no_such_module:app", 'Error loading ASGI app. Could not import module "no_such_module".'),
            ("os:no_such", 'Error loading ASGI app. Attribute "no_such" not found in module "os".'),
        ],
    )
    def test_it_is_not_found(self, run: Any, app: str, reason: str) -> None:
        assert self.fails(run, app).args == (reason,)

    def test_its_import_raises(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "raises_an_error.py").write_text("raise RuntimeError('trouble')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        error = self.fails(run, "raises_an_error:app")
        assert error.args == ("the application 'raises_an_error:app' could not be loaded",)
        assert error.traceback.splitlines()[:2] == [
            "Traceback (most recent call last):",
            f'  File "{tmp_path}/raises_an_error.py", line 1, in <module>',
        ]

    def test_its_import_exits_and_says_why(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "exits_with_a_word.py").write_text("raise SystemExit('SECRET_KEY is not set')\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        error = self.fails(run, "exits_with_a_word:app")
        assert error.args == ("the application 'exits_with_a_word:app' could not be started",)
        assert error.traceback == "SECRET_KEY is not set\n"

    def test_its_lifespan_fails(self, run: Any, capfd: pytest.CaptureFixture[str]) -> None:
        error = self.fails(run, "tests.helpers.apps.lifespans:fails_at_startup")
        assert error.args == ("the application 'tests.helpers.apps.lifespans:fails_at_startup' could not be started",)
        assert "RuntimeError: the lifespan's own trouble" in error.traceback
        # Not printed by every worker as well.
        assert capfd.readouterr() == ("", "")

    def test_the_protocol_is_not_found(self, run: Any) -> None:
        error = self.fails(run, APP, http="no_such_module:Protocol")
        reason = 'The protocol of --http or --ws is missing. Could not import module "no_such_module".'
        assert error.args == (reason,)

    def test_a_listener_that_cannot_be_had(self, run: Any) -> None:
        def master(remote: Remote) -> None:
            from clusterserve.core.messages import Listened

            asked = remote.expect(Listen)
            remote.send(Listened(asked.request, 0, 98, "cannot listen", socket.AF_UNSPEC, "", False))

        with pytest.raises(BootError) as caught:
            run(master, settings(APP))
        assert "OSError: [Errno 98] cannot listen" in caught.value.traceback


class Trouble(Exception):  # noqa: N818
    """Nobody's in particular."""


@pytest.mark.parametrize("trouble", [Trouble(), SystemExit(5)])
def test_a_failure_when_it_serves_is_its_own(run: Any, trouble: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """No boot failure: the boot has succeeded."""

    def master(remote: Remote) -> None:
        remote.grant()
        remote.drain()

    async def wait_closed(server: FauxServer) -> None:
        raise trouble

    monkeypatch.setattr(FauxServer, "wait_closed", wait_closed)
    # Without epolls of its own: the traceback keeps the loop alive, and nobody closes it.
    monkeypatch.setattr(Receiver, "borrow", lambda *arguments, **options: None)
    with pytest.raises(type(trouble)) as caught:
        run(master, settings(APP))
    assert caught.value is trouble


# ── the pieces ──────────────────────────────────────────────────────────────────────────────────────────────────────


class TestTheEventLoop:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("auto", uvloop.Loop),
            ("uvloop", uvloop.Loop),
            ("asyncio", asyncio.SelectorEventLoop),
            ("asyncio:SelectorEventLoop", asyncio.SelectorEventLoop),
        ],
    )
    def test_its_class(self, name: str, wanted: type[Any]) -> None:
        assert _loop_class(name) is wanted

    def test_without_uvloop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "uvloop", None)
        assert _loop_class("auto") is asyncio.SelectorEventLoop
        with pytest.raises(BootError, match=r"^the event loop 'uvloop' cannot be had: "):
            _loop_class("uvloop")

    @pytest.mark.parametrize("name", ["no_such_module:Loop", "asyncio:NoSuchLoop", "no colon"])
    def test_it_cannot_be_had(self, name: str) -> None:
        with pytest.raises(BootError, match=f"^the event loop '{name}' cannot be had: "):
            _loop_class(name)

    @pytest.mark.parametrize("name", ["asyncio:new_event_loop", "asyncio:Queue"])
    def test_it_is_none(self, name: str) -> None:
        with pytest.raises(BootError, match=f"^--loop '{name}' is no event loop class"):
            _loop_class(name)


class TestBootLog:
    @pytest.fixture
    def log(self, loggers: None) -> tuple[logging.Logger, _BootLog, list[str]]:
        logger = logging.getLogger("uvicorn.error")
        boot, said = _BootLog(), []

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                said.append(record.getMessage())

        logger.handlers[:] = [Handler()]
        logger.addFilter(boot)
        logger.propagate = False
        logger.setLevel(logging.INFO)
        return logger, boot, said

    def test_errors_are_held_until_it_is_clear_who_tells_them(self, log: Any) -> None:
        logger, boot, said = log
        logger.info("first")
        logger.error("trouble with %s", "something")
        logger.warning("second")
        assert said == ["first", "second"]
        boot.release()
        assert said == ["first", "second", "trouble with something"]
        logger.error("more trouble")
        assert said[3:] == ["more trouble"]

    def test_what_is_held_as_text(self, log: Any) -> None:
        logger, boot, said = log
        logger.error("Exception in 'lifespan' protocol\n", exc_info=ValueError("trouble"))
        logger.error("Exiting.")
        assert boot.text() == "Exception in 'lifespan' protocol\nValueError: trouble\nExiting.\n"
        assert said == []

    def test_nothing_is_held(self, log: Any) -> None:
        _, boot, said = log
        assert boot.text() == ""
        boot.release()
        assert boot.text() == ""
        assert said == []

    def test_the_chatter(self, log: Any) -> None:
        logger, _, said = log
        for text in CHATTER:
            logger.info(text, *([1] if "%d" in text else []))
        assert said == []
        logger.setLevel(logging.DEBUG)
        for text in CHATTER:
            logger.info(text, *([1] if "%d" in text else []))
        assert len(said) == len(CHATTER)

    def test_an_error_that_did_not_happen(self, log: Any) -> None:
        logger, boot, said = log
        boot.release()
        logger.error(CANCELLED, 0)
        logger.error(CANCELLED, 2)
        assert said == [CANCELLED % 2]


class TestTraceback:
    def test_it_begins_with_the_applications_own_lines(self) -> None:
        try:
            Settings.from_json({})
        except KeyError as exc:
            own = of_application(exc)
        assert "in test_it_begins_with" in own

    def test_ours_is_better_than_nothing(self) -> None:
        """Nobody else is in it."""
        namespace: dict[str, Any] = {"__name__": "clusterserve.anything", "Trouble": Trouble}
        exec("def raises():\n    raise Trouble", namespace)
        with pytest.raises(Trouble) as caught:
            namespace["raises"]()
        # Without this test's own line.
        text = of_application(caught.value.with_traceback(caught.tb.tb_next))
        assert text.startswith("Traceback (most recent call last):\n")
        assert text.endswith("Trouble\n")


def test_a_blank_number_of_workers_is_none_for_whoever_imports_the_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "")
    import_protocols(settings(APP))
