"""`tail`: how long requests take when some of them hold a worker, against the best that one queue could do."""

from __future__ import annotations

import argparse
import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import openloop
from benchmarks.apps.work import AWAIT_SECONDS
from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.figures import Figures, figures, percentile, typical
from benchmarks.fleet import Server, new_fleet
from benchmarks.openloop import Outcome, Style
from benchmarks.options import (
    add_dispatch_option,
    add_seed_option,
    add_server_options,
    positive,
    positive_number,
    present,
    rotated,
    start,
)
from benchmarks.report import machine_facts, not_measured, progress, table
from benchmarks.schedule import Mix, Schedule, mix_option, poisson
from benchmarks.servers import Setup
from benchmarks.theory import single_queue, with_path

NAME = "tail"
SUMMARY = "latency at a given load, counted from when a request was due, against one queue served by all workers"
DEFAULT = (
    "clusterserve-rr",
    "uvicorn",
    "gunicorn",
    "gunicorn-asgi",
    "granian",
    "hypercorn",
    "node-rr",
    "haproxy",
)
WSGI = ("clusterserve-rr", "gunicorn-sync", "gunicorn-gthread")
# Longer than any connection of the pool is ever left idle: closing them is not what is measured.
KEEP_ALIVE_SECONDS = 60
BODY = b"x" * 1024
BODY_SECONDS = 0.005
THREADS = 40
THEORY = "one queue (theory)"
# Above it, latencies of a fast server are the client's own.
LATE_SECONDS = 0.001


@dataclass(frozen=True)
class App:
    """What is served, and what the theory has to know of it."""

    module: str
    summary: str
    mix: str = "0.95:2,0.05:150"
    rate: float | None = None
    method: str = "GET"
    load: float = 0.7
    #: Every request takes so long besides, during which it occupies no place.
    besides: float = 0.0
    #: Requests that one worker can serve at the same time.
    places: int = 1
    #: Service times are processor time, so that no more requests than processors are served at the same time.
    burns: bool = False
    #: It is WSGI, with as many threads in each worker as it has places.
    wsgi: bool = False

    def servers(self, workers: int) -> int:
        return min(workers, len(os.sched_getaffinity(0))) if self.burns else workers * self.places


APPS = {
    "block": App("work:block", "holds the event loop"),
    "async": App(
        "work:awaiting", "awaits 50 ms, then uses the processor", mix="1:2", besides=AWAIT_SECONDS, burns=True
    ),
    "rare": App("work:block", "holds the event loop, for long seldom", mix="0.995:0.05,0.005:150", rate=1200.0),
    "thread": App("framework:thread", "starlette, a `def` endpoint", places=THREADS),
    "middleware": App("framework:middleware", "starlette, holds the event loop behind a BaseHTTPMiddleware"),
    "post": App(
        "work:post", "holds the event loop after a body in a second segment", method="POST", besides=BODY_SECONDS
    ),
    "wsgi": App("wsgi", "WSGI, one thread in each worker", wsgi=True),
    "wsgi-threads": App("wsgi", "WSGI, four threads in each worker", places=4, wsgi=True),
}
#: What a request may take of its server besides its service: sockets, HTTP, the framework, the wake-ups (seconds).
PATHS = (0.0002, 0.0003, 0.0005, 0.0007)
MODES = {"keep-alive": (True,), "close": (False,), "both": (True, False)}
TITLES = {True: "keep-alive", False: "a new connection per request"}


