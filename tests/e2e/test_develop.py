"""`--reload`: who saves a file sees what comes of it, whatever was in it before."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pexpect
import pytest

from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.raw import Address
from tests.helpers.server import LISTENING_ON, WORKER_LISTENS, Serve, Server, new_mark
from tests.helpers.waiting import DEADLINE, eventually

APP = """
import os

async def app(scope, receive, send):
    if scope["path"] != "/":
        from tests.helpers.apps.full import app

        return await app(scope, receive, send)
    body = b"WORD %d" % os.getpid()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
"""

BROKEN = "async def app(:\n"

WAITS = r"Nothing is served: waiting for a change of the files"


def save(directory: Path, source: str) -> None:
    """As an editor does it: another file takes its place."""
    (directory / "site_dev.py.new").write_text(source)
    os.replace(directory / "site_dev.py.new", directory / "site_dev.py")


def says(directory: Path, word: str) -> None:
    save(directory, APP.replace("WORD", word))


def start(serve: Serve, directory: Path, *options: str, **settings: object) -> Server:
    arguments = ("--chdir", str(directory), "--lifespan", "off", "--reload", *options)
    return serve(*arguments, app="site_dev:app", **settings)


def word(server: Server) -> str:
    return server.get("/").body.decode().partition(" ")[0]


def only(server: Server, wanted: str, workers: int) -> None:
    """Everybody serves this word, and nobody else is there."""

    def alone() -> bool:
        # Besides them there are the master, and the template whose forks they are.
        return word(server) == wanted and len(server.workers) == workers == len(server.processes()) - 2

    eventually(alone, f"all say {wanted}")


def test_all_workers_have_what_was_saved_and_no_client_notices(serve: Serve, tmp_path: Path) -> None:
    says(tmp_path, "one")
    server = start(serve, tmp_path, workers=2)
    server.wait_for(f"Watching for changes: {tmp_path}$")
    with under_load(server.address) as load:
        # Of one size, and soon after one another: Python must not take what it has compiled for what was saved.
        for turn in ("two", "six"):
            says(tmp_path, turn)
            eventually(lambda turn=turn: word(server) == turn, f"somebody says {turn}")  # type: ignore[misc]
        load.answered(10)
    only(server, "six", 2)
    assert server.found("Changed: site_dev.py$")
    # What is not the application's is nobody's business.
    known = len(server.found("Changed"))
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "module.py").touch()
    says(tmp_path, "new")
    only(server, "new", 2)
    assert len(server.found("Changed")) == known + 1


def test_a_broken_file_at_the_start_and_later(serve: Serve, tmp_path: Path) -> None:
    save(tmp_path, BROKEN)
    server = start(serve, tmp_path, workers=2, ready=False, noise=True)
    server.wait_for(WAITS)
    # Where it is, once, and nothing of ours.
    assert len(server.found("SyntaxError: invalid syntax")) == 1
    assert server.found(r'File ".*/site_dev\.py", line 1$')
    assert not server.found("Traceback|uvicorn|importlib")
    assert len(server.processes()) == 1
    save(tmp_path, "import no_such_thing_here\n")
    server.wait_for(WAITS, count=2)
    assert len(server.found("ModuleNotFoundError: No module named 'no_such_thing_here'")) == 1
    with server.connect() as client:
        # Who comes now is served by the first that can.
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        says(tmp_path, "one")
        assert client.response().body.startswith(b"one ")
    only(server, "one", 2)
    save(tmp_path, BROKEN)
    server.wait_for("Reload failed, generation 4 cannot start: .*; the old code serves on until the next change")
    assert len(server.found("SyntaxError: invalid syntax")) == 2
    only(server, "one", 2)
    says(tmp_path, "two")
    only(server, "two", 2)


def test_an_upgrade_of_broken_files_fails_and_one_of_good_files_is_reloaded_on(serve: Serve, tmp_path: Path) -> None:
    """A new master does not wait for a repair: the old one serves, and goes on doing so."""
    says(tmp_path, "one")
    server = start(serve, tmp_path, noise=True)
    save(tmp_path, BROKEN)
    server.wait_for("Reload failed, generation 2 cannot start")
    server.signal(signal.SIGUSR2)
    server.wait_for(
        r"Upgrade failed, the new master \(process \d+\) failed: it exited with code 3; .* serves on as before"
    )
    assert not server.found(WAITS)
    only(server, "one", 1)
    says(tmp_path, "two")
    only(server, "two", 1)
    server.upgrade()
    changed = len(server.found("Changed: site_dev.py$"))
    says(tmp_path, "six")
    only(server, "six", 1)
    assert len(server.found("Changed: site_dev.py$")) == changed + 1


def test_one_worker_unless_somebody_says_otherwise(serve: Serve, tmp_path: Path) -> None:
    says(tmp_path, "one")
    conf = tmp_path / "etc" / "site.conf"
    conf.parent.mkdir()
    conf.touch()
    server = start(serve, tmp_path / "etc", "--app-dir", "..", "--reload-extra-file", "site.conf", workers=None)
    server.wait_for(r"with 1 worker \(one, for development with --reload\)")
    conf.write_text("changed")
    server.wait_for("Changed: site.conf$")
    server.wait_for(WORKER_LISTENS, count=2)
    says(tmp_path, "two")
    only(server, "two", 1)


def test_it_ends_while_it_waits(serve: Serve, tmp_path: Path) -> None:
    save(tmp_path, BROKEN)
    server = start(serve, tmp_path, workers=1, ready=False, noise=True)
    server.wait_for(WAITS)
    # Nothing was ever served, and that is no success.
    assert server.stop() == 143
    assert len(server.found("SyntaxError: invalid syntax")) == 1


SCRIPT = """
import asyncio

