"""Process trees as /proc shows them: who belongs to a server, and the processor time they have used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    started: int
    alive: bool
    cpu_seconds: float


@dataclass(frozen=True)
class MachineTime:
    """Processor time of the whole machine since it started."""

    busy: float
    total: float


def everyone() -> dict[int, Process]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            process = _parse(stat)
            found[process.pid] = process
    return found


def tree(root: int) -> dict[int, Process]:
    """The process `root`, a session leader, and all that came from it.

    The session finds those whose parent has died, the parents find those that left the session.
    """
    processes = everyone()
    members = {pid for pid, process in processes.items() if pid == root or process.session == root}
    while more := {p.pid for p in processes.values() if p.parent in members and p.pid not in members}:
        members |= more
    return {pid: processes[pid] for pid in members}


def cpu_between(before: dict[int, Process], after: dict[int, Process]) -> float:
    """Seconds of processor time used by a tree between two looks at it (user and system)."""
    return sum(
        process.cpu_seconds - (before[pid].cpu_seconds if pid in before else 0.0) for pid, process in after.items()
    )


def is_helper(pid: int) -> bool:
    """Whether this is the process that Python's multiprocessing starts to clean up after the others."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def pss(pids: Iterable[int]) -> int:
    """Bytes of memory, each page that several processes share counted in parts; what the kernel holds is not in it."""
    total = 0
    for pid in pids:
        # One that has ended meanwhile has none.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def machine_time() -> MachineTime:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / TICKS_PER_SECOND for field in fields)
    busy = user + nice + system + irq + softirq + steal
    return MachineTime(busy=busy, total=busy + idle + iowait)


def connections(port: int) -> int:
    """How many connections the server on a local port still has (established, or closed by the client alone)."""
    local = f":{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[1].endswith(local) and row[3] in {"01", "08"} for row in rows)


def _parse(stat: str) -> Process:
    # The name in parentheses may hold spaces and parentheses of its own.
    head, _, tail = stat.rpartition(")")
    fields = tail.split()
    return Process(
        pid=int(head.split(" ", 1)[0]),
        parent=int(fields[1]),
        session=int(fields[3]),
        started=int(fields[19]),
        alive=fields[0] not in {"Z", "X"},
        cpu_seconds=(int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND,
    )
