"""`rate`: as many requests as there can be, on kept connections and on a new one each; what one costs the server.

Hello world, which is all overhead, or with `--burn` an application that computes, as most do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import processes, wrk
from benchmarks.errors import ServerFailedError
from benchmarks.fleet import Server, new_fleet
from benchmarks.options import (
    add_dispatch_option,
    add_server_options,
    positive,
    positive_number,
    present,
    rotated,
    start,
)
from benchmarks.report import machine_facts, median, not_measured, progress, spread, table
from benchmarks.servers import REFERENCE, Setup

NAME = "rate"
SUMMARY = "hello world with 2 workers: requests/s and CPU per request, keep-alive and a new connection each"
DEFAULT = ("clusterserve-rr", "clusterserve-none", "uvicorn", "node-rr", "node-none")
BURNING = ("clusterserve-rr", "uvicorn", "gunicorn", "granian")
WARM_UP_SECONDS = 1
SATURATED = 0.95


@dataclass(frozen=True)
class Sample:
    per_second: float
    cpu_microseconds: float
    wrk_cpu: float  # share of one core per thread
    others_cpu: float  # share of the whole machine
    p50: float  # milliseconds
    p99: float
    errors: tuple[str, ...]


# One dict per round, by contender: what is compared was measured within the same few seconds.
Rounds = list[dict[str, Sample]]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser, DEFAULT, workers=2)
    add_dispatch_option(parser)
    text = "each request uses so much processor time, instead of hello world; adds latencies to the tables"
    parser.add_argument("--burn", type=positive_number, metavar="MS", help=text)
    parser.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=positive, default=4, help="per measurement (default: %(default)s)")
    parser.add_argument("--connections", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=1, help="of wrk (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    wrk.require()
    app, path, title = "hello", "/", "Hello world"
    if options.burn:
        app, path, title = "work:burning", f"/work?ms={options.burn:g}", f"{options.burn:g} ms of processor time"
    only = ",".join(BURNING) if options.burn and options.only == ",".join(DEFAULT) else options.only
    setup = Setup(app, options.workers, options.loop, options.http)
    kept = wrk.Load(options.seconds, options.connections, options.threads, new_connections=False, path=path)
    loads = {"keep-alive": kept, "a new connection per request": replace(kept, new_connections=True)}
    contenders = present(only, options.dispatch)
    results: dict[str, Rounds] = {kind: [] for kind in loads}
    with new_fleet() as fleet:
        servers = [server for contender in contenders if (server := start(fleet, contender, setup))]
        progress("warming up")
        for load in loads.values():
            one_round(servers, replace(load, seconds=WARM_UP_SECONDS), 0)
        for number in range(options.rounds):
            for kind, load in loads.items():
                progress(f"round {number + 1} of {options.rounds}: {kind}")
                results[kind].append(one_round(servers, load, number))
    print(f"\n{machine_facts(contenders, wrk.version())}; {options.loop}, {options.http}")
    for kind, rounds in results.items():
        print(
            f"\n{title}, {kind}: {options.workers} workers, {options.connections} connections, "
            f"{options.rounds} × {options.seconds} s in turn\n\n{tables(servers, rounds, latencies=bool(options.burn))}"
        )
    return 0 if len(servers) == len(contenders) else 1


def one_round(servers: list[Server], load: wrk.Load, number: int) -> dict[str, Sample]:
    """One measurement of each; a server that fails is reported and leaves the run."""
    samples = {}
    for server in rotated(servers, number):
        sample = measure_or_report(server, load)
        if sample is None:
            servers.remove(server)
        else:
            samples[server.name] = sample
    return samples


def measure_or_report(server: Server, load: wrk.Load) -> Sample | None:
    try:
        return measure(server, load)
    except ServerFailedError as error:
        not_measured(server.name, error)
        return None


def measure(server: Server, load: wrk.Load) -> Sample:
    server.wait_until_idle()
    tree, machine = server.processes(), processes.machine_time()
    result = wrk.run(server.port, load)
    tree_after, machine_after = server.processes(), processes.machine_time()
    cpu = processes.cpu_between(tree, tree_after)
    elapsed = machine_after.total - machine.total
    others = machine_after.busy - machine.busy - cpu - result.own_cpu_seconds
    errors = result.errors if tree.keys() == tree_after.keys() else (*result.errors, "processes changed")
    return Sample(
        per_second=result.per_second,
        cpu_microseconds=cpu / result.requests * 1e6 if result.requests else 0.0,
        wrk_cpu=result.own_cpu_seconds / result.elapsed_seconds / load.threads,
        others_cpu=max(0.0, others / elapsed) if elapsed else 0.0,
        p50=result.p50,
        p99=result.p99,
        errors=errors,
    )


def tables(servers: Sequence[Server], rounds: Rounds, *, latencies: bool) -> str:
    headers = ["server", "requests/s", f"× {REFERENCE}", "min–max", "CPU µs/request", f"CPU × {REFERENCE}", "min–max"]
    rows = []
    for server in servers:
        samples = [each[server.name] for each in rounds]
        rate = ratios(rounds, server.name, "per_second")
        cpu = ratios(rounds, server.name, "cpu_microseconds")
        rates = median([sample.per_second for sample in samples], 0)
        costs = median([sample.cpu_microseconds for sample in samples], 1)
        wrk_cpu = f"{statistics.median(sample.wrk_cpu for sample in samples):.0%}"
        waits = [median([getattr(sample, name) for sample in samples], 1) for name in ("p50", "p99") if latencies]
        rows.append([server.name, rates, median(rate), spread(rate), costs, median(cpu), spread(cpu), *waits, wrk_cpu])
    more = ["p50 ms", "p99 ms"] if latencies else []
    return "\n".join([table([*headers, *more, "wrk's CPU"], rows), *remarks(servers, rounds)])


def ratios(rounds: Rounds, name: str, figure: str) -> list[float]:
    """Against the reference in the same round."""
    pairs = [(getattr(each[name], figure), getattr(each[REFERENCE], figure)) for each in rounds if REFERENCE in each]
    return [own / reference for own, reference in pairs if reference]


def remarks(servers: Sequence[Server], rounds: Rounds) -> list[str]:
    """What a reader has to know before trusting the figures."""
    found = []
    samples = [sample for each in rounds for sample in each.values()]
    if samples:
        others = [sample.others_cpu * 100 for sample in samples]
        found.append(f"\nThe machine was used by others to {median(others, 0)} % meanwhile ({spread(others, 0)} %).")
    for server in servers:
        own = [each[server.name] for each in rounds]
        if statistics.median(sample.wrk_cpu for sample in own) > SATURATED:
            found.append(f"{server.name}: wrk was at its limit; the server can do more (try --threads 2).")
        if errors := [error for sample in own for error in sample.errors]:
            found.append(f"{server.name}: errors: {', '.join(errors)}.")
    return found
