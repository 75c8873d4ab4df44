"""Plain text that is Markdown too: tables, and the line that says on what they were measured."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence

from benchmarks.servers import Contender, package_version


def progress(text: str) -> None:
    """Tell the one who waits; not part of the result."""
    print(text, file=sys.stderr, flush=True)


def not_measured(name: str, reason: object) -> None:
    print(f"not measured: {name}: {reason}", flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the figures to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in (lines[0], rule, *lines[1:]))


def median(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):,.{digits}f}" if values else "–"


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):,.{digits}f}–{max(values):,.{digits}f}" if values else "–"


def machine_facts(contenders: Iterable[Contender], *tools: str) -> str:
    packages = dict.fromkeys(("uvicorn", "uvloop", "httptools"), "")
    packages = {name: package_version(name) for name in packages}
    packages.update({contender.package: contender.version() for contender in contenders})
    shown = [f"{name} {number}" for name, number in packages.items() if number]
    cores = len(os.sched_getaffinity(0))
    return ", ".join([f"{cores} cores", f"Python {platform.python_version()}", *shown, *tools])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join([cells[0].ljust(widths[0]), *figures])} |"
