"""Programs as workers, as real processes with a master that the test plays."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from clusterserve.core.messages import Boot, Closed, Drain, Failed, Leave, Listen, Listening, Online
from clusterserve.worker.main import BOOT_FAILURE
from tests.helpers.waiting import eventually
from tests.worker.remote import ROOT, Worker, settings, starting

Run = Callable[..., Worker]

#: An echo server that says what becomes of it in a file named by its first argument.
ECHO = """
    import asyncio, sys
    from clusterserve import current_worker

    worker = current_worker()

    def note(*words):
        with open(sys.argv[1], "a") as file:
            print(*words, file=file)

    async def echo(reader, writer):
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    async def main():
        server = await asyncio.start_server(echo, "127.0.0.1", 8000)
        async with server:
            await server.serve_forever()

    @worker.on("draining")
    def draining():
        note("draining", worker.state, worker.is_connected())

    @worker.on("disconnect")
    async def disconnected():
        await asyncio.sleep(0.01)
        note("disconnect", worker.state, worker.is_connected(), worker.exited_after_disconnect)

    runner = asyncio.run
    if sys.argv[2:] == ["uvloop"]:
        import uvloop
        runner = uvloop.run
    try:
        runner(main())
    finally:
        note("finally")
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with ExitStack() as stack:

        def run(source: str, *args: str, name: str = "script.py", what: str = "") -> Worker:
            script = tmp_path / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(textwrap.dedent(source))
            worker = stack.enter_context(starting({"PYTHONPATH": str(ROOT)}, cwd=tmp_path))
            launch = {"exec": what or str(script), "args": list(args), "serialization": "json"}
            worker.send(Boot(1, 0, settings("unused:app").to_json(), [], launch))
            return worker

        yield run


@pytest.fixture
def online(run: Run) -> Run:
    def up(source: str, *args: str, **options: str) -> Worker:
        worker = run(source, *args, **options)
        assert worker.expect(Online) == Online(worker.pid)
        return worker

    return up


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ── as the interpreter would ────────────────────────────────────────────────────────────────────────────────────────

LOOK = """
    import sys
    with open(sys.argv[1], "w") as file:
        print(__name__, sys.modules["__main__"].__dict__ is globals(), sys.argv[2:], sys.path[0], file=file)
"""


class TestMain:
    def test_a_script(self, online: Run, out: Path, tmp_path: Path) -> None:
        worker = online(LOOK, str(out), "--flag", "word")
        assert worker.ends() == (0, "")
        assert out.read_text() == f"__main__ True ['--flag', 'word'] {tmp_path}\n"

    def test_a_module(self, online: Run, out: Path, tmp_path: Path) -> None:
        worker = online(LOOK, str(out), "word", name="package/inner.py", what="-m package.inner")
        assert worker.ends() == (0, "")
        assert out.read_text() == f"__main__ True ['word'] {tmp_path}\n"

    def test_a_directory(self, online: Run, out: Path, tmp_path: Path) -> None:
        worker = online(LOOK, str(out), name="package/__main__.py", what=str(tmp_path / "package"))
        assert worker.ends() == (0, "")
        assert out.read_text() == f"__main__ True [] {tmp_path / 'package'}\n"

    def test_its_exit_code_is_the_workers(self, online: Run) -> None:
        assert online("raise SystemExit(42)").ends() == (42, "")

    def test_what_it_raises_is_told_as_python_tells_it(self, online: Run, tmp_path: Path) -> None:
        code, err = online("1 / 0").ends()
        assert code == 1
        lines = err.splitlines()
        assert lines[:2] == [
            "Traceback (most recent call last):",
            f'  File "{tmp_path}/script.py", line 1, in <module>',
        ]
        assert lines[-1] == "ZeroDivisionError: division by zero"

    def test_one_that_does_not_exist(self, run: Run) -> None:
        worker = run("", what="missing.py")
        assert worker.expect(Failed) == Failed("the program 'missing.py' cannot be read: No such file or directory", "")
        assert worker.ends() == (BOOT_FAILURE, "")

    def test_one_that_is_none(self, run: Run) -> None:
        worker = run("def (:")
        failed = worker.expect(Failed)
        assert failed.reason.endswith("/script.py' is no Python program")
        assert failed.traceback.endswith("SyntaxError: invalid syntax\n")
        assert worker.ends() == (BOOT_FAILURE, "")

    def test_what_it_forks_is_no_worker(self, online: Run, out: Path) -> None:
        # Python ≥ 3.12 warns of any fork beside threads, and the control thread is one.
        source = """
            import os, sys, warnings
            from clusterserve import current_worker
            warnings.simplefilter("ignore", DeprecationWarning)
            if os.fork() == 0:
                with open(sys.argv[1], "w") as file:
                    print(current_worker(), file=file)
                os._exit(0)
            os.wait()
        """
        assert online(source, str(out)).ends() == (0, "")
        assert out.read_text() == "None\n"


