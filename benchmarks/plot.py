"""`python -m benchmarks plot FILE.csv > FILE.svg`: what `tail --csv` wrote, as a picture: latency by percentile."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.errors import BenchmarkError

NAME = "plot"
SUMMARY = "latency by percentile, from what `tail --csv` wrote, as an SVG on standard output"

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 60, 20, 210, 40
COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
#: Of the horizontal axis, which gives each further nine the same width.
SHARES = (0, 50, 90, 99, 99.9)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--mode", default="keep-alive", help="which of the file's modes (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with options.file.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["mode"] == options.mode:
                curves[row["server"]].append((float(row["percentile"]), float(row["milliseconds"])))
    if not curves:
        raise BenchmarkError(f"{options.file} has nothing of mode {options.mode!r}")
    sys.stdout.write(draw(dict(curves)))
    return 0


def draw(curves: dict[str, list[tuple[float, float]]]) -> str:
    """The picture: milliseconds (logarithmic) over the share of requests that took no longer."""
    longest = max(value for curve in curves.values() for share, value in curve if share <= SHARES[-1])
    decades = math.ceil(math.log10(max(longest, 10.0)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(share: float) -> float:
        nines = -math.log10(1 - min(share, SHARES[-1]) / 100)
        return LEFT + (right - LEFT) * nines / 3

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * math.log10(max(value, 1.0)) / decades

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        '<g font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for share in SHARES:
        parts.append(f'<line x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(share):.1f}" y="{bottom + 18}" text-anchor="middle">{share:g} %</text>')
    for decade in range(decades + 1):
        height = y(10.0**decade)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{10**decade:g} ms</text>')
    for number, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: dict(item[1]).get(90.0, 0.0))):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(share):.1f},{y(value):.1f}" for share, value in curve if share <= SHARES[-1])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        line = TOP + 16 + 20 * number
        parts.append(f'<rect x="{right + 16}" y="{line - 9}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 34}" y="{line - 3}">{name}</text>')
    return "\n".join([*parts, "</g>", "</svg>\n"])
