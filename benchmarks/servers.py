"""The contenders: what each is called, what it needs, and the command line that makes it comparable.

Same application, number of workers, event loop and parser for all who let one choose; access log off, warnings only.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.without import STEPS

ROOT = Path(__file__).resolve().parent.parent
NODE_APP = Path(__file__).resolve().parent / "apps" / "hello_cluster.js"
REFERENCE = "uvicorn"

# Whatever the user's environment sets for these servers would give them unequal settings.
FOREIGN_PREFIXES = ("CLUSTERSERVE_", "UVICORN_", "GUNICORN_", "GRANIAN_", "NODE_CLUSTER_")
FOREIGN_NAMES = frozenset({"WEB_CONCURRENCY", "NODE_OPTIONS", "PORT"})


@dataclass(frozen=True)
class Setup:
    """What all contenders of one run have in common."""

    app: str
    workers: int
    loop: str = "uvloop"
    http: str = "httptools"
    dispatch: str | None = None

    @property
    def import_string(self) -> str:
        return f"benchmarks.apps.{self.app}:app"


@dataclass(frozen=True)
class Contender:
    name: str
    package: str
    command: Callable[[Setup, int], list[str]]
    environ: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str:
        """Why this contender cannot take part; empty when it can."""
        if self.package == "node":
            return "" if shutil.which("node") else "no `node` on PATH"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return "" if importlib.util.find_spec(f"{self.package}.__main__") else f"{self.package} has no __main__ module"

    def version(self) -> str:
        if self.package == "node":
            shown = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True, timeout=10)
            return shown.stdout.strip().removeprefix("v")
        worker = f" -k {_gunicorn_worker()}" if self.package == "gunicorn" else ""
        return package_version(self.package) + worker

    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(FOREIGN_PREFIXES) and name not in FOREIGN_NAMES
        }
        return {**kept, **self.environ}


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def choose(names: list[str]) -> list[Contender]:
    for name in names:
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise BenchmarkError(f"unknown contender {name!r}{meant} (known: {', '.join(CONTENDERS)})")
    return [CONTENDERS[name] for name in dict.fromkeys(names)]


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _clusterserve(policy: str) -> Callable[[Setup, int], list[str]]:
    def command(setup: Setup, port: int) -> list[str]:
        dispatch = ["--dispatch", setup.dispatch] if setup.dispatch else []
        where = ["--policy", policy, "--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}", *dispatch]
        return _module("clusterserve", setup.import_string, *where, *_uvicorn_options(setup))

    return command


def _without(step: str) -> Callable[[Setup, int], list[str]]:
    def command(setup: Setup, port: int) -> list[str]:
        _, _, _, app, *options = _clusterserve("rr")(setup, port)
        return _module("benchmarks.without", step, app.replace(":", "_without:"), *options)

    return command


def _uvicorn(setup: Setup, port: int) -> list[str]:
    where = ["--workers", str(setup.workers), "--host", "127.0.0.1", "--port", str(port)]
    return _module("uvicorn", setup.import_string, *where, *_uvicorn_options(setup))


def _uvicorn_options(setup: Setup) -> list[str]:
    return ["--loop", setup.loop, "--http", setup.http, "--no-access-log", "--log-level", "warning"]


def _gunicorn(setup: Setup, port: int) -> list[str]:
    kind = _gunicorn_worker()
    worker = ["-k", kind]
    if kind == "asgi":
        worker += ["--asgi-loop", setup.loop]
    elif (setup.loop, setup.http) != ("uvloop", "httptools"):
        # It takes loop and parser only from a subclass; left alone it finds uvloop and httptools by itself.
        raise ServerFailedError(f"gunicorn's {kind} has no option for the loop and the parser")
    if importlib.util.find_spec("gunicorn.ctl"):
        worker.append("--no-control-socket")
    where = ["--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
    return _module("gunicorn", setup.import_string, *worker, *where)


def _gunicorn_worker() -> str:
    """uvicorn's own worker class where it is installed, else the asgi worker that newer gunicorns have."""
    return "uvicorn_worker.UvicornWorker" if importlib.util.find_spec("uvicorn_worker") else "asgi"


def _granian(setup: Setup, port: int) -> list[str]:
    where = ["--workers", str(setup.workers), "--host", "127.0.0.1", "--port", str(port)]
    how = ["--interface", "asgi", "--loop", setup.loop, "--no-access-log", "--log-level", "warning"]
    return _module("granian", setup.import_string, *where, *how)


def _hypercorn(setup: Setup, port: int) -> list[str]:
    where = ["--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}"]
    return _module("hypercorn", setup.import_string, *where, "-k", setup.loop, "--log-level", "warning")


def _node(setup: Setup, port: int) -> list[str]:
    return ["node", str(NODE_APP), str(port), str(setup.workers)]


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("clusterserve-rr", "clusterserve", _clusterserve("rr")),
        Contender("clusterserve-none", "clusterserve", _clusterserve("none")),
        *(Contender(f"without-{step}", "clusterserve", _without(step)) for step in STEPS),
        Contender(REFERENCE, "uvicorn", _uvicorn),
        Contender("gunicorn", "gunicorn", _gunicorn),
        Contender("granian", "granian", _granian),
        Contender("hypercorn", "hypercorn", _hypercorn),
        Contender("node-rr", "node", _node, {"NODE_CLUSTER_SCHED_POLICY": "rr"}),
        Contender("node-none", "node", _node, {"NODE_CLUSTER_SCHED_POLICY": "none"}),
    )
}