# ── listening ───────────────────────────────────────────────────────────────────────────────────────────────────────


class TestListening:
    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_a_server_is_the_masters(self, online: Run, out: Path, loop: str) -> None:
        worker = online(ECHO, str(out), loop)
        asked = worker.expect(Listen)
        assert (asked.bind, asked.pinned, asked.client_speaks_first) == ("127.0.0.1:8000", False, False)
        worker.answer(asked)
        assert worker.expect(Listening) == Listening(1)
        with worker.hand(b"hello\n") as client:
            assert client.recv(100) == b"hello\n"

    def test_a_unix_server_too(self, online: Run, tmp_path: Path) -> None:
        source = """
            import asyncio
            async def main():
                await asyncio.start_unix_server(lambda reader, writer: None, "socket")
            asyncio.run(main())
        """
        assert online(source).expect(Listen).bind == f"unix:{tmp_path}/socket"

    def test_the_next_loop_may_listen_when_the_first_is_closed(self, online: Run) -> None:
        source = """
            import asyncio
            async def serve(forever):
                def connected(reader, writer):
                    writer.write(b"served")
                    writer.close()
                await asyncio.start_server(connected, "127.0.0.1", 8000)
                await asyncio.sleep(3600 if forever else 0)
            asyncio.run(serve(False))
            asyncio.run(serve(True))
        """
        worker = online(source)
        worker.grant()
        # Nobody has closed it: the end of its loop has.
        assert worker.expect(Closed) == Closed(1)
        worker.answer(worker.expect(Listen), 2)
        assert worker.expect(Listening) == Listening(2)
        with worker.hand(b"", 2) as client:
            assert client.recv(100) == b"served"

    def test_a_second_loop_may_not_meanwhile(self, online: Run) -> None:
        source = """
            import asyncio, threading
            async def serve():
                await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 8000)
            async def main():
                await serve()
                await asyncio.to_thread(asyncio.run, serve())
            asyncio.run(main())
        """
        worker = online(source)
        worker.grant()
        code, err = worker.ends()
        assert code == 1
        assert err.splitlines()[-1].startswith("OSError: [Errno 16] another event loop of this worker listens already")


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestDrain:
    @pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
    def test_it_goes_when_its_last_connection_has_ended(self, online: Run, out: Path, loop: str) -> None:
        worker = online(ECHO, str(out), loop)
        worker.grant()
        with worker.hand(b"hello\n") as client:
            assert client.recv(100) == b"hello\n"
            worker.drain(keep=True)
            # No more of them, and this one goes on.
            assert worker.expect(Closed) == Closed(1)
            client.sendall(b"again\n")
            assert client.recv(100) == b"again\n"
            assert out.read_text() == "draining draining True\n"
        assert worker.goodbye() == []
        assert worker.ends() == (0, "")
        assert out.read_text().splitlines()[1:] == ["disconnect disconnected False True", "finally"]

    def test_quickly_it_waits_for_none(self, online: Run, out: Path) -> None:
        worker = online(ECHO, str(out))
        worker.grant()
        with worker.hand(b"hello\n") as client:
            assert client.recv(100) == b"hello\n"
            worker.drain(quick=True)
            assert worker.ends() == (0, "")
        assert out.read_text().splitlines()[1:] == ["disconnect disconnected False True", "finally"]

    def test_a_program_that_knows_nothing_of_us(self, online: Run, out: Path) -> None:
        source = """
            import sys, time
            try:
                time.sleep(3600)
            finally:
                open(sys.argv[1], "w").close()
        """
        worker = online(source, str(out))
        worker.drain()
        assert worker.ends() == (0, "")
        assert out.exists()

    @pytest.mark.parametrize("how", ["time.sleep(3600)", "asyncio.run(asyncio.sleep(3600))"])
    def test_it_may_choose_its_exit_code(self, online: Run, how: str) -> None:
        source = f"""
            import asyncio, sys, time
            from clusterserve import current_worker
            current_worker().on("disconnect", lambda: sys.exit(42))
            {how}
        """
        worker = online(source)
        worker.drain()
        assert worker.ends() == (42, "")

    def test_a_program_that_exits_by_itself_meanwhile(self, online: Run) -> None:
        source = """
            import asyncio, sys
            from clusterserve import current_worker
            current_worker().on("draining", lambda: sys.exit(7))
            asyncio.run(asyncio.sleep(3600))
        """
        worker = online(source)
        worker.drain()
        assert worker.ends() == (7, "")

    def test_it_asks_to_be_let_go_once(self, online: Run) -> None:
        source = """
            import time
            from clusterserve import current_worker
            worker = current_worker()
            assert worker.disconnect() is worker.disconnect() is worker
            assert worker.is_connected() and not worker.is_dead()
            time.sleep(3600)
        """
        worker = online(source)
        assert worker.expect(Leave) == Leave()
        worker.drain()
        assert worker.goodbye() == []
        assert worker.ends() == (0, "")

    def test_destroy_does_not_wait_for_connections(self, online: Run) -> None:
        source = """
            import asyncio
            from clusterserve import current_worker
            async def main():
                await asyncio.start_server(lambda reader, writer: current_worker().destroy(), "127.0.0.1", 8000)
                await asyncio.sleep(3600)
            asyncio.run(main())
        """
        worker = online(source)
        worker.grant()
        with worker.hand(b""):
            assert worker.expect(Leave) == Leave()
            worker.drain(keep=True)
            assert worker.ends() == (-signal.SIGTERM, "")

    def test_destroy_when_it_is_disconnected(self, online: Run) -> None:
        source = """
            import time
            from clusterserve import current_worker
            current_worker().on("disconnect", lambda: current_worker().destroy("SIGUSR1"))
            time.sleep(3600)
        """
        worker = online(source)
        worker.drain()
        assert worker.ends() == (-signal.SIGUSR1, "")

    def test_kill_is_a_signal_and_nothing_else(self, online: Run) -> None:
        worker = online("from clusterserve import current_worker; current_worker().kill('SIGKILL')")
        assert worker.goodbye() == []
        assert worker.ends() == (-signal.SIGKILL, "")

    def test_sigterm_is_the_programs(self, online: Run, out: Path) -> None:
        worker = online("import sys, time; open(sys.argv[1], 'w').close(); time.sleep(3600)", str(out))
        eventually(out.exists, "the program runs")
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.ends() == (-signal.SIGTERM, "")

    def test_without_its_channel_it_ends_at_once(self, online: Run, out: Path) -> None:
        worker = online(ECHO, str(out))
        worker.grant()
        with worker.hand(b"hello\n") as client:
            assert client.recv(100) == b"hello\n"
            worker.channel.close()
            assert worker.ends() == (0, "")
        assert not out.exists()

    def test_told_before_it_began(self, run: Run) -> None:
        worker = run("import time; time.sleep(3600)")
        worker.send(Drain(10.0, False, False))
        assert worker.goodbye() == [Online(worker.pid)]
        assert worker.ends() == (0, "")
