"""As process 1 of a container: namespaces of its own, and the Dockerfile's own commands run in them, word by word."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.server import ROOT
from tests.helpers.waiting import DEADLINE, eventually

DOCKER = ROOT / "examples" / "docker"

pytestmark = [pytest.mark.needs_tool("unshare"), pytest.mark.needs_tool("nsenter"), pytest.mark.needs_tool("ip")]

ORPHANS = """
import subprocess

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    # The shell ends at once, and what it has started is nobody's.
    done = subprocess.run(["sh", "-c", "sleep 0.3 >/dev/null & echo $!"], stdout=subprocess.PIPE)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": done.stdout})
"""


def dockerfile(word: str) -> list[str]:
    """The arguments of an instruction in its JSON form."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    (found,) = re.findall(rf"^{word}\b[^\[\n]*(\[.*\])$", text, re.MULTILINE)
    arguments = json.loads(found)
    assert isinstance(arguments, list)
    return arguments


class Container:
    """A process 1 with process ids, mounts and a loopback of its own."""

    def __init__(self, directory: Path, *command: str) -> None:
        rootless = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        self._enter = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        self._env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **dict(re.findall(r"\b(PYTHON\w+)=(\w+)", (DOCKER / "Dockerfile").read_text())),
        }
        self._directory = directory
        self.log = directory / "log"
        namespaces = ("--pid", "--fork", "--mount-proc", "--net", "--kill-child")
        up = 'ip link set lo up && exec "$@"'
        with self.log.open("wb") as log:
            self._unshare = subprocess.Popen(
                ["unshare", *rootless, *namespaces, "sh", "-c", up, "sh", *command],
                cwd=directory,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        #: What is process 1 inside, seen from outside.
        self.pid = int(eventually(lambda: children.read_text().split(), "it has been forked")[0])

    def wait_for(self, text: str, count: int = 1) -> None:
        eventually(lambda: self.log.read_text().count(text) >= count or self._unshare.poll() is not None, text)
        assert self.log.read_text().count(text) >= count, self.log.read_text()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run this inside, as `docker exec` does and as a health check is run."""
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), *self._enter, "-p", "-n", "-m", f"--wd={self._directory}", *command],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self._unshare.wait(DEADLINE)

    def close(self) -> None:
        self._unshare.kill()
        self._unshare.wait()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    directory = tmp_path / "shop"
    shutil.copytree(DOCKER, directory)
    return directory


@contextlib.contextmanager
def started(directory: Path, *command: str) -> Iterator[Container]:
    container = Container(directory, *command)
    try:
        yield container
    finally:
        container.close()


def test_the_dockerfiles_commands_word_by_word(image: Path) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "--workers", "2") as container:
        container.wait_for("is listening", 2)
        assert "master process 1" in container.log.read_text()
        health = container.run(*dockerfile("HEALTHCHECK"))
        assert (health.returncode, health.stdout, health.stderr) == (0, "200\n", "")
        assert "GET /health HTTP/1.1" in container.log.read_text()
        # Docker gives all containers the proxy of its own configuration.
        behind = container.run("env", "http_proxy=http://127.0.0.1:9", *dockerfile("HEALTHCHECK"))
        assert (behind.returncode, behind.stdout) == (0, "200\n")
        container.signal(signal.SIGTERM)
        assert container.wait() == 0
        assert container.log.read_text().endswith("Stopped, master process 1\n")


def test_the_health_check_fails_where_nobody_serves(image: Path) -> None:
    with started(image, "sleep", "60") as container:
        eventually(lambda: container.run("true").returncode == 0, "there is something to enter")
        health = container.run(*dockerfile("HEALTHCHECK"))
        assert health.returncode == 1
        assert "refused" in health.stdout
        assert health.stderr == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 131)], ids=["TERM", "INT", "QUIT"]
)
def test_the_signals_of_docker_stop_and_kill(image: Path, number: signal.Signals, code: int) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "-w", "1") as container:
        container.wait_for("is listening")
        container.signal(number)
        assert container.wait() == code


def test_an_application_that_cannot_be_loaded_is_the_containers_exit_code(image: Path) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), "no_such_shop:app", "-w", "1") as container:
        assert container.wait() == 3
        assert "no_such_shop" in container.log.read_text()


def test_a_stop_before_there_is_anything_to_stop(image: Path) -> None:
    """The kernel keeps signals from a process 1 that does not handle them: it would be killed, after ten seconds."""
    source = (
        "import os, signal\nfrom clusterserve import cli\n"
        "def gather(*args):\n    print('here', flush=True)\n    signal.pause()\n"
        "cli.gather = gather\ncli.main(['shop:app'])\n"
    )
    with started(image, "python", "-c", source) as container:
        container.wait_for("here")
        container.signal(signal.SIGTERM)
        assert container.wait() == 143


def test_what_dead_workers_children_leave_behind_is_reaped(image: Path) -> None:
    (image / "orphans.py").write_text(ORPHANS)
    with started(image, *dockerfile("ENTRYPOINT"), "orphans:app", "-b", "127.0.0.1:8000", "-w", "1") as container:
        container.wait_for("is listening")
        asked = container.run("curl", "-s", "http://127.0.0.1:8000/")
        orphan = asked.stdout.strip()
        assert orphan.isdecimal(), asked
        inside = Path(f"/proc/{container.pid}/root/proc")
        eventually(lambda: not (inside / orphan).exists(), "the orphan is dead, and is no zombie either")
        # The worker is process 1's child as well, and is not touched.
        assert container.run("curl", "-s", "http://127.0.0.1:8000/").stdout.strip().isdecimal()
        assert "exited" not in container.log.read_text()
        container.signal(signal.SIGTERM)
        assert container.wait() == 0


def test_a_worker_that_is_killed_is_reaped_by_who_waits_for_it(image: Path) -> None:
    with started(image, *dockerfile("ENTRYPOINT"), *dockerfile("CMD"), "-w", "2") as container:
        container.wait_for("is listening", 2)
        worker = re.findall(r"\(slot 0, pid (\d+)\) is listening", container.log.read_text())[0]
        container.run("sh", "-c", f"kill -9 {worker}")
        container.wait_for("was killed by SIGKILL")
        container.wait_for("is listening", 3)
        container.signal(signal.SIGTERM)
        assert container.wait() == 0


def test_the_compose_file_leaves_time_to_drain() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    shop = compose["services"]["shop"]
    assert int(shop["stop_grace_period"].removesuffix("s")) > 30
    assert shop["ports"] == ["8000:8000"]
    assert dockerfile("CMD")[-1].endswith(":8000")
