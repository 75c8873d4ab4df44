"""SIGHUP reads the configuration again: what holds at once, what does not, and a file that is no good."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.server import Serve, Server
from tests.helpers.waiting import eventually

APP = """
import os

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": os.getcwd().encode() + b" RELEASE"})
"""

FILE = 'app = "site_main:app"\nworkers = 1\nbind = "127.0.0.1:0"\nlifespan = "off"\n'


def start(serve: Serve, directory: Path, text: str = FILE) -> Server:
    (directory / "site_main.py").write_text(APP)
    (directory / "clusterserve.toml").write_text(text)
    return serve("--chdir", str(directory), app="run", workers=None, bind=None)


def reload(server: Server, directory: Path, text: str) -> None:
    (directory / "clusterserve.toml").write_text(text)
    server.signal(signal.SIGHUP)


def test_what_has_changed_holds_for_the_new_workers(serve: Serve, tmp_path: Path) -> None:
    server = start(serve, tmp_path)
    assert "x-new" not in server.get("/").headers
    reload(server, tmp_path, FILE.replace("= 1", "= 2") + 'backlog = 7\nheader = "X-New: yes"\n')
    server.wait_for("The configuration has changed: workers, headers$")
    server.wait_for("Changed too, but only from the next start on: backlog$")
    server.wait_for("is listening", count=3)
    eventually(lambda: len(server.workers) == 2, "the old one has left, and there are two")
    assert server.get("/").headers["x-new"] == "yes"
    # None of the old generation was started for the greater number.
    assert len(server.announced) == 3
    assert server.found("Scaling from 1 to 2 workers")


def test_a_configuration_that_did_not_change_is_not_mentioned(serve: Serve, tmp_path: Path) -> None:
    server = start(serve, tmp_path)
    server.signal(signal.SIGHUP)
    server.wait_for("is listening", count=2)
    assert not server.found("hanged")


def test_a_bad_file_is_refused_and_nothing_is_done(serve: Serve, tmp_path: Path) -> None:
    server = start(serve, tmp_path)
    worker = server.workers[0]
    reload(server, tmp_path, FILE + "wokers = 2\n")
    server.wait_for(
        "Reload refused, nothing was done: clusterserve.toml: there is no setting 'wokers'; did you mean 'workers'"
    )
    assert server.get("/").status == 200
    assert server.announced == [worker]
    reload(server, tmp_path, FILE)
    server.wait_for("is listening", count=2)


def test_settings_with_which_nothing_starts_are_taken_back(serve: Serve, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "site_main.py").write_text("raise SystemExit")
    server = start(serve, tmp_path, FILE + 'env = ["RELEASE=1"]\n')
    bad = FILE.replace("site_main:app", "site_nowhere:app").replace("workers = 1", "workers = 3")
    reload(server, tmp_path, bad + f'env = ["RELEASE=2"]\nchdir = "{elsewhere}"\n')
    server.wait_for("Reload failed, generation 2 cannot start")
    # Its replacement is of what was good, and there is one.
    os.kill(server.workers[0].pid, signal.SIGKILL)
    server.wait_for("is listening", count=2)
    assert server.get("/").body.startswith(f"{tmp_path} ".encode())
    (worker,) = server.workers
    assert b"RELEASE=1" in Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    assert server.found("Scaling from 3 to 1 workers")
    # And so is whoever serves after what was good was read again.
    reload(server, tmp_path, FILE)
    server.wait_for("is listening", count=3)
    eventually(lambda: len(server.workers) == 1, "there is one")


@pytest.mark.parametrize("how", ["", "reload = true\n"], ids=["spawned", "forked"])
def test_a_release_is_switched_by_its_link(serve: Serve, tmp_path: Path, how: str) -> None:
    """Also for workers that are forked from a template that was started in the old one."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "site_main.py").write_text(APP.replace("RELEASE", name))
        (tmp_path / name / "clusterserve.toml").write_text(FILE + how)
    link = tmp_path / "current"
    link.symlink_to("one")
    server = serve("--chdir", str(link), app="run", workers=None, bind=None)
    assert server.get("/").body == f"{tmp_path}/one one".encode()
    link.unlink()
    link.symlink_to("two")
    server.signal(signal.SIGHUP)
    server.wait_for("is listening", count=2)
    eventually(lambda: server.get("/").body == f"{tmp_path}/two two".encode(), "the new release serves")


@pytest.mark.parametrize("how", ["", "reload = true\n"], ids=["spawned", "forked"])
def test_variables_are_read_again(serve: Serve, tmp_path: Path, how: str) -> None:
    (tmp_path / "site.env").write_text("FIRST=1\nTHIRD=3\n")
    text = FILE + how + 'env-file = "site.env"\n'
    server = start(serve, tmp_path, text)

    def variables() -> set[bytes]:
        (worker,) = server.workers
        found = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
        return {line for line in found if line.split(b"=")[0] in (b"FIRST", b"SECOND", b"THIRD")}

    assert variables() == {b"FIRST=1", b"THIRD=3"}
    (tmp_path / "site.env").write_text("FIRST=one\nSECOND=2\n")
    reload(server, tmp_path, text + "wokers = 2\n")
    server.wait_for("Reload refused, nothing was done")
    reload(server, tmp_path, text)
    server.wait_for("Variables have changed: FIRST, SECOND, THIRD$")
    eventually(lambda: [each.id for each in server.workers] == [2], "the new worker serves alone")
    assert variables() == {b"FIRST=one", b"SECOND=2"}
