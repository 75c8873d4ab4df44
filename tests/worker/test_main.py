"""A worker's start-up and end, as real processes."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve.core.messages import Closed, Drain, Failed, Leave, Listen, Online, encode
from clusterserve.current import SLOT_VARIABLE, VARIABLE
from clusterserve.worker.link import MASTER_GONE
from clusterserve.worker.main import BOOT_FAILURE
from tests.helpers import proc
from tests.helpers.waiting import DEADLINE, eventually
from tests.worker.remote import ENTRY, ROOT, Worker, settings, starting

APP = "tests.worker.apps:app"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One that serves, for all who only look."""
    with starting() as worker:
        worker.boot(settings(APP))
        assert worker.expect(Online) == Online(worker.pid)
        worker.grant()
        yield worker


class TestWhatItIs:
    def test_it_knows_which_worker_it_is(self, worker: Worker) -> None:
        assert worker.get("/me") == {"id": 1, "slot": 0, "pid": worker.pid, "real": worker.pid}

    def test_what_makes_it_one_is_gone_from_its_environment(self, worker: Worker) -> None:
        environ = worker.get("/environ")
        assert VARIABLE not in environ
        assert environ[SLOT_VARIABLE] == "0"

    def test_what_the_application_starts_is_no_worker(self, worker: Worker) -> None:
        child = worker.get("/child")
        assert child["variables"] == [SLOT_VARIABLE]
        assert child["worker"] == "None"
        # Neither of the channels.
        assert child["sockets"] == 0

    def test_what_the_application_starts_is_not_deaf(self, worker: Worker) -> None:
        # What Python itself ignores.
        assert worker.get("/child")["deaf"] == ["SIGPIPE", "SIGXFSZ"]

    def test_its_path_is_the_masters(self, worker: Worker) -> None:
        assert worker.get("/path") == sys.path

    def test_it_asks_to_listen_as_it_was_told(self, worker: Worker) -> None:
        (request,) = [message for message in worker.messages if isinstance(message, Listen)]
        assert request == Listen(request.request, "127.0.0.1:0", 2048, True, True)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"])
    def test_signals_are_the_masters_to_act_on(self, worker: Worker, name: str) -> None:
        worker.process.send_signal(getattr(signal, name))
        assert worker.get("/me")["real"] == worker.pid

    def test_sigterm_asks_the_master(self, worker: Worker) -> None:
        worker.process.send_signal(signal.SIGTERM)
        assert worker.expect(Leave) == Leave()
        assert worker.get("/me")["real"] == worker.pid


class TestItsPath:
    def test_without_the_masters_it_has_its_own(self, tmp_path: Path) -> None:
        with starting({"PYTHONPATH": str(ROOT)}, cwd=tmp_path) as worker:
            worker.boot(settings(APP), path=[])
            worker.expect(Online)
            worker.grant()
            path = worker.get("/path")
        # Not the directory of the file that is run: its modules are not for everybody.
        assert str(ENTRY.parent) not in path
        assert path[0] == str(ROOT)

    def test_the_package_is_found_where_the_file_lies(self, tmp_path: Path) -> None:
        """Whichever way the master found it: also one that nobody has installed."""
        package = tmp_path / "clusterserve"
        package.symlink_to(ROOT / "clusterserve")
        own = str(package / "worker")
        script = f"""if True:
            import runpy, sys
            # As if the file were run by its path.
            sys.path[0] = {own!r}
            runpy.run_path({own + "/__main__.py"!r})
            import clusterserve
            print(clusterserve.__file__, {own!r} in sys.path)
        """
        # No site-packages, no PYTHONPATH.
        found = subprocess.run(
            [sys.executable, "-S", "-c", script], cwd="/", env={}, capture_output=True, text=True, timeout=DEADLINE
        )
        assert found.stdout == f"{package / '__init__.py'} False\n", found.stderr


# ── bad starts ──────────────────────────────────────────────────────────────────────────────────────────────────────


