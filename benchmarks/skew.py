"""`skew`: how evenly long-lived connections are spread over the workers, in a burst and a little apart."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import Counter
from dataclasses import dataclass

from benchmarks.errors import ServerFailedError
from benchmarks.fleet import Server, new_fleet
from benchmarks.options import add_server_options, positive, present, start
from benchmarks.report import machine_facts, median, not_measured, progress, spread, table
from benchmarks.servers import Contender, Setup

NAME = "skew"
SUMMARY = "400 open streams over 8 workers: busiest worker / mean"
DEFAULT = ("clusterserve-rr", "clusterserve-none", "uvicorn", "gunicorn", "node-rr", "node-none")
PACE_SECONDS = 0.003
STREAM_SECONDS = 30.0
REQUEST = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True)
class Spread:
    """Streams per worker, the busiest first; those that were not served are counted apart."""

    counts: tuple[int, ...]
    failed: int

    @property
    def busiest_to_mean(self) -> float:
        return max(self.counts) / statistics.mean(self.counts) if any(self.counts) else 0.0


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser, DEFAULT, workers=8)
    parser.add_argument("--dispatch", default="connection", help="clusterserve's --dispatch (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--streams", type=positive, default=400, help="open at the same time (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    setup = Setup("stream", options.workers, options.loop, options.http, options.dispatch)
    paces = {"in a burst": 0.0, f"{PACE_SECONDS * 1000:.0f} ms apart": PACE_SECONDS}
    results: dict[str, dict[str, list[Spread]]] = {title: {} for title in paces}
    contenders = present(options.only)
    for contender in contenders:
        for title, rounds in measure(contender, setup, paces, options).items():
            results[title][contender.name] = rounds
    print(f"\n{machine_facts(contenders)}; {options.loop}, {options.http}")
    for title, by_name in results.items():
        print(f"\n{options.streams} streams {title} over {options.workers} workers, {options.rounds} times\n")
        print(report(by_name))
    return 0 if all(len(by_name) == len(contenders) for by_name in results.values()) else 1


def measure(
    contender: Contender, setup: Setup, paces: dict[str, float], options: argparse.Namespace
) -> dict[str, list[Spread]]:
    """All rounds of one contender; nothing when it does not start.

    One at a time, unlike `rate`: the figures are counts, and eight workers each of all of them are many processes.
    """
    with new_fleet() as fleet:
        server = start(fleet, contender, setup)
        if server is None:
            return {}
        progress(f"measuring {server.name}")
        try:
            return {
                title: [one_round(server, options.streams, options.workers, pace) for _ in range(options.rounds)]
                for title, pace in paces.items()
            }
        except ServerFailedError as error:
            not_measured(server.name, error)
            return {}


def one_round(server: Server, streams: int, workers: int, pace: float) -> Spread:
    server.wait_until_idle()
    served = Counter(pid for pid in asyncio.run(open_streams(server.port, streams, pace)) if pid is not None)
    counts = sorted(served.values(), reverse=True)
    # A worker without a stream counts in the mean.
    counts += [0] * (workers - len(counts))
    return Spread(tuple(counts), failed=streams - sum(counts))


async def open_streams(port: int, streams: int, pace: float) -> list[int | None]:
    """Who serves each stream; every one stays open until all have told."""
    begin = asyncio.get_running_loop().time()
    writers: list[asyncio.StreamWriter] = []
    try:
        opening = [open_stream(port, begin + number * pace, writers) for number in range(streams)]
        return await asyncio.gather(*opening)
    finally:
        for writer in writers:
            writer.close()


async def open_stream(port: int, at: float, writers: list[asyncio.StreamWriter]) -> int | None:
    """The process id that the response begins with, or None when there is no such response."""
    await asyncio.sleep(at - asyncio.get_running_loop().time())
    try:
        told = await asyncio.wait_for(first_line(port, writers), STREAM_SECONDS)
    except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        return None
    return int(told) if told.strip().isdigit() else None


async def first_line(port: int, writers: list[asyncio.StreamWriter]) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writers.append(writer)
    writer.write(REQUEST)
    await reader.readuntil(b"\r\n\r\n")
    # All of them answer with a chunked body, whose first line is the length of the chunk.
    await reader.readline()
    return await reader.readline()


def report(by_name: dict[str, list[Spread]]) -> str:
    rows = []
    remarks = []
    for name, rounds in by_name.items():
        found = [each.busiest_to_mean for each in rounds]
        typical = min(rounds, key=lambda each: abs(each.busiest_to_mean - statistics.median(found)))
        rows.append([name, median(found), spread(found), " ".join(map(str, typical.counts))])
        if failed := sum(each.failed for each in rounds):
            remarks.append(f"{name}: {failed} streams were not served.")
    headers = ["server", "busiest/mean", "min–max", "streams per worker, the median round"]
    return "\n".join([table(headers, rows), *remarks])
