"""Sockets that systemd, or whoever else started us, has opened for us (sd_listen_fds(3))."""

from __future__ import annotations

import os
from typing import Final

from clusterserve.checks import SettingValueError, near_match

#: The first descriptor; the others follow.
START: Final = 3


def passed() -> dict[int, str]:
    """The name of every such socket, by descriptor; empty if they are none, or not meant for this process."""
    pid, count = (os.environ.get(name, "").strip() for name in ("LISTEN_PID", "LISTEN_FDS"))
    if not pid.isdecimal() or not count.isdecimal() or int(pid) != os.getpid():
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    return {
        START + index: names[index] if index < len(names) and names[index] else "unknown"
        for index in range(min(int(count), 1024))
    }


def addresses(text: str) -> list[str]:
    """`fd://N` for every socket of the name in `fd://NAME` (systemd's FileDescriptorName=); any other text as it is.

    Raises `SettingValueError` if there is none of that name.
    """
    name = text.removeprefix("fd://")
    if name == text or not name or name.isdecimal():
        return [text]
    sockets = passed()
    found = [f"fd://{fd}" for fd, each in sockets.items() if each == name]
    if not found:
        known = dict.fromkeys(sockets.values())
        reason = f"the sockets that were passed are called {', '.join(known)}" if known else "no sockets were passed"
        raise SettingValueError("bind", text, f"{reason} (LISTEN_FDNAMES){near_match(name, known)}")
    return found
