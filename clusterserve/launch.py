"""`Launch`: how worker processes are started.  What `Cluster.setup` may change for later ones; the rest of `Settings`
is fixed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from clusterserve.checks import (
    Check,
    SettingValueError,
    choice,
    flag,
    optional,
    passable,
    whole,
    writable_directory,
)
from clusterserve.debugport import DEFAULT, DebugPort, debug_port, require_debugpy

#: What an entry of `stdio` may be, besides a descriptor or an open file.
STREAMS: Final = ("inherit", "pipe", "ignore", "ipc")

_MAX_ID: Final = 2**32 - 2


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Frozen, and what it holds; `env` is a tuple of pairs."""

    #: A script's path, or "-m package.module", that each worker runs; empty: workers serve the application.
    exec: str = ""
    args: tuple[str, ...] = ()
    #: Of the workers; None: the master's.
    cwd: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    uid: int | None = None
    gid: int | None = None
    #: Capture stdin, stdout and stderr: `worker.process.stdout`.
    silent: bool = False
    #: By descriptor, and rather than `silent`: "inherit", "pipe", "ignore", "ipc", or a descriptor of the master's.
    stdio: tuple[str | int, ...] = ()
    #: Further options of the Python interpreter, as in ("-X", "dev").
    interpreter: tuple[str, ...] = ()
    serialization: str = "json"
    #: Where a debugger can attach: "HOST:BASE", and slot i has BASE + i; a port for one worker; a function that gives
    #: such a port for each `fork`.  0: any that is free.
    debug_port: DebugPort | None = None
    #: Workers wait for their debuggers before they import the application.
    debug_wait: bool = False
    #: A directory to which every worker writes a profile when it ends.
    profile: str | None = None

    @property
    def process(self) -> tuple[object, ...]:
        """What a process has from its start, and cannot be given later."""
        return self.cwd, self.env, self.uid, self.gid, self.interpreter

    def to_worker(self) -> dict[str, Any]:
        """What a worker is told of it."""
        return {
            "exec": self.exec,
            "args": list(self.args),
            "serialization": self.serialization,
            "debug_port": self.debugs,
            "debug_wait": self.debug_wait,
            "profile": self.profile,
        }

    @property
    def debugs(self) -> str | int | None:
        """Where workers are debugged, if it needs no function to know."""
        port = DEFAULT if self.debug_port is None and self.debug_wait else self.debug_port
        return None if callable(port) else port


def account(launch: Launch) -> tuple[int | None, int | None, list[int] | None]:
    """The user, group and further groups of worker processes; None: ours.

    Only root changes them, and then leaves nothing of root's: without a `gid` the user's own group is taken.
    """
    if (launch.uid is None and launch.gid is None) or os.geteuid() != 0:
        return launch.uid, launch.gid, None
    # Read late: most have no such wishes.
    import pwd

    try:
        found = pwd.getpwuid(os.geteuid() if launch.uid is None else launch.uid)
    except KeyError:
        # One that no account has is as good.
        return launch.uid, launch.gid, []
    group = found.pw_gid if launch.gid is None else launch.gid
    return launch.uid, group, os.getgrouplist(found.pw_name, group)


def owner(launch: Launch) -> tuple[int, int]:
    """Whose the files are that the master makes for its workers: user and group, -1 for the master's own."""
    uid, gid, _ = account(launch)
    return (-1 if uid is None else uid), (-1 if gid is None else gid)


def make_places(launch: Launch) -> None:
    """Make the directory to which the workers write, if it is missing, for their user; raises `SettingValueError`."""
    if launch.profile is None or os.path.isdir(launch.profile):
        return
    try:
        os.makedirs(launch.profile, exist_ok=True)
        if owner(launch) != (-1, -1):
            os.chown(launch.profile, *owner(launch))
    except OSError as error:
        raise SettingValueError("profile", launch.profile, f"cannot be made: {error.strerror}") from None


def main_script() -> dict[str, Any]:
    """`exec` and `args` of the program that runs now, which is what workers run if nobody says otherwise (Node)."""
    return {"exec": os.path.abspath(sys.argv[0]), "args": tuple(sys.argv[1:])}


def _words(setting: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingValueError(setting, value, "must be a list of texts")
    return tuple(passable(setting, each) for each in value)


def _path(setting: str, value: object) -> str:
    # Whether it exists is seen when a worker starts, and is then that worker's error.
    return passable(setting, os.fspath(value) if isinstance(value, os.PathLike) else value)


def environment(setting: str, value: object) -> tuple[tuple[str, str], ...]:
    """Variables, as a mapping of texts."""
    if isinstance(value, tuple):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise SettingValueError(setting, value, "must be a mapping of variables")
    pairs = tuple(
        (passable(setting, name), passable(f"{setting}[{name!r}]", content)) for name, content in value.items()
    )
    for name, _ in pairs:
        if not name or "=" in name:
            raise SettingValueError(setting, name, "is not the name of a variable")
    return pairs


def _user(setting: str, value: object) -> int:
    if isinstance(value, str) and not value.isdigit():
        import pwd

        try:
            return pwd.getpwnam(value).pw_uid
        except KeyError:
            raise SettingValueError(setting, value, "there is no such user") from None
    return whole(0, _MAX_ID)(setting, value)


def _group(setting: str, value: object) -> int:
    if isinstance(value, str) and not value.isdigit():
        import grp

        try:
            return grp.getgrnam(value).gr_gid
        except KeyError:
            raise SettingValueError(setting, value, "there is no such group") from None
    return whole(0, _MAX_ID)(setting, value)


def _stdio(setting: str, value: object) -> tuple[str | int, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingValueError(setting, value, f"must be a list, each {', '.join(STREAMS)} or a descriptor")
    entries = tuple(_stream(setting, each) for each in value)
    if entries and entries.count("ipc") != 1:
        raise SettingValueError(setting, value, "must have one entry 'ipc', the channel of worker and master")
    if "ipc" in entries[:3]:
        raise SettingValueError(setting, value, "the 'ipc' entry comes after the three standard streams")
    return entries


def _stream(setting: str, value: object) -> str | int:
    number = value.fileno() if hasattr(value, "fileno") else value
    if isinstance(number, str):
        return choice(*STREAMS)(setting, number)
    return whole(0)(setting, number)


def _debug_wait(setting: str, value: object) -> bool:
    wanted = flag(setting, value)
    if wanted:
        require_debugpy(setting, value)
    return wanted


LAUNCH_CHECKS: Final[dict[str, Check]] = {
    "exec": _path,
    "args": _words,
    "cwd": optional(_path),
    "env": environment,
    "uid": optional(_user),
    "gid": optional(_group),
    "silent": flag,
    "stdio": _stdio,
    "interpreter": _words,
    "serialization": choice("json", "pickle"),
    "debug_port": debug_port,
    "debug_wait": _debug_wait,
    "profile": optional(writable_directory),
}

LAUNCH_NAMES: Final = tuple(field.name for field in fields(Launch))
