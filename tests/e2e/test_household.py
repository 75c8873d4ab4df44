"""What a server does to its own process: pid file, umask, title, group, and where the application's words go."""

from __future__ import annotations

import os
import pwd
import re
import signal
import tempfile
from pathlib import Path

import pytest

from tests.helpers import everybody, proc
from tests.helpers.raw import request
from tests.helpers.server import EXAMPLE, Serve, Server, run
from tests.helpers.waiting import eventually

PRINTS = "tests.helpers.apps.prints:app"


def test_the_pid_file_is_there_while_it_serves(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    server = serve("--pid", str(path))
    assert path.read_text() == f"{server.pid}\n"
    refused = run(EXAMPLE, "--bind", "127.0.0.1:0", "--pid", str(path))
    assert refused.code == 1
    assert refused.err == (
        f"clusterserve: error: the pid file {path} is in use: process {server.pid} is running; "
        "stop it, or choose another file\n"
    )
    assert server.stop() == 0
    assert not path.exists()


def test_the_pid_file_of_a_master_that_was_killed_is_replaced(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    killed = serve("-p", str(path))
    killed.kill()
    killed.wait()
    assert path.read_text() == f"{killed.pid}\n"
    server = serve("-p", str(path))
    assert path.read_text() == f"{server.pid}\n"


def test_a_start_that_fails_leaves_no_pid_file(tmp_path: Path) -> None:
    done = run("no_such:app", "--bind", "127.0.0.1:0", "--pid", str(tmp_path / "x.pid"))
    assert done.code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "name", "code"),
    [("--hooks=early", "TERM", 143), ("--hooks=early", "QUIT", 131), ("--policy=early:P", "TERM", 143)],
)
def test_a_stop_in_the_first_moments_leaves_no_pid_file(tmp_path: Path, option: str, name: str, code: int) -> None:
    """Hooks and policies are others' code, and may take long; hooks are imported on a thread of their own."""
    pid = tmp_path / "pid"
    pid.mkdir()
    (tmp_path / "early.py").write_text(
        f"import os, signal, time\nprint(os.listdir({str(pid)!r}))\n"
        f"os.kill(os.getpid(), signal.SIG{name})\ntime.sleep(100)\n"
    )
    done = run(EXAMPLE, "--bind", "127.0.0.1:0", option, "--app-dir", str(tmp_path), "--pid", str(pid / "x.pid"))
    assert (done.out, done.err, done.code) == ("['x.pid']\n", "", code)
    assert list(pid.iterdir()) == []


def test_other_orders_in_the_first_moments_wait_for_their_time(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(
        "import os, signal, time\nfor name in ('HUP', 'USR1'):\n"
        "    os.kill(os.getpid(), getattr(signal, f'SIG{name}'))\n"
        "    time.sleep(0.01)\ndef on_ready(): pass\n"
    )
    server = serve("--hooks", "early", workers=1, env={"PYTHONPATH": str(tmp_path)}, noise=True)
    server.wait_for("The log's files are reopened")
    server.wait_for("Reloading: generation 2 replaces 1")


def test_the_umask_is_everybodys(serve: Serve) -> None:
    server = serve("--umask", "027")
    for pid in (server.pid, server.workers[0].pid):
        assert "Umask:\t0027" in Path(f"/proc/{pid}/status").read_text()


def test_what_the_application_prints_goes_where_it_is_told(serve: Serve) -> None:
    server = serve("--capture-output", app=PRINTS)
    assert server.get("/first").status == 200
    server.wait_for(r"^printed: /first$")
    server.wait_for(r'"GET /first HTTP/1.1" 200 OK$')
    assert {line.stream for line in server.lines if "printed" in line.text} == {"err"}
    assert {line.stream for line in server.lines if '"GET' in line.text} == {"out"}


#: Longer than what workers' command lines have room for, if nothing is done about it.
NAME = "the shop at the end of the street, where everything is sold that anybody may ever want to buy"


def entitled(server: Server, does: str) -> int:
    """How many workers have a title that ends so."""
    return sum(
        proc.command(worker.pid) == f"clusterserve: worker {worker.id} (slot {worker.slot}) [{NAME}] {does}"
        for worker in server.workers
    )


@pytest.mark.needs_module("setproctitle")
def test_titles_say_who_it_is_and_what_it_does(serve: Serve) -> None:
    server = serve("--name", NAME, workers=2)
    eventually(lambda: proc.command(server.pid) == f"clusterserve: master [{NAME}] serving", "the master has its title")
    # By its environment it is found as before: so do these tests, and so do people.
    assert sorted(server.processes()) == sorted([server.pid, *(worker.pid for worker in server.workers)])
    eventually(lambda: entitled(server, "listening, 0 requests, 0 connections") == 2, "both workers have their titles")
    with server.connect() as client:
        client.send(request("GET", "/sleep?ms=60000"))
        eventually(lambda: entitled(server, "listening, 1 requests, 1 connections") == 1, "the load shows")
        server.terminate()
        eventually(lambda: "stopping" in proc.command(server.pid), "the master stops")
        eventually(lambda: entitled(server, "draining, 1 requests, 1 connections") == 1, "a worker drains")
        server.signal(signal.SIGQUIT)
        assert server.wait() == 131


def test_without_the_package_a_name_is_not_ignored_in_silence(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "setproctitle.py").write_text("raise ImportError")
    server = serve("--name", "shop", env={"PYTHONPATH": str(tmp_path)})
    assert server.found("--name changes nothing: the processes' titles need the package setproctitle")
    assert "clusterserve" in proc.command(server.pid)


def test_min_uptime_is_heeded(serve: Serve) -> None:
    """A worker that dies within it is not replaced at once."""
    server = serve("--min-uptime", "3600", "--restart-backoff", "600", "--restart-backoff-max", "600", workers=2)
    os.kill(server.workers[0].pid, signal.SIGKILL)
    server.wait_for("was killed by SIGKILL")
    assert server.get("/").status == 200
    assert len(server.announced) == 2


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ((), 0o666),
        (("--uds-permissions", "777"), 0o777),
        (("--umask", "007"), 0o660),
        (("--umask", "077", "--uds-permissions", "0o640"), 0o640),
    ],
)
def test_X02_the_mode_of_a_socket_file(serve: Serve, tmp_path: Path, options: tuple[str, ...], mode: int) -> None:  # noqa: N802
    path = tmp_path / "s"
    server = serve(*options, bind=f"unix:{path}")
    assert path.stat().st_mode & 0o777 == mode
    assert server.get("/").status == 200