@dataclass(frozen=True)
class Round:
    """One server's share of a round; in milliseconds."""

    latencies: list[float]
    theory: list[float]
    late_p99: float
    failures: Counter[str]
    opened: int


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser, DEFAULT, workers=8)
    add_dispatch_option(parser)
    add_seed_option(parser)
    shown = "; ".join(f"{name}: {app.summary}" for name, app in APPS.items())
    parser.add_argument("--app", choices=APPS, default="block", help=f"(default: %(default)s) {shown}")
    parser.add_argument("--mix", type=mix_option, metavar="SHARE:MS,...", help="service times (default: the app's)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--load", type=positive_number, help="share of what the workers can do (default: the app's, 0.7 or 0.5)"
    )
    load.add_argument("--rate", type=positive_number, help="requests a second, instead of --load")
    parser.add_argument("--mode", choices=MODES, default="both", help="(default: %(default)s)")
    parser.add_argument("--pool", type=positive, default=64, help="kept connections (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=1, help="figures are medians (default: %(default)s)")
    parser.add_argument("--seconds", type=positive_number, default=20.0, help="per measurement (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every percentile, to plot it")


def run(options: argparse.Namespace) -> int:
    app: App = APPS[options.app]
    mix: Mix = options.mix or Mix.parse(app.mix)
    rate = rate_of(app, mix, options)
    threads = app.places if app.wsgi else None
    setup = Setup(app.module, options.workers, options.loop, options.http, None, KEEP_ALIVE_SECONDS, threads=threads)
    base = Style(True, app.method, pool=options.pool, body=BODY if app.method == "POST" else b"")
    base = replace(base, body_seconds=BODY_SECONDS if base.body else 0.0)
    styles = [replace(base, keep_alive=kept) for kept in MODES[options.mode]]
    only = ",".join(WSGI) if app.wsgi and options.only == ",".join(DEFAULT) else options.only
    contenders = present(only, options.dispatch)
    print(f"seed {options.seed}: {options.app} ({app.summary}), {mix} ms, {rate:.1f} requests/s")
    results: dict[bool, dict[str, list[Round]]] = {style.keep_alive: {} for style in styles}
    bounds: dict[bool, str] = {}
    with new_fleet() as fleet:
        servers = [server for contender in contenders if (server := start(fleet, contender, setup))]
        for number in range(options.rounds):
            for style in styles:
                schedule = poisson(mix, rate, options.seconds, f"{options.seed}/{number}/{style.keep_alive}")
                places = app.servers(options.workers)
                theory = [one + app.besides for one in single_queue(schedule, places)]
                bounds.setdefault(style.keep_alive, bound(schedule, places))
                for server in rotated(servers, number):
                    progress(f"round {number + 1} of {options.rounds}, {TITLES[style.keep_alive]}: {server.name}")
                    if (measured := measure_or_report(server, schedule, style, theory, options.seed)) is None:
                        servers.remove(server)
                    else:
                        results[style.keep_alive].setdefault(server.name, []).append(measured)
    print(f"\n{machine_facts(contenders)}; {options.loop}, {options.http}")
    for kept, by_name in results.items():
        print(
            f"\n{options.app}, {TITLES[kept]}: {options.workers} workers, {rate:.1f} requests/s, "
            f"{options.rounds} × {options.seconds:g} s, milliseconds\n\n{report(by_name)}\n{bounds[kept]}"
        )
    if options.csv:
        write_csv(options.csv, results)
    return 0 if len(servers) == len(contenders) else 1


def rate_of(app: App, mix: Mix, options: argparse.Namespace) -> float:
    if options.rate:
        return float(options.rate)
    if options.load is None and app.rate:
        return app.rate
    if not mix.mean:
        raise BenchmarkError("a mix that takes no time has no utilisation: give --rate")
    # What a thread pool could do in all is no measure: its load is that of the same work on the event loop.
    places = app.servers(options.workers) if app.burns or app.wsgi else options.workers
    return float(options.load or app.load) * places / mix.mean


def measure_or_report(server: Server, schedule: Schedule, style: Style, theory: list[float], seed: str) -> Round | None:
    try:
        outcome = openloop.run(server.port, schedule, style, seed)
    except ServerFailedError as error:
        not_measured(server.name, error)
        return None
    if not outcome.answered:
        not_measured(server.name, f"nothing was answered: {dict(outcome.failures)}")
        return None
    return summed_up(outcome, theory)


def summed_up(outcome: Outcome, theory: list[float]) -> Round:
    return Round(
        latencies=[latency * 1000 for latency in outcome.answered],
        theory=[latency * 1000 for latency in theory],
        late_p99=percentile(sorted(outcome.lateness), 99) * 1000,
        failures=outcome.failures,
        opened=outcome.opened,
    )


def bound(schedule: Schedule, places: int) -> str:
    """What a single queue can reach whose requests take a server longer than their service."""
    reached = ", ".join(f"{with_path(schedule, places, path):.2f} with {path * 1000:g}" for path in PATHS)
    return f"At best, mean × theory is {reached} ms of a worker's time on top of each service."


def report(by_name: dict[str, list[Round]]) -> str:
    if not by_name:
        return "nothing was measured"
    typicals = {name: typical([figures(each.latencies) for each in rounds]) for name, rounds in by_name.items()}
    # The same for all of them, who were asked the same.
    theory = typical([figures(each.theory) for each in next(iter(by_name.values()))])
    rows = [row(THEORY, theory, theory, [])]
    rows += [row(name, typicals[name], theory, rounds) for name, rounds in by_name.items()]
    headers = [
        "server",
        "mean",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "mean × theory",
        "failed",
        "connections",
        "client late p99",
    ]
    parts = [table(headers, rows)]
    own = [name for name in typicals if name.startswith("clusterserve")]
    peers = [name for name in typicals if name not in own]
    parts += [f"\n{against(name, typicals, peers)}" for name in own if peers]
    return "\n".join([*parts, *remarks(by_name)])


def row(name: str, shown: Figures, theory: Figures, rounds: Sequence[Round]) -> list[str]:
    cells = [f"{value:,.2f}" for value in (shown.mean, shown.p50, shown.p90, shown.p99, shown.p999)]
    cells.append(f"{shown.mean / theory.mean:.2f}")
    if not rounds:
        return [name, *cells, "", "", ""]
    failed = sum(sum(each.failures.values()) for each in rounds)
    late = max(each.late_p99 for each in rounds)
    return [name, *cells, str(failed), str(max(each.opened for each in rounds)), f"{late:.2f}"]


def against(name: str, typicals: dict[str, Figures], peers: Sequence[str]) -> str:
    """How many times as long the peers take: above 1, this server is the faster one."""
    own = typicals[name]
    rows = []
    for peer in peers:
        theirs = typicals[peer]
        pairs = [(theirs.mean, own.mean), (theirs.p50, own.p50), (theirs.p90, own.p90), (theirs.p99, own.p99)]
        rows.append([f"{peer} / {name}", *(f"{one / other:.2f}" for one, other in pairs)])
    return table(["times as long", "mean", "p50", "p90", "p99"], rows)


def remarks(by_name: dict[str, list[Round]]) -> list[str]:
    found = []
    for name, rounds in by_name.items():
        failures = sum((each.failures for each in rounds), Counter[str]())
        if failures:
            found.append(f"{name}: failed: {', '.join(f'{kind} {count}' for kind, count in failures.most_common())}.")
    late = max(each.late_p99 for rounds in by_name.values() for each in rounds)
    if late > LATE_SECONDS * 1000:
        found.append(f"The client itself was up to {late:.1f} ms late (p99): no difference below that is a server's.")
    return ["", *found] if found else []


def write_csv(path: Path, results: dict[bool, dict[str, list[Round]]]) -> None:
    """One line per mode, server and percentile (0.1 apart); the theory is a server too.  All rounds taken together."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mode", "server", "percentile", "milliseconds"])
        for kept, by_name in results.items():
            lines = {name: [one for each in rounds for one in each.latencies] for name, rounds in by_name.items()}
            if by_name:
                lines[THEORY] = [one for each in next(iter(by_name.values())) for one in each.theory]
            for name, latencies in lines.items():
                ascending = sorted(latencies)
                for tenths in range(1001):
                    value = percentile(ascending, tenths / 10)
                    writer.writerow([TITLES[kept], name, f"{tenths / 10:.1f}", f"{value:.4f}"])
