"""Command-line options that several subcommands share, and the contenders they select."""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Sequence

from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.fleet import Fleet, Server
from benchmarks.report import not_measured, progress
from benchmarks.servers import Contender, Setup, choose, of_each_dispatch


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def add_server_options(parser: argparse.ArgumentParser, contenders: Sequence[str], workers: int) -> None:
    listed = ",".join(contenders)
    parser.add_argument("--only", metavar="NAME,...", default=listed, help=f"who takes part (default: {listed})")
    parser.add_argument("--workers", type=positive, default=workers, help="per server (default: %(default)s)")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="(default: %(default)s)")
    parser.add_argument("--http", choices=("httptools", "h11"), default="httptools", help="(default: %(default)s)")


def add_dispatch_option(parser: argparse.ArgumentParser) -> None:
    text = "clusterserve once with each of these --dispatch (default: once, with its own default)"
    parser.add_argument("--dispatch", metavar="MODE,...", type=names, default=[], help=text)


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    text = "what the arrivals come from (default: another one every time; printed)"
    parser.add_argument("--seed", default=str(secrets.randbelow(10**6)), help=text)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def present(only: str, dispatches: Sequence[str] = ()) -> list[Contender]:
    """The chosen contenders that can take part; the others are named with the reason."""
    found = []
    for contender in of_each_dispatch(choose(names(only)), dispatches):
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
