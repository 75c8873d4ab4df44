"""How this program was started: so that a new master can be started likewise (SIGUSR2), and whether this is one."""

from __future__ import annotations

import os
import sys
from typing import Final, NamedTuple

#: What makes a process the successor of its parent: the descriptor of the socket between them, its parent's process id,
#: and the descriptor to a parent that stays whatever happens (process 1), -1 for none.
VARIABLE: Final = "CLUSTERSERVE_SUCCESSION"

#: They name the process that they are for.
_ADDRESSED: Final = ("LISTEN_PID", "WATCHDOG_PID")


class Claim(NamedTuple):
    """What the successor was given.  Owns both descriptors."""

    fd: int
    predecessor: int
    parent_fd: int


class Beginning(NamedTuple):
    """The command line, the directory, the environment and the umask this program was started with."""

    command: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    umask: int


_beginning: Beginning | None = None
_claim: Claim | None = None


def beginning() -> Beginning:
    """How it began: the first call looks, and must come before anything is changed; later ones remember."""
    global _beginning, _claim
    if _beginning is None:
        _claim = _look()
        _beginning = Beginning((sys.executable, *sys.orig_argv[1:]), _directory(), dict(os.environ), _umask())
    return _beginning


def claim() -> Claim | None:
    """What a predecessor has given to this process; once, then it is gone."""
    global _claim
    beginning()
    claimed, _claim = _claim, None
    return claimed


def _look() -> Claim | None:
    numbers = os.environ.pop(VARIABLE, "").split(",")
    if len(numbers) != 3 or numbers[1] != str(os.getppid()):
        # Of somebody between us and the one that was meant.
        return None
    found = Claim(*map(int, numbers))
    for fd in (found.fd, found.parent_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    for name in _ADDRESSED:
        if os.environ.get(name, "").strip() == numbers[1]:
            os.environ[name] = str(os.getpid())
    return found


def _umask() -> int:
    # Asked for by setting another: what a thread makes in between is nobody else's.
    found = os.umask(0o077)
    os.umask(found)
    return found


def _directory() -> str:
    """The working directory by the name it was entered with: a link that points to the current release is the link."""
    try:
        here, named = os.getcwd(), os.environ.get("PWD", "")
    except FileNotFoundError:
        # It was removed: the help can be had there, and everything else says so (cli.py).
        return ""
    try:
        return named if os.path.isabs(named) and os.path.samestat(os.stat(named), os.stat(here)) else here
    except OSError:
        return here
