"""`chaos`: clients that check every byte, while workers are reloaded, scaled, killed and stopped at random.

What the end-to-end test does for some seconds, for as long as one likes; what is allowed stands in
`tests.helpers.chaos`.  The exit code is 1 when something else was met.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
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
    text = "only these: HUP, TTIN, TTOU, KILL, 'KILL all', STOP (default: all of these), USR2"
    parser.add_argument("--events", metavar="EVENT,...", type=names, default=[], help=text)
    text = "these as well: USR2, or what --events would leave out"
    parser.add_argument("--event", metavar="EVENT,...", type=names, default=[], help=text)
    parser.add_argument("--tls", action="store_true", help="with a certificate; the clients speak TLS")
    parser.add_argument("--proxied", action="store_true", help="each connection begins with a PROXY header")
    parser.add_argument("--stop", action="store_true", help="the server is told to stop while the clients go on")
    parser.add_argument("--log", metavar="FILE", type=Path, help="what the servers print")
    text = "of the server, behind '--': chaos --seconds 60 -- --policy least"
    parser.add_argument("server", metavar="OPTION", nargs="*", help=text)


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
        from tests.helpers.certificates import Authority
        from tests.helpers.server import Server
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"chaos needs what the tests need, as `pip install -e '.[test]'` does: {error}") from None
    known = {**chaos.EVENTS, **chaos.MORE_EVENTS}
    chosen = [*(options.events or chaos.EVENTS), *options.event]
    if unknown := sorted(set(chosen) - known.keys()):
        raise BenchmarkError(f"unknown event {unknown[0]!r} (known: {', '.join(known)})")
    events = {name: weight for name, weight in known.items() if name in chosen}
    how = [*(("--dispatch", dispatch) if dispatch else ()), "--loop", options.loop, "--http", options.http]
    how += ["--preload"] if options.preload else []
    how += ["--proxy-protocol"] if options.proxied else []
    app = chaos.WSGI_APP if options.wsgi else chaos.APP
    bind = f"unix:@clusterserve-chaos-{os.getpid()}" if options.unix else "127.0.0.1:0"
    with contextlib.ExitStack() as stack:
        tls = None
        if options.tls:
            authority = Authority(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            how += authority.issue("chaos").options
            tls = authority.trusting()
        how += options.server
        server = None
        try:
            with Server(*how, *chaos.OPTIONS, app=app, workers=options.workers, bind=bind) as server:
                server.wait_ready()
                return chaos.Chaos(
                    server,
                    options.seed,
                    seconds=options.seconds,
                    connections=options.connections,
                    events=events,
                    tls=tls,
                    proxied=options.proxied,
                    stop=options.stop,
                ).run()
        except AssertionError as error:
            raise BenchmarkError(f"the server did not start, or did not end as it should: {error}") from None
        finally:
            if options.log is not None and server is not None:
                with options.log.open("a") as file:
                    file.writelines(f"{line.at:.3f} {line.stream}| {line.text}\n" for line in server.lines)