class TestNotABoot:
    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", id="not ours"),
            pytest.param(struct.pack("<IBB", 2**31, 0, 0), id="too long"),
            pytest.param(struct.pack("<IBB", 2, 0, 0) + b"[]", id="no message"),
            pytest.param(struct.pack("<IBB", 0, 0, 0), id="empty"),
            pytest.param(encode(Drain(1.0, False, False)), id="another message"),
            pytest.param(struct.pack("<IBB", 8, 0, 0) + b'["Boot"]', id="another version"),
        ],
    )
    def test_the_master_is_told(self, data: bytes) -> None:
        """And the channel stays open: a worker that waited for more would wait for ever."""
        with starting() as worker:
            worker.channel.sendall(data)
            failed = worker.expect(Failed)
            assert failed.reason.startswith(
                "the worker does not understand its master, which may be of another version"
            )
            assert worker.ends() == (BOOT_FAILURE, "")

    @pytest.mark.parametrize("data", [b"", encode(Drain(1.0, False, False))[:3], encode(Drain(1.0, False, False))[:-1]])
    def test_the_master_is_gone_before_it_has_said_everything(self, data: bytes) -> None:
        with starting() as worker:
            worker.channel.sendall(data)
            worker.channel.close()
            assert worker.ends() == (MASTER_GONE, "")

    def test_the_parent_is_another(self) -> None:
        """Its master ended before it could tie its life to it."""
        with starting(master=1 if os.getpid() != 1 else 2) as worker:
            assert worker.ends() == (MASTER_GONE, "")


class TestBootFailures:
    """Told to the master, printed by nobody else."""

    def fails(self, app: str, **values: Any) -> Failed:
        with starting() as worker:
            worker.boot(settings(app, **values))
            worker.expect(Online)
            failed = worker.expect(Failed)
            assert worker.goodbye() == []
            assert worker.ends() == (BOOT_FAILURE, "")
            return failed

    def test_no_such_module(self) -> None:
        failed = self.fails("no_such_module:app")
        assert failed == Failed('Error loading ASGI app. Could not import module "no_such_module".', "")

    def test_an_import_that_raises(self) -> None:
        failed = self.fails("tests.helpers.apps.raises:app")
        assert failed.reason == "the application 'tests.helpers.apps.raises:app' could not be loaded"
        # From its author's point of view: neither ours nor uvicorn's nor the importer's lines.
        lines = failed.traceback.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert "tests/helpers/apps/raises.py" in lines[1]
        assert "importlib" not in failed.traceback

    def test_an_import_that_raises_what_is_no_error(self) -> None:
        """Which the template, or a loop, would take for its own; and so much of it that no message holds it."""
        failed = self.fails("tests.helpers.apps.cancelled:app")
        assert failed.reason == "the application 'tests.helpers.apps.cancelled:app' could not be loaded"
        assert "CancelledError: begun " in failed.traceback
        assert failed.traceback.endswith(" done\n")
        assert "characters are left out" in failed.traceback

    def test_a_lifespan_that_fails(self) -> None:
        failed = self.fails("tests.helpers.apps.lifespans:fails_at_startup")
        assert failed.reason == "the application 'tests.helpers.apps.lifespans:fails_at_startup' could not be started"
        assert "RuntimeError: the lifespan's own trouble" in failed.traceback

    def test_a_protocol_that_is_none(self) -> None:
        failed = self.fails(APP, http="no_such_module:Protocol")
        assert failed.reason == 'The protocol of --http or --ws is missing. Could not import module "no_such_module".'


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestTheEnd:
    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_drained(self, loop: str) -> None:
        with starting() as worker:
            worker.boot(settings(APP, loop=loop))
            worker.expect(Online)
            worker.grant()
            worker.drain()
            assert worker.goodbye() == [Closed(1)]
            assert worker.ends() == (0, "")

    def test_drained_before_it_listens(self) -> None:
        with starting() as worker:
            worker.boot(settings(APP))
            worker.expect(Online)
            asked = worker.expect(Listen)
            worker.drain()
            worker.answer(asked)
            assert [type(message).__name__ for message in worker.goodbye()] == ["Listening", "Closed"]
            assert worker.ends() == (0, "")

    def test_the_master_closes_its_channel(self) -> None:
        """What the parent-death signal does, for sure."""
        with starting() as worker:
            worker.boot(settings(APP))
            worker.expect(Online)
            worker.grant()
            worker.channel.close()
            assert worker.ends() == (MASTER_GONE, "")

    @pytest.mark.parametrize("doing", ["/wait", "/block", "/busy"])
    def test_it_dies_with_the_master_whatever_it_is_doing(self, doing: str) -> None:
        """The master is a process of its own here, and is killed."""
        code = """if True:
            import sys
            from tests.helpers.raw import request
            from tests.worker.remote import Worker, settings
            from clusterserve.core.messages import Online
            worker = Worker()
            worker.boot(settings("tests.worker.apps:app"))
            worker.expect(Online)
            worker.grant()
            print(worker.pid, flush=True)
            client = worker.hand(request("GET", sys.argv[1]))
            sys.stdin.read()
        """
        with subprocess.Popen(
            [sys.executable, "-c", code, doing], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as master:
            assert master.stdout is not None
            pid = int(master.stdout.readline())
            assert master.stdout.readline() == "in the handler\n"
            assert proc.alive(pid)
            master.kill()
            eventually(lambda: not proc.alive(pid), "the worker is gone")
