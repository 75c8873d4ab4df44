"""`idle`: what an idle kept connection costs a server in memory."""

from __future__ import annotations

import argparse
import errno
import resource
import select
import socket
import statistics
import time
from dataclasses import dataclass

from benchmarks import processes
from benchmarks.answer import Answer
from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.fleet import Server, new_fleet
from benchmarks.options import add_dispatch_option, add_server_options, positive, positive_number, present, start
from benchmarks.report import machine_facts, median, not_measured, progress, spread, table
from benchmarks.servers import Contender, Setup

NAME = "idle"
SUMMARY = "memory of the whole process tree per idle kept connection, each of which has made one request"
DEFAULT = ("clusterserve-rr", "uvicorn", "gunicorn", "gunicorn-asgi", "granian", "hypercorn", "node-rr")
# Longer than opening and looking takes, on a slow machine too.
KEEP_ALIVE_SECONDS = 300
IO_SECONDS = 30.0
WARM_UP_REQUESTS = 400
#: Descriptors beside the connections, of this program and of a server.
SPARE_DESCRIPTORS = 200
LOOPBACK_SOURCES = 250
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Sample:
    """Bytes, of all processes in all, each shared page in parts (PSS)."""

    before: int
    after: int
    #: Connections that were still open then.
    idle: int
    processes: int

    @property
    def kib_per_connection(self) -> float:
        return (self.after - self.before) / self.idle / 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser, DEFAULT, workers=2)
    add_dispatch_option(parser)
    parser.add_argument("--connections", type=positive, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=1, help="each with new servers (default: %(default)s)")
    text = "to come to rest in, before each look (default: %(default)s)"
    parser.add_argument("--settle", type=positive_number, default=3.0, metavar="SECONDS", help=text)


def run(options: argparse.Namespace) -> int:
    raise_descriptor_limit(options.connections + SPARE_DESCRIPTORS)
    setup = Setup("hello", options.workers, options.loop, options.http, keep_alive=KEEP_ALIVE_SECONDS)
    contenders = present(options.only, options.dispatch)
    results: dict[str, list[Sample]] = {}
    for number in range(options.rounds):
        for contender in contenders:
            progress(f"round {number + 1} of {options.rounds}: {contender.name}")
            if sample := measure(contender, setup, options):
                results.setdefault(contender.name, []).append(sample)
    print(f"\n{machine_facts(contenders)}; {options.loop}, {options.http}")
    print(f"\n{options.connections} idle connections after one request each, {options.workers} workers\n")
    print(report(results, options.connections))
    return 0 if all(len(results.get(each.name, [])) == options.rounds for each in contenders) else 1


def raise_descriptor_limit(wanted: int) -> None:
    """For this program and, by inheritance, for the servers; none of them starts with less than it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchmarkError(
            f"{wanted} descriptors are needed, the hard limit is {hard} (ulimit -Hn, or --connections)"
        )
    # No more than is needed where there is no limit: some programs make room for all they may open.
    soft = wanted * 2 if hard == resource.RLIM_INFINITY else min(hard, wanted * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def measure(contender: Contender, setup: Setup, options: argparse.Namespace) -> Sample | None:
    """One at a time: a page shared between two servers would be counted half for each."""
    clients: list[socket.socket] = []
    with new_fleet() as fleet:
        server = start(fleet, contender, setup)
        if server is None:
            return None
        try:
            for _ in range(WARM_UP_REQUESTS):
                with connect(server.port, 0) as client:
                    ask(client, LAST_REQUEST)
            before = at_rest(server, options.settle)
            source = 0
            for _ in range(options.connections):
                client, source = connect_from_any(server.port, source)
                clients.append(client)
                ask(client, REQUEST)
            after = at_rest(server, options.settle)
            idle = len(clients) - len(readable(clients))
            if not idle:
                raise ServerFailedError("it closed every connection")
            return Sample(before, after, idle, len(server.processes()))
        except (OSError, ServerFailedError) as error:
            not_measured(server.name, f"{error} ({len(clients)} connections were open)")
            return None
        finally:
            for client in clients:
                client.close()


def at_rest(server: Server, settle: float) -> int:
    time.sleep(settle)
    return processes.pss(server.processes())


def connect_from_any(port: int, source: int) -> tuple[socket.socket, int]:
    """A connection, and the source address to go on with: each has only so many ports."""
    while (client := connect_unless_full(port, source)) is None:
        source += 1
        if source == LOOPBACK_SOURCES:
            raise BenchmarkError("no port is left on any loopback address")
    return client, source


def connect_unless_full(port: int, source: int) -> socket.socket | None:
    try:
        return connect(port, source)
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
            raise
        return None


def connect(port: int, source: int) -> socket.socket:
    """From 127.0.0.1 for source 0, from 127.0.0.2 for 1, and so on."""
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        client.settimeout(IO_SECONDS)
        if source:
            client.bind((f"127.0.0.{1 + source}", 0))
        client.connect(("127.0.0.1", port))
    except BaseException:
        client.close()
        raise
    return client


def ask(client: socket.socket, request: bytes) -> None:
    answer = Answer()
    client.sendall(request)
    while not answer.complete:
        answer.feed(client.recv(4096))
        if answer.ended and not answer.complete:
            raise ServerFailedError("it closed a connection instead of answering")
    if answer.status != 200 or (answer.closes and request is REQUEST):
        raise ServerFailedError(f"it answered {answer.status}, or does not keep connections")


def readable(clients: list[socket.socket]) -> list[int]:
    """Those that the server has closed: nothing else is to come."""
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return [fd for fd, _ in poll.poll(0)]


def report(results: dict[str, list[Sample]], wanted: int) -> str:
    rows = []
    for name, samples in results.items():
        costs = [sample.kib_per_connection for sample in samples]
        totals = f"{statistics.median(sample.before for sample in samples) / 2**20:,.1f}"
        kept = min(sample.idle for sample in samples)
        rows.append([name, median(costs), spread(costs), totals, str(samples[0].processes), f"{kept} of {wanted}"])
    headers = ["server", "KiB/connection", "min–max", "MiB before", "processes", "open at the end"]
    note = (
        "\nPSS of all processes of a server, the difference between before and after.  Not in it: the kernel's memory\n"
        "for sockets, which is the same for all of them."
    )
    return table(headers, rows) + "\n" + note
