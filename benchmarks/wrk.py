"""One measurement with wrk, the compiled load generator, on loopback."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from dataclasses import dataclass

from benchmarks.errors import BenchmarkError, ServerFailedError

GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Load:
    seconds: int
    connections: int
    threads: int
    new_connections: bool
    path: str = "/"


@dataclass(frozen=True)
class Result:
    requests: int
    per_second: float
    own_cpu_seconds: float
    elapsed_seconds: float
    #: Milliseconds; of closed-loop requests, which wait for each other.
    p50: float
    p99: float
    errors: tuple[str, ...]


def require() -> None:
    if shutil.which("wrk") is None:
        raise BenchmarkError("this benchmark needs the load generator `wrk` on PATH (Debian: apt-get install wrk)")


def version() -> str:
    shown = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    found = re.search(r"\d+(\.\d+)+", shown)
    return f"wrk {found[0]}" if found else "wrk"


def run(port: int, load: Load) -> Result:
    header = ["--header", "Connection: close"] if load.new_connections else []
    command = ["wrk", "--threads", str(load.threads), "--connections", str(load.connections)]
    command += ["--duration", f"{load.seconds}s", "--timeout", "10s", *header, "--latency"]
    command.append(f"http://127.0.0.1:{port}{load.path}")
    started, before = time.monotonic(), _children_cpu()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=load.seconds + GRACE_SECONDS)
    elapsed, used = time.monotonic() - started, _children_cpu() - before
    counted = re.search(r"(\d+) requests in ", done.stdout)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if done.returncode or counted is None or rate is None:
        raise ServerFailedError(f"wrk measured nothing: {(done.stderr or done.stdout).strip()}")
    return Result(
        int(counted[1]),
        float(rate[1]),
        used,
        elapsed,
        _latency(done.stdout, 50),
        _latency(done.stdout, 99),
        _errors(done.stdout),
    )


def _latency(output: str, percent: int) -> float:
    found = re.search(rf"^ *{percent}% +([\d.]+)(us|ms|s) *$", output, re.MULTILINE)
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]] if found else float("nan")


def _errors(output: str) -> tuple[str, ...]:
    found = []
    if sockets := re.search(r"Socket errors: (.*)", output):
        found += [kind for kind in sockets[1].split(", ") if not kind.endswith(" 0")]
    if refused := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        found.append(f"not 2xx {refused[1]}")
    return tuple(found)


def _children_cpu() -> float:
    """Processor time of the children waited for: wrk's, as servers are waited for only when the run is over."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
