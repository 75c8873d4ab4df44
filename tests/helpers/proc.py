"""What the kernel says of processes and sockets, read from /proc: no test believes the server's own word for it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

_LISTEN = "0A"


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def marked(mark: str) -> list[int]:
    """The living processes whose environment holds `mark`: what a server started, also when its parent is gone."""
    wanted, found = mark.encode(), []
    for pid in pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment.split(b"\0"):
            found.append(pid)
    return sorted(found)


def _stat(pid: int) -> list[str]:
    # The command's name may hold blanks and brackets; the fields that matter follow its last bracket.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """The kernel's letter: R running, S sleeping, T stopped, Z dead and not waited for; "" when there is no process."""
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def children(pid: int) -> list[int]:
    """Direct children, those included that are dead and not yet waited for."""
    found = []
    for each in pids():
        try:
            parent = int(_stat(each)[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(each)
    return sorted(found)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descriptors(pid: int) -> dict[int, str]:
    """Descriptor number → what it is, as /proc/PID/fd spells it."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def socket_inodes(pid: int) -> set[int]:
    return {int(found[1]) for link in descriptors(pid).values() if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}


def _tcp_rows(tables: Sequence[str] = ("tcp", "tcp6")) -> Iterator[list[str]]:
    for table in tables:
        with open(f"/proc/net/{table}") as rows:
            next(rows)
            yield from map(str.split, rows)


def _listening_rows() -> Iterator[list[str]]:
    # The kernel names those that listen first.  What follows may be tens of thousands in TIME_WAIT, and slow to read.
    for table in ("tcp", "tcp6"):
        yield from itertools.takewhile(lambda row: row[3] == _LISTEN, _tcp_rows([table]))


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def listening_inodes(port: int) -> set[int]:
    """The inodes of the TCP sockets that listen on `port`."""
    return {int(row[9]) for row in _listening_rows() if _port(row[1]) == port}


def all_listening_inodes() -> set[int]:
    """The inodes of everything on this machine that listens for TCP."""
    return {int(row[9]) for row in _listening_rows()}


def unix_inodes(path: str) -> set[int]:
    """The inodes of the unix sockets bound to `path` that listen (the kernel's flag __SO_ACCEPTCON)."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {int(row[6]) for row in rows if len(row) == 8 and row[7] == path and int(row[3], 16) & 0x10000}


def accepted_inodes(local_port: int, peer_ports: Collection[int]) -> dict[int, int]:
    """The server's ends of IPv4 connections: the client's port → the inode of the socket that was accepted.

    A connection that nobody has accepted, or whose last descriptor is closed, has none.  The whole table is read: slow.
    """
    found = {}
    for row in _tcp_rows(["tcp"]):
        if _port(row[1]) == local_port and int(row[9]) and (peer := _port(row[2])) in peer_ports:
            found[peer] = int(row[9])
    return found
