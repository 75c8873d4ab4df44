"""`chaos`: clients that check every byte, while workers are reloaded, scaled, killed and stopped at random.

What the end-to-end test does for some seconds, for as long as one likes; what is allowed stands in
`tests.helpers.chaos`.  The exit code is 1 when something else was met.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from benchmarks.errors import BenchmarkError
from benchmarks.options import add_seed_option, names, positive, positive_number
from benchmarks.report import progress

if TYPE_CHECKING:
    from tests.helpers.chaos import Report

NAME = "chaos"
SUMMARY = "clusterserve's workers reloaded, scaled, killed and stopped at random under clients that check every byte"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_seed_option(parser)
    text = "one run with each of these (default: one, with clusterserve's own default)"
    parser.add_argument("--dispatch", metavar="MODE,...", type=names, default=[], help=text)
    parser.add_argument("--seconds", type=positive_number, default=60.0, help="per run (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=3, help="at first (default: %(default)s)")
    parser.add_argument("--connections", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="(default: %(default)s)")
    parser.add_argument("--http", choices=("httptools", "h11"), default="httptools", help="(default: %(default)s)")
    parser.add_argument("--wsgi", action="store_true", help="a WSGI application instead of an ASGI one")
    parser.add_argument("--preload", action="store_true", help="workers are forks of a template")
    parser.add_argument("--unix", action="store_true", help="on a unix socket instead of TCP")
    text = "only these: HUP, TTIN, TTOU, KILL, 'KILL all', STOP (default: all)"
    parser.add_argument("--events", metavar="EVENT,...", type=names, default=[], help=text)


def run(options: argparse.Namespace) -> int:
    print(f"seed {options.seed}", flush=True)
    bad = False
    for dispatch in options.dispatch or [""]:
        progress(f"{options.seconds:g} s of chaos{', --dispatch ' + dispatch if dispatch else ''}")
        report = one_run(dispatch, options)
        print(f"\n{dispatch or 'default dispatch'}: {report}", flush=True)
        bad = bad or bool(report.faults)
    return 1 if bad else 0


def one_run(dispatch: str, options: argparse.Namespace) -> Report:
    try:
        # The tests' own, which need more than a server does.
        from tests.helpers import chaos
        from tests.helpers.server import Server
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"chaos needs what the tests need, as `pip install -e '.[test]'` does: {error}") from None
    if unknown := sorted(set(options.events) - chaos.EVENTS.keys()):
        raise BenchmarkError(f"unknown event {unknown[0]!r} (known: {', '.join(chaos.EVENTS)})")
    events = {name: weight for name, weight in chaos.EVENTS.items() if not options.events or name in options.events}
    how = [*(("--dispatch", dispatch) if dispatch else ()), "--loop", options.loop, "--http", options.http]
    how += ["--preload"] if options.preload else []
    app = chaos.WSGI_APP if options.wsgi else chaos.APP
    bind = f"unix:@clusterserve-chaos-{os.getpid()}" if options.unix else "127.0.0.1:0"
    try:
        with Server(*how, *chaos.OPTIONS, app=app, workers=options.workers, bind=bind) as server:
            server.wait_ready()
            return chaos.Chaos(
                server, options.seed, seconds=options.seconds, connections=options.connections, events=events
            ).run()
    except AssertionError as error:
        raise BenchmarkError(f"the server did not start, or did not end as it should: {error}") from None
