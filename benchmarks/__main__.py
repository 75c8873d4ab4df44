"""`python -m benchmarks SUBCOMMAND`: measures, prints, asserts nothing.

A subcommand is a module with NAME, SUMMARY, `add_options(parser)` and `run(options) -> exit code`, listed here.
"""

from __future__ import annotations

import argparse
import sys
from typing import Protocol

from benchmarks import chaos, churn, idle, interrupts, plot, preload, rate, skew, tail
from benchmarks.errors import BenchmarkError


class Subcommand(Protocol):
    NAME: str
    SUMMARY: str

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


SUBCOMMANDS: tuple[Subcommand, ...] = (rate, skew, tail, churn, idle, preload, chaos, plot)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    chosen = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        its_parser = chosen.add_parser(subcommand.NAME, help=subcommand.SUMMARY, description=subcommand.SUMMARY)
        subcommand.add_options(its_parser)
        its_parser.set_defaults(run=subcommand.run)
    options = parser.parse_args()
    interrupts.install()
    try:
        code: int = options.run(options)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
