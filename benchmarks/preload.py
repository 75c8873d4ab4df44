"""`preload`: what importing the application once saves, in memory and in the time until a worker listens."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import processes
from benchmarks.errors import ServerFailedError
from benchmarks.fleet import Server, new_fleet
from benchmarks.idle import LAST_REQUEST, ask, connect
from benchmarks.options import positive, positive_number, start
from benchmarks.report import machine_facts, median, not_measured, progress, spread, table
from benchmarks.servers import CONTENDERS, Contender, Setup

NAME = "preload"
SUMMARY = (
    "memory of the whole process tree, and the time from a worker's start until it listens, with and without --preload"
)

#: By its module: what it is, and what it needs.
APPS = {"records": ("{mib} MiB of Python objects", ""), "site": ("Django with its admin", "django")}
PATIENCE = 60.0
LOOK = 0.005


@dataclass
class Sample:
    #: Bytes, each shared page in parts (PSS): of everybody, and of each worker.
    tree: int = 0
    workers: list[int] = field(default_factory=list)
    processes: int = 0
    #: Seconds from the start of the program until all listen; of each replacement, from fork and from its
    #: predecessor's death.
    start: float = 0.0
    fork: list[float] = field(default_factory=list)
    kill: list[float] = field(default_factory=list)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--apps", default=",".join(APPS), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument("--mib", type=positive, default=200, help="what `records` has in memory (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=1000, help="before it is weighed (default: %(default)s)")
    parser.add_argument("--kills", type=positive, default=5, help="replacements to time (default: %(default)s)")
    parser.add_argument("--settle", type=positive_number, default=2.0, metavar="SECONDS", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    contenders = [_contender(), _contender("--preload")]
    results: list[tuple[str, str, Sample]] = []
    complete = True
    for app in options.apps.split(","):
        what, needs = APPS[app]
        if needs and importlib.util.find_spec(needs) is None:
            not_measured(app, f"{needs} is not installed")
            complete = False
            continue
        for contender in contenders:
            progress(f"{app}: {contender.name}")
            sample = measure(contender, app, options)
            complete = complete and sample is not None
            if sample is not None:
                results.append((what.format(mib=options.mib), contender.name, sample))
    print(f"\n{machine_facts(contenders)}; {options.workers} workers, {options.requests} requests before weighing\n")
    print(report(results))
    return 0 if complete else 1


def _contender(*more: str) -> Contender:
    base = CONTENDERS["clusterserve-rr"]
    hooks = ("--hooks", "benchmarks.apps.told")
    return dataclasses.replace(
        base,
        name=" ".join(("clusterserve", *more)),
        command=lambda setup, port: [*base.command(setup, port), *hooks, *more],
    )


def measure(contender: Contender, app: str, options: argparse.Namespace) -> Sample | None:
    """One at a time: a page shared between two servers would be counted half for each."""
    with tempfile.TemporaryDirectory() as directory, new_fleet() as fleet:
        told = Path(directory, "told")
        told.touch()
        environ = {**contender.environ, "BENCHMARK_TOLD": str(told), "BENCHMARK_MIB": str(options.mib)}
        begun = time.monotonic()
        server = start(fleet, dataclasses.replace(contender, environ=environ), Setup(app, options.workers))
        if server is None:
            return None
        try:
            listening = [at for what, _, _, at in _told(told) if what == "listening"]
            sample = Sample(start=max(listening) - begun)
            _weigh(sample, server, told, options)
            for _ in range(options.kills):
                _replace(sample, told)
            return sample
        except (OSError, ServerFailedError) as error:
            not_measured(contender.name, error)
            return None


def _told(path: Path) -> list[tuple[str, int, int, float]]:
    lines = (line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return [(what, int(worker), int(pid), float(at)) for what, worker, pid, at in lines]


def _weigh(sample: Sample, server: Server, told: Path, options: argparse.Namespace) -> None:
    for _ in range(options.requests):
        with connect(server.port, 0) as client:
            ask(client, LAST_REQUEST)
    time.sleep(options.settle)
    everybody = server.processes()
    sample.tree, sample.processes = processes.pss(everybody), len(everybody)
    sample.workers = [processes.pss([pid]) for what, _, pid, _ in _told(told) if what == "listening"]


def _replace(sample: Sample, told: Path) -> None:
    """Kill the newest worker and wait for its replacement."""
    before = _told(told)
    worker, pid = max((id, pid) for what, id, pid, _ in before if what == "listening")
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while not (new := [each for each in _told(told) if each[0] == "listening" and each[1] > worker]):
        if time.monotonic() > killed + PATIENCE:
            raise ServerFailedError(f"no replacement for worker {worker} within {PATIENCE:g} s")
        time.sleep(LOOK)
    _, successor, _, listens = new[0]
    (forked,) = (at for what, each, _, at in _told(told) if what == "fork" and each == successor)
    sample.fork.append(listens - forked)
    sample.kill.append(listens - killed)
    # Else its death would count as a failure, and the next one would have to wait.
    time.sleep(1.5)


def report(results: list[tuple[str, str, Sample]]) -> str:
    rows = []
    for app, name, sample in results:
        milliseconds = [[each * 1000 for each in times] for times in (sample.fork, sample.kill)]
        rows.append(
            [
                f"{app}, {name}",
                f"{sample.tree / 2**20:,.0f}",
                str(sample.processes),
                f"{statistics.median(sample.workers) / 2**20:,.0f}",
                f"{sample.start:,.1f}",
                f"{median(milliseconds[0], 0)} ({spread(milliseconds[0], 0)})",
                f"{median(milliseconds[1], 0)} ({spread(milliseconds[1], 0)})",
            ]
        )
    headers = [
        "server", "MiB in all", "processes", "MiB a worker", "s until all listen", "ms fork → listening",
        "ms killed → replaced",
    ]  # fmt: skip
    note = (
        "\nMemory is PSS: of what several processes share, each has a part.  With --preload a worker that is forked\n"
        "has the application in memory, else it is a new interpreter, which imports it."
    )
    return table(headers, rows) + "\n" + note
