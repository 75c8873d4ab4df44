"""Addresses, workers and policy: what was given for them, and otherwise what the environment says, or what we say.

WEB_CONCURRENCY, PORT, LISTEN_FDS and CLUSTERSERVE_POLICY are looked up here; a blank variable is as good as none.  What
a variable says is checked as what was given is, and its name stands in the error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from clusterserve.activation import addresses, passed
from clusterserve.binds import ANY_HOST, DEFAULT_PORT, Bind, parse_all
from clusterserve.checks import choice, text, whole
from clusterserve.errors import SettingsError

POLICIES: Final = ("rr", "least", "hash", "none")
POLICY_VARIABLES: Final = ("CLUSTERSERVE_POLICY", "CLUSTERSERVE_SCHED_POLICY")  # ours, and Node's under our prefix


def variable(name: str) -> str:
    """What the environment says, without the blanks around it; empty if it says nothing."""
    return os.environ.get(name, "").strip()


def binds(given: dict[str, object]) -> tuple[Bind, ...]:
    """Where to listen: what `bind`, `uds`, `fd`, or `host` and `port` say; else passed sockets, PORT, our own port."""
    names = list(given)
    if len(names) > 1 and names != ["host", "port"]:
        raise SettingsError(f"{names[0]} and {names[1]} exclude each other: give bind, or uds, or fd, or host and port")
    if not given and (sockets := passed()):
        return tuple(Bind("fd", fd=fd) for fd in sockets)
    if "bind" in given:
        return parse_all(_named(given["bind"]))
    if "uds" in given:
        return (Bind("unix", path=text("uds", given["uds"])),)
    if "fd" in given:
        return (Bind("fd", fd=whole(0)("fd", given["fd"])),)
    host = text("host", given.get("host", "127.0.0.1")) or ANY_HOST
    port, source = given.get("port", DEFAULT_PORT), "port"
    if "port" not in given and variable("PORT"):
        port, source = variable("PORT"), "PORT"
        # gunicorn's rule: who says PORT is a platform that connects from outside.
        host = host if "host" in given else ANY_HOST
    return (Bind("tcp", host=host, port=whole(0, 65535)(source, port)),)


def _named(value: object) -> object:
    """The same addresses, with the sockets that were passed to us by number and not by name."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    items = list(value) if isinstance(value, Iterable) and several else [value]
    return [each for item in items for each in (addresses(item) if isinstance(item, str) else [item])]


def workers(value: object, *, reloads: bool) -> tuple[int, str]:
    """How many, and why that many."""
    source = "workers"
    if value is None and variable("WEB_CONCURRENCY"):
        value, source = variable("WEB_CONCURRENCY"), "WEB_CONCURRENCY"
    if value is None and reloads:
        # As uvicorn: one is what is easiest to follow, and starts fastest.
        return 1, "one, for development with --reload"
    if value in (None, "auto"):
        # Read late: a count that was given needs no look at /sys.
        from clusterserve.cpus import survey

        cpus = survey()
        return cpus.count, cpus.explanation
    return whole(1, also=", or 'auto'")(source, value), source


def policy(value: object) -> str:
    """The policy that was given, or that a variable names, or round robin."""
    source = "policy"
    if value is None:
        source, value = policy_variable() or (source, "rr")
    return check_policy(value, source)


def check_policy(value: object, source: str = "policy") -> str:
    """The name of a policy, if it is one."""
    return choice(*POLICIES, imports=True)(source, value)


def policy_variable() -> tuple[str, str] | None:
    """The variable that names a policy, and the policy; raises `SettingsError` if two name different ones."""
    found = {name: variable(name) for name in POLICY_VARIABLES if variable(name)}
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in found.items())
        raise SettingsError(f"{both} contradict each other: unset one of them")
    return next(iter(found.items()), None)
