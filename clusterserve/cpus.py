"""How many processors this process may really use: its affinity, and the quota of its cgroup and of those above it.

`os.cpu_count()` is what the machine has.  A container with a quota of 2 on a machine of 160 would get 160 workers.
A file that is missing or makes no sense sets no limit; nothing here raises.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cpus:
    """`count` workers suit this process; `explanation` says why, for the start-up line."""

    count: int
    explanation: str


def usable_cpus(root: str = "/") -> int:
    return survey(root).count


def survey(root: str = "/") -> Cpus:
    """What the process under `root` may use.  `root` holds `proc/self` and the mount points named in there."""
    affinity = len(os.sched_getaffinity(0))
    quota = min(_quotas(root), default=None)
    if quota is None or quota >= affinity:
        return Cpus(affinity, f"{affinity} usable processor{'s' if affinity > 1 else ''}")
    # Rounded up: half a processor more is used by the next worker, half a worker less is used by nobody.
    return Cpus(math.ceil(quota), f"a cgroup quota of {quota:.4g} processor{'' if quota <= 1 else 's'}")


def _quotas(root: str) -> Iterator[float]:
    """Every quota on the way from the process's own cgroups up to where they are mounted, in processors."""
    # A hybrid system has both versions, each with a place for this process.
    groups = dict(_groups(_read(root, "proc/self/cgroup")))
    for version, top, point in _mounts(_read(root, "proc/self/mountinfo")):
        if version not in groups:
            continue
        for directory in _upwards(groups[version], top):
            place = f"{point}/{directory}"
            if version == "cgroup2":
                limit, _, period = _read(root, f"{place}/cpu.max").strip().partition(" ")
            else:
                limit = _read(root, f"{place}/cpu.cfs_quota_us").strip()
                period = _read(root, f"{place}/cpu.cfs_period_us").strip()
            # No limit is "max" in version 2 and -1 in version 1; 100 ms is the kernel's own period.
            if _positive(limit) and _positive(period or "100000"):
                yield int(limit) / int(period or "100000")


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """Version and path of the cgroups that may have a quota, from lines HIERARCHY:CONTROLLERS:PATH."""
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield "cgroup2", path
        elif "cpu" in controllers.split(","):
            yield "cgroup", path


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """Version, the cgroup that is mounted, and where; see proc_pid_mountinfo(5)."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        mount, filesystem = before.split(" "), after.split(" ")
        if len(mount) < 5 or len(filesystem) < 3:
            continue
        version = filesystem[0]
        if version == "cgroup2" or (version == "cgroup" and "cpu" in filesystem[2].split(",")):
            yield version, _unescape(mount[3]), _unescape(mount[4])


def _upwards(group: str, top: str) -> Iterator[str]:
    """The directories of `group` and of its ancestors, below the mount point whose cgroup is `top`."""
    names = [name for name in group.split("/") if name]
    above = [name for name in top.split("/") if name]
    below = names[len(above) :]
    if names[: len(above)] != above or ".." in below:
        # Outside the mounted part, as in a container without a cgroup namespace, or beside it ("/..", a process moved
        # in from another namespace): what can be seen is the mount point alone.
        below = []
    for depth in range(len(below), -1, -1):
        yield "/".join(below[:depth])


def _positive(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None and int(text) > 0


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(root: str, path: str) -> str:
    try:
        with open(f"{root}/{path}", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (OSError, ValueError):  # ValueError: a NUL in a path, which only a made-up mountinfo can hold
        return ""
