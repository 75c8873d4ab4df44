"""`churn`: requests that fail while workers are reloaded, killed or recycled."""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass

from benchmarks import openloop
from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.fleet import Server, new_fleet
from benchmarks.openloop import Style
from benchmarks.options import (
    add_dispatch_option,
    add_seed_option,
    add_server_options,
    positive,
    positive_number,
    present,
    start,
)
from benchmarks.report import machine_facts, not_measured, progress, table
from benchmarks.schedule import Mix, mix_option, poisson
from benchmarks.servers import Contender, Setup

NAME = "churn"
SUMMARY = (
    "failed requests while workers are reloaded (HUP), killed (KILL) or replaced after some requests (RECYCLE), "
    "or the master is replaced (USR2)"
)
DEFAULT = ("clusterserve-rr", "uvicorn", "gunicorn", "gunicorn-asgi", "granian", "hypercorn", "node-rr", "haproxy")
# From one to the next.  A master needs longer to be replaced.
EVENT_SECONDS = {"HUP": 2.0, "KILL": 2.0, "RECYCLE": 2.0, "USR2": 3.0}
MAX_REQUESTS = 150
# Longer than a connection of the pool is ever left idle: closing it then would be no failure of the server's.
KEEP_ALIVE_SECONDS = 60
TIMEOUT_SECONDS = 10.0
MODES = {"keep-alive": True, "close": False}


@dataclass(frozen=True)
class Churned:
    asked: int
    events: int
    failures: Counter[str]
    closed_idle: int
    late: float


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "event", choices=tuple(EVENT_SECONDS), help=f"RECYCLE: each worker serves {MAX_REQUESTS} requests"
    )
    add_server_options(parser, DEFAULT, workers=4)
    add_dispatch_option(parser)
    add_seed_option(parser)
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="(default: %(default)s)")
    parser.add_argument("--rate", type=positive_number, default=400.0, help="requests/s (default: %(default)s)")
    parser.add_argument("--seconds", type=positive_number, default=12.0, help="(default: %(default)s)")
    parser.add_argument(
        "--mix", type=mix_option, default=Mix.parse("1:2"), help="how long requests take (default: %(default)s)"
    )
    text = "clients do not see that an idle connection was closed before they ask again over it, and have failed then"
    parser.add_argument("--blind", action="store_true", help=text)
    parser.add_argument("--pool", type=positive, default=64, help="kept connections (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    setup = Setup(
        "work:block",
        options.workers,
        options.loop,
        options.http,
        keep_alive=KEEP_ALIVE_SECONDS,
        max_requests=MAX_REQUESTS if options.event == "RECYCLE" else None,
    )
    modes = [name for name in MODES if options.mode in (name, "both")]
    print(f"seed {options.seed}")
    contenders = present(options.only, options.dispatch)
    able = []
    for contender in contenders:
        if options.event in contender.survives:
            able.append(contender)
        else:
            not_measured(contender.name, f"it has no answer to {options.event}")
    if not able:
        raise BenchmarkError("there is nobody to measure")
    results = {contender.name: measure(contender, setup, modes, options) for contender in able}
    print(f"\n{machine_facts(able)}; {options.loop}, {options.http}")
    what = f"at most {MAX_REQUESTS} requests a worker" if options.event == "RECYCLE" else every(options.event)
    print(
        f"\n{what}: {options.workers} workers, {options.rate:g} requests/s of {options.mix} ms, {options.seconds:g} s\n"
    )
    print(report(results))
    return 0 if all(len(by_mode) == len(modes) for by_mode in results.values()) else 1


def every(event: str) -> str:
    return f"a {event} every {EVENT_SECONDS[event]:g} s"


def measure(contender: Contender, setup: Setup, modes: list[str], options: argparse.Namespace) -> dict[str, Churned]:
    """By mode.  One contender at a time: what is counted does not depend on who else is there."""
    found: dict[str, Churned] = {}
    with new_fleet() as fleet:
        server = start(fleet, contender, setup)
        if server is None:
            return found
        try:
            for mode in modes:
                progress(f"{options.event}, {mode}: {server.name}")
                # All of its workers are back after what happened to it in the mode before.
                server.wait_until_serving()
                found[mode] = churned(server, mode, options)
        except ServerFailedError as error:
            not_measured(server.name, error)
    return found


def churned(server: Server, mode: str, options: argparse.Namespace) -> Churned:
    schedule = poisson(options.mix, options.rate, options.seconds, f"{options.seed}/{mode}")
    style = Style(MODES[mode], pool=options.pool, timeout=TIMEOUT_SECONDS, notices=not options.blind)
    events = _Events(server, options.event, random.Random(options.seed), options.seconds)
    with events:
        outcome = openloop.run(server.port, schedule, style, options.seed)
    late = max(outcome.lateness, default=0.0)
    return Churned(len(schedule), events.done, outcome.failures, outcome.closed_idle, late)


class _Events:
    """Beside the load, in a thread: one every so many seconds, the first after as many, none in the last as many."""

    def __init__(self, server: Server, event: str, chance: random.Random, seconds: float) -> None:
        self.done = 0
        self._server = server
        self._event = event
        self._chance = chance
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        began = time.monotonic()
        pause = EVENT_SECONDS[self._event]
        at = pause
        while at <= self._seconds - pause and not self._over.wait(max(0.0, began + at - time.monotonic())):
            if self._event in ("HUP", "USR2"):
                self._server.signal_master(signal.SIGHUP if self._event == "HUP" else signal.SIGUSR2)
                self.done += 1
            elif self._event == "KILL" and (workers := self._server.workers()):
                try:
                    os.kill(self._chance.choice(workers), signal.SIGKILL)
                    self.done += 1
                except ProcessLookupError:
                    pass  # it ended by itself meanwhile
            at += pause

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def report(results: dict[str, dict[str, Churned]]) -> str:
    rows = []
    for name, by_mode in results.items():
        for mode, each in by_mode.items():
            failed = sum(each.failures.values())
            kinds = ", ".join(f"{kind} {count}" for kind, count in each.failures.most_common()) or "–"
            rows.append([name, mode, str(each.asked), str(each.events), str(failed), kinds, str(each.closed_idle)])
    headers = ["server", "connections", "requests", "events", "failed", "how", "closed while idle"]
    return table(headers, rows)
