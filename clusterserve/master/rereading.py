"""What of a configuration that was read again holds at once, and what only at the next start."""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

from ..settings import Settings

#: What the master has made of these it does not unmake: its sockets, its queue, its log, its process.
FIXED: Final = frozenset(
    {
        "proxy_protocol", "proxy_allow_from", "reuse_port",
        "binds", "backlog", "uds_permissions", "uid", "gid", "policy", "dispatch", "max_pending", "hooks", "respawn",
        "timeout", "timeout_keep_alive", "timeout_queue", "timeout_request_header", "exec", "args", "serialization",
        "log_level", "log_config", "log_format", "error_logfile", "access_logfile", "use_colors", "pid", "umask",
        "name", "preload", "reload", "reload_dirs", "reload_includes", "reload_excludes", "reload_delay",
        "reload_extra_files", "ssl_version",
    }
)  # fmt: skip

_SILENT: Final = frozenset({"workers_source"})


class Reread(NamedTuple):
    """The settings from now on, which of them are new, and which would be at the next start."""

    settings: Settings
    changed: tuple[str, ...]
    fixed: tuple[str, ...]


def compare(before: Settings, after: Settings) -> Reread:
    """What becomes of `before` when the configuration says `after` now."""
    names = [
        field.name
        for field in dataclasses.fields(Settings)
        if field.name not in _SILENT and getattr(before, field.name) != getattr(after, field.name)
    ]
    # Whether there is TLS is a thing of the addresses.
    other_scheme = before.tls != after.tls
    fixed = tuple(name for name in names if name in FIXED or (other_scheme and name.startswith("ssl_")))
    settings = dataclasses.replace(after, **{name: getattr(before, name) for name in fixed})
    return Reread(settings, tuple(name for name in names if name not in FIXED), fixed)
