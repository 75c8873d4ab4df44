"""`clusterserve config`: every setting as it would be, and where it comes from.

What is printed is TOML: saved as clusterserve.toml, it gives the same settings, but for a password.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from clusterserve.activation import passed
from clusterserve.options import GROUPS, OURS
from clusterserve.settings import Settings
from clusterserve.sources import Given, Layer, complete, settings_of
from clusterserve.toml import written

_ADDRESSES: Final = ("bind", "host", "port", "uds", "fd")

#: Stands for an application where none is named: the settings can be looked at all the same.
_SOME_APP: Final = "module:app"

#: Variables that move a default.
_MOVES: Final = {"bind": "PORT", "forwarded_allow_ips": "FORWARDED_ALLOW_IPS"}

_WIDTH: Final = 48


def report(given: Layer) -> str:
    """The settings that `given` makes, a line each.  Raises `SettingsError` if they are none."""
    given = complete(given)
    settings = settings_of({"app": Given(_SOME_APP, ""), **given}, serves=False)
    named = [given[name].origin for name in ("app", "factory") if name in given]
    lines = [_line("app", settings.app + "()" * settings.factory if "app" in given else None, ", ".join(named))]
    for title, group in GROUPS.items():
        names = list(dict.fromkeys("bind" if spec.setting in _ADDRESSES else spec.setting for spec in group))
        found = [line for name in names for line in _setting(name, settings, given)]
        if found:
            lines += ["", f"# {title}", *found]
    return "\n".join(lines)


def _setting(name: str, settings: Settings, given: Layer) -> Iterator[str]:
    if name == "bind":
        origins = dict.fromkeys(given[each].origin for each in _ADDRESSES if each in given)
        yield _line(name, [str(bind) for bind in settings.binds], ", ".join(origins) or _origin(name, given))
    elif name == "workers":
        yield _line(name, settings.workers, settings.workers_source)
    elif name == "headers":
        yield _line(name, [f"{header}: {value}" for header, value in settings.headers], _origin(name, given))
    elif name == "workers_max_rss":
        yield _line(name, _size(settings.workers_max_rss), _origin(name, given))
    elif name == "ssl_keyfile_password" and settings.ssl_keyfile_password is not None:
        yield f"# {name} is set{'':<{_WIDTH - len(name) - 9}}  # {_origin(name, given)}"
    elif name in ("umask", "uds_permissions"):
        mode = getattr(settings, name)
        yield _line(name, None if mode is None else f"{mode:03o}", _origin(name, given))
    elif name in OURS:
        if name not in given or name == "print_config":
            return
        # No part of `Settings`, but heeded.
        value = dict(each.split("=", 1) for each in given[name].value) if name == "env" else given[name].value
        line = _line(name, value, given[name].origin)
        yield f"# {line}" if name == "config" else line
    elif hasattr(settings, name) and name != "factory":
        yield _line(name, getattr(settings, name), _origin(name, given))


def _line(name: str, value: object, origin: str) -> str:
    if value is None:
        return f"# {name} is not set"
    text = f"{name} = {written(value)}"
    return f"{text:<{_WIDTH}}  # {origin}"


def _origin(name: str, given: Layer) -> str:
    if name in given:
        return given[name].origin
    if name == "bind" and passed():
        return "LISTEN_FDS"
    variable = _MOVES.get(name, "")
    return variable if os.environ.get(variable, "").strip() else "default"


def _size(count: int) -> str:
    """As it can be given: a bare number would count MiB."""
    return f"{count >> 20}M" if count % (1 << 20) == 0 else f"{count / 1024!r}K"
