"""Command-line options that several subcommands share, and the contenders they select."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.fleet import Fleet, Server
from benchmarks.report import not_measured, progress
from benchmarks.servers import Contender, Setup, choose


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_server_options(parser: argparse.ArgumentParser, contenders: Sequence[str], workers: int) -> None:
    listed = ",".join(contenders)
    parser.add_argument("--only", metavar="NAME,...", default=listed, help=f"who takes part (default: {listed})")
    parser.add_argument("--workers", type=positive, default=workers, help="per server (default: %(default)s)")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="(default: %(default)s)")
    parser.add_argument("--http", choices=("httptools", "h11"), default="httptools", help="(default: %(default)s)")


def present(names: str) -> list[Contender]:
    """The chosen contenders that can take part; the others are named with the reason."""
    found = []
    for contender in choose([name.strip() for name in names.split(",") if name.strip()]):
        if reason := contender.missing():
            not_measured(contender.name, reason)
        else:
            found.append(contender)
    if not found:
        raise BenchmarkError("there is nobody to measure")
    return found


def start(fleet: Fleet, contender: Contender, setup: Setup) -> Server | None:
    """A serving contender, or None when it has been reported as failed."""
    progress(f"starting {contender.name}")
    try:
        return fleet.start(contender, setup)
    except ServerFailedError as error:
        not_measured(contender.name, error)
        return None


def rotated(servers: Sequence[Server], by: int) -> list[Server]:
    """Another one first in every round, so that none always follows the same neighbour's load."""
    cut = by % len(servers) if servers else 0
    return [*servers[cut:], *servers[:cut]]
