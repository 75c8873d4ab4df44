"""The contenders: what each is called, what it needs, and the command line that makes it comparable.

Same application, number of workers, event loop and parser for all who let one choose; access log off, warnings only.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.without import STEPS

ROOT = Path(__file__).resolve().parent.parent
NODE_APP = Path(__file__).resolve().parent / "apps" / "hello_cluster.js"
REFERENCE = "uvicorn"
GRANIAN_LONGEST = 60_000

# Whatever the user's environment sets for these servers would give them unequal settings.
FOREIGN_PREFIXES = ("CLUSTERSERVE_", "UVICORN_", "GUNICORN_", "GRANIAN_", "NODE_CLUSTER_")
FOREIGN_NAMES = frozenset({"WEB_CONCURRENCY", "NODE_OPTIONS", "PORT"})

# Contenders that are no Python packages, and how they tell their version.
PROGRAMS = {"node": ["--version"], "haproxy": ["-v"]}


@dataclass(frozen=True)
class Setup:
    """What all contenders of one run have in common."""

    app: str
    workers: int
    loop: str = "uvloop"
    http: str = "httptools"
    dispatch: str | None = None
    #: Seconds that an idle connection is kept; None for each server's own default.
    keep_alive: int | None = None
    #: A worker is replaced after so many requests; None for never.
    max_requests: int | None = None
    #: Of each worker, for a WSGI application; None for what is none.
    threads: int | None = None

    @property
    def import_string(self) -> str:
        """`app` is a module of `benchmarks.apps`, or `module:attribute`."""
        return f"benchmarks.apps.{self.app}" if ":" in self.app else f"benchmarks.apps.{self.app}:app"


@dataclass(frozen=True)
class Contender:
    name: str
    package: str
    command: Callable[[Setup, int], list[str]]
    environ: Mapping[str, str] = field(default_factory=dict)
    #: A module without which the package is not enough.
    needs: str = ""
    #: The events of `churn` that this server has an answer to.
    survives: frozenset[str] = frozenset({"HUP", "KILL", "RECYCLE"})

    def missing(self) -> str:
        """Why this contender cannot take part; empty when it can."""
        if self.package in PROGRAMS:
            return "" if shutil.which(self.package) else f"no `{self.package}` on PATH"
        if self.needs and importlib.util.find_spec(self.package) and not importlib.util.find_spec(self.needs):
            return f"this {self.package} has no {self.needs}"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return "" if importlib.util.find_spec(f"{self.package}.__main__") else f"{self.package} has no __main__ module"

    def version(self) -> str:
        if arguments := PROGRAMS.get(self.package):
            shown = subprocess.run([self.package, *arguments], capture_output=True, text=True, check=True, timeout=10)
            found = re.search(r"\d+(\.\d+)+", shown.stdout)
            return found[0] if found else ""
        worker = f" -k {_gunicorn_worker()}" if self.name == "gunicorn" else ""
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


def of_each_dispatch(contenders: Iterable[Contender], dispatches: Sequence[str]) -> list[Contender]:
    """Each clusterserve once with each of these, named after it; the others, and policy `none`, as they are."""
    found = []
    for contender in contenders:
        if contender.package == "clusterserve" and contender.name != "clusterserve-none" and dispatches:
            found += [_dispatching(contender, dispatch) for dispatch in dispatches]
        else:
            found.append(contender)
    return found


def _dispatching(contender: Contender, dispatch: str) -> Contender:
    def command(setup: Setup, port: int) -> list[str]:
        return contender.command(replace(setup, dispatch=dispatch), port)

    return replace(contender, name=f"{contender.name}/{dispatch}", command=command)


def _option(name: str, value: int | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _clusterserve(policy: str) -> Callable[[Setup, int], list[str]]:
    def command(setup: Setup, port: int) -> list[str]:
        dispatch = ["--dispatch", setup.dispatch] if setup.dispatch else []
        where = ["--policy", policy, "--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}", *dispatch]
        where += _option("--threads", setup.threads)
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
    limits = [*_option("--timeout-keep-alive", setup.keep_alive), *_option("--limit-max-requests", setup.max_requests)]
    return ["--loop", setup.loop, "--http", setup.http, "--no-access-log", "--log-level", "warning", *limits]


def _gunicorn(setup: Setup, port: int) -> list[str]:
    return _gunicorn_with(_gunicorn_worker(), setup, port)


def _gunicorn_asgi(setup: Setup, port: int) -> list[str]:
    return _gunicorn_with("asgi", setup, port)


def _gunicorn_sync(setup: Setup, port: int) -> list[str]:
    if setup.threads != 1:
        raise ServerFailedError("its workers have one thread for WSGI, and serve nothing else")
    return _gunicorn_with("sync", setup, port)


def _gunicorn_gthread(setup: Setup, port: int) -> list[str]:
    if setup.threads is None:
        raise ServerFailedError("its workers serve WSGI only")
    return [*_gunicorn_with("gthread", setup, port), "--threads", str(setup.threads)]


def _gunicorn_with(kind: str, setup: Setup, port: int) -> list[str]:
    worker = ["-k", kind]
    if kind == "asgi":
        worker += ["--asgi-loop", setup.loop]
    elif setup.threads is None and (setup.loop, setup.http) != ("uvloop", "httptools"):
        # It takes loop and parser only from a subclass; left alone it finds uvloop and httptools by itself.
        raise ServerFailedError(f"gunicorn's {kind} has no option for the loop and the parser")
    if importlib.util.find_spec("gunicorn.ctl"):
        worker.append("--no-control-socket")
    where = ["--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
    limits = [*_option("--keep-alive", setup.keep_alive), *_option("--max-requests", setup.max_requests)]
    return _module("gunicorn", setup.import_string, *worker, *where, *limits)


def _gunicorn_worker() -> str:
    """uvicorn's own worker class where it is installed, else the asgi worker that newer gunicorns have."""
    return "uvicorn_worker.UvicornWorker" if importlib.util.find_spec("uvicorn_worker") else "asgi"