@pytest.mark.needs_root
def test_workers_of_another_user_have_what_they_need_and_nothing_of_roots(serve: Serve) -> None:
    python = everybody.python()
    assert python is not None
    user, group = everybody.NOBODY, pwd.getpwuid(everybody.NOBODY).pw_gid
    with tempfile.TemporaryDirectory() as name:
        # pytest's own directories are root's alone.
        place = Path(name)
        place.chmod(0o711)
        options = ("--user", str(user), "--umask", "027", "--access-logfile", f"{place}/a", "--profile", f"{place}/p")
        path = {"PYTHONPATH": everybody.environment()["PYTHONPATH"]}
        bind = f"unix:{place}/s"
        server = serve(*options, app=PRINTS, bind=bind, workers=2, interpreter=python, env=path, ready=False)
        server.wait_ready()

        def owner(file: str) -> tuple[int, int]:
            found = (place / file).stat()
            return found.st_uid, found.st_gid

        assert {file: owner(file) for file in "aps"} == dict.fromkeys("aps", (user, group))
        assert (place / "s").stat().st_mode & 0o777 == 0o640
        for worker in server.workers:
            status = Path(f"/proc/{worker.pid}/status").read_text()
            assert f"Uid:\t{user}\t{user}\t{user}\t{user}\n" in status
            assert f"Gid:\t{group}\t{group}\t{group}\t{group}\n" in status
            assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)
            (groups,) = re.findall(r"^Groups:\t(.*?) ?$", status, re.MULTILINE)
            assert "0" not in groups.split()
        assert "Uid:\t0\t0\t0\t0\n" in Path(f"/proc/{server.pid}/status").read_text()
        # They may not make the file that comes after a rotation, and write to it all the same.
        (place / "a").rename(place / "b")
        server.signal(signal.SIGUSR1)
        server.wait_for("The log's files are reopened")
        assert server.get("/after").status == 200
        eventually(lambda: '"GET /after HTTP/1.1" 200' in (place / "a").read_text(), "the request is logged")
        assert owner("a") == (user, group)
        assert server.stop() == 0
        profiles = [owner(f"p/{file}") for file in os.listdir(place / "p")]
        assert profiles == [(user, group)] * 2


def test_the_workers_group(serve: Serve, tmp_path: Path) -> None:
    """Root may choose any, everybody else their own."""
    group = 65534 if os.geteuid() == 0 else os.getegid()
    path = tmp_path / "s"
    server = serve("--group", str(group), bind=f"unix:{path}", app=PRINTS)
    assert server.get("/").body.split()[0] == str(group).encode()
    assert path.stat().st_gid == group
    assert f"Gid:\t{os.getegid()}\t" in Path(f"/proc/{server.pid}/status").read_text()
