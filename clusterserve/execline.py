"""The command line of `clusterserve exec`: our options up to the program's name, and all behind it for the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from clusterserve.errors import SettingsError
from clusterserve.options import GROUPS, SPECS

#: Groups of options that are about serving an application, and single ones.
_APPLICATION_GROUPS: Final = ("Application", "Binding", "HTTP", "WebSocket", "Proxies")
_APPLICATION: Final = frozenset(
    {
        "dispatch", "limit_max_requests", "limit_max_requests_jitter", "timeout_request", "access_log",
        "access_logfile", "access_logformat", "access_log_exclude", "capture_output", "check_config", "print_config",
        "preload",
    }
)  # fmt: skip
_PROGRAM: Final = frozenset({"chdir", "env", "env_file"})

#: The settings that a cluster of programs has.
SETTINGS: Final = frozenset(
    spec.setting
    for title, group in GROUPS.items()
    for spec in group
    if spec.setting in _PROGRAM or not (title in _APPLICATION_GROUPS or spec.setting in _APPLICATION)
)

_FLAGS: Final = {flag: spec for spec in SPECS for flag in spec.flags}


class Line(NamedTuple):
    """`ours` are options of ours; `program` is "script.py" or "-m module", empty if there is none."""

    ours: list[str]
    program: str
    args: list[str]


def split(argv: Sequence[str]) -> Line:
    """Find the program.  An option of ours takes the next word with it if it has a value."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "-m":
            if position + 1 == len(argv):
                raise SettingsError("-m needs the name of a module")
            return Line(list(argv[:position]), f"-m {argv[position + 1]}", list(argv[position + 2 :]))
        if word == "--":
            rest = argv[position + 1 :]
            return Line(list(argv[:position]), rest[0] if rest else "", list(rest[1:]))
        if not word.startswith("-") or word == "-":
            return Line(list(argv[:position]), word, list(argv[position + 1 :]))
        spec = _FLAGS.get(word)
        position += 2 if spec is not None and spec.kind in ("value", "many") else 1
    return Line(list(argv), "", [])


def refuse_foreign(setting: str, origin: str) -> None:
    """Raise `SettingsError` for an option that a cluster of programs does not have."""
    if setting in SETTINGS:
        return
    if setting in ("bind", "host", "port", "uds", "fd"):
        raise SettingsError(f"{origin} is for applications: a program says itself where it listens")
    raise SettingsError(f"{origin} is for applications, and exec runs a program")