def _granian(setup: Setup, port: int) -> list[str]:
    where = ["--workers", str(setup.workers), "--host", "127.0.0.1", "--port", str(port)]
    how = ["--interface", "asgi", "--loop", setup.loop, "--no-access-log", "--log-level", "warning"]
    # Otherwise it ends altogether when one worker does, which none of the others does.
    how.append("--respawn-failed-workers")
    if setup.keep_alive is not None:
        # It has no limit of its own for idle connections; this one ends them.
        how += ["--http1-header-read-timeout", str(min(setup.keep_alive * 1000, GRANIAN_LONGEST))]
    return _module("granian", setup.import_string, *where, *how)


def _hypercorn(setup: Setup, port: int) -> list[str]:
    where = ["--workers", str(setup.workers), "--bind", f"127.0.0.1:{port}"]
    limits = [*_option("--keep-alive", setup.keep_alive), *_option("--max-requests", setup.max_requests)]
    return _module("hypercorn", setup.import_string, *where, "-k", setup.loop, "--log-level", "warning", *limits)


def _haproxy(setup: Setup, port: int) -> list[str]:
    where = [str(port), str(setup.workers), setup.import_string]
    return _module("benchmarks.proxied", *where, *_uvicorn_options(setup))


def _node(setup: Setup, port: int) -> list[str]:
    module, _, name = setup.app.partition(":")
    if module == "framework":
        raise ServerFailedError(f"{name!r} is an application of starlette's")
    keep_alive = [] if setup.keep_alive is None else [str(setup.keep_alive)]
    return ["node", str(NODE_APP), str(port), str(setup.workers), name or module, *keep_alive]


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("clusterserve-rr", "clusterserve", _clusterserve("rr")),
        Contender("clusterserve-none", "clusterserve", _clusterserve("none")),
        *(Contender(f"without-{step}", "clusterserve", _without(step)) for step in STEPS),
        Contender(REFERENCE, "uvicorn", _uvicorn),
        Contender("gunicorn", "gunicorn", _gunicorn),
        Contender("gunicorn-asgi", "gunicorn", _gunicorn_asgi, needs="gunicorn.workers.gasgi"),
        Contender("gunicorn-sync", "gunicorn", _gunicorn_sync),
        Contender("gunicorn-gthread", "gunicorn", _gunicorn_gthread),
        Contender("granian", "granian", _granian, survives=frozenset({"HUP", "KILL"})),
        Contender("hypercorn", "hypercorn", _hypercorn),
        Contender("haproxy", "haproxy", _haproxy, survives=frozenset()),
        Contender("node-rr", "node", _node, {"NODE_CLUSTER_SCHED_POLICY": "rr"}, survives=frozenset({"KILL"})),
        Contender("node-none", "node", _node, {"NODE_CLUSTER_SCHED_POLICY": "none"}, survives=frozenset({"KILL"})),
    )
}