async def answer(reader, writer):
    await reader.readline()
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 3\\r\\nConnection: close\\r\\n\\r\\nWORD")
    writer.close()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print("Listening on http://127.0.0.1:%d" % server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


def test_a_program_is_started_again(serve: Serve, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BROKEN)
    server = serve("--reload", str(script), app="exec", bind=None, workers=None, ready=False, noise=True)
    server.wait_for(WAITS)
    script.write_text(SCRIPT.replace("WORD", "one"))
    server.wait_for(LISTENING_ON)
    assert server.get("/").body == b"one"
    script.write_text(SCRIPT.replace("WORD", "two"))
    # Its port is a free one, so its successor's may be another.
    server.wait_for(WORKER_LISTENS, count=2)
    address = Address.parse(server.wait_for(LISTENING_ON, count=2)[1][1])
    assert address.port


@pytest.mark.parametrize("source", [APP, BROKEN], ids=["serving", "waiting"])
def test_one_ctrl_c_ends_it_all(tmp_path: Path, source: str) -> None:
    save(tmp_path, source)
    value, mark = new_mark()
    arguments = ["-m", "clusterserve", "site_dev:app", "--chdir", str(tmp_path), "--reload", "-w", "2"]
    env = {**os.environ, "CLUSTER_E2E_MARK": value}
    terminal = pexpect.spawn(
        sys.executable, [*arguments, "-b", "127.0.0.1:0"], env=env, encoding="utf-8", timeout=DEADLINE
    )
    try:
        terminal.expect("is listening.*is listening" if source is APP else WAITS)
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close()
    assert terminal.exitstatus == (0 if source is APP else 130)
    assert proc.marked(mark) == []


def test_who_closes_its_window_has_ended_it(tmp_path: Path) -> None:
    """SIGHUP is a reload where it is an order, and nobody is left to give one."""
    says(tmp_path, "one")
    value, mark = new_mark()
    arguments = ["-m", "clusterserve", "site_dev:app", "--chdir", str(tmp_path), "--reload", "-b", "127.0.0.1:0"]
    env = {**os.environ, "CLUSTER_E2E_MARK": value}
    terminal = pexpect.spawn(sys.executable, arguments, env=env, encoding="utf-8", timeout=DEADLINE)
    terminal.expect("is listening")
    terminal.kill(signal.SIGHUP)
    terminal.expect("Reloading: generation 2.*is listening")
    os.close(terminal.child_fd)
    eventually(lambda: proc.marked(mark) == [], "nobody is left")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
