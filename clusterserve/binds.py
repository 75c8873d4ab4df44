"""`Bind`: one address to listen on, as text and as fields.  Opens nothing, resolves nothing.

A `Bind` that exists is well formed, and `Bind.parse(str(bind)) == bind` holds for every one of them: the text is what
travels to workers, into logs and back from the API.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from clusterserve.checks import MAX_INT, SettingValueError, whole

DEFAULT_PORT = 8000
ANY_HOST = "0.0.0.0"
GRAMMAR = "write HOST:PORT, [IPV6]:PORT, :PORT, unix:PATH, unix:@NAME or fd://N"

# One bind has one text: a field that its kind does not use must be left alone.
_UNUSED = {"tcp": ("", -1), "unix": ("", 0, -1), "fd": ("", 0, "")}


@dataclass(frozen=True)
class Bind:
    """Where to listen: a TCP address, a unix socket (`@` first: an abstract name) or an inherited descriptor."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __post_init__(self) -> None:
        if self.kind == "tcp":
            _check_host(self.host)
            whole(0, 65535)("port", self.port)
            unused: tuple[object, ...] = (self.path, self.fd)
        elif self.kind == "unix":
            _check_path(self.path)
            unused = (self.host, self.port, self.fd)
        else:
            whole(0)("fd", self.fd)
            unused = (self.host, self.port, self.path)
        if unused != _UNUSED[self.kind]:
            raise SettingValueError("bind", str(self), f"a {self.kind} address has no other fields")

    @classmethod
    def parse(cls, text: str) -> Bind:
        """The address that `text` names.  Raises `SettingValueError` (a `SettingsError`) that quotes all of `text`."""
        try:
            return cls._parse(text)
        except SettingValueError as error:
            raise SettingValueError("bind", text, error.reason) from None

    @classmethod
    def _parse(cls, text: str) -> Bind:
        if text.startswith("unix:"):
            # gunicorn's users write unix:///run/x.sock; the two slashes belong to the prefix there.
            return cls("unix", path=text[5:].removeprefix("//"))
        if text.startswith("fd://"):
            return cls("fd", fd=_digits(text[5:], MAX_INT, "the descriptor must be a whole number of at least 0"))
        text = text.removeprefix("tcp://")
        if "://" in text:
            raise SettingValueError("bind", text, f"an address is not a URL; {GRAMMAR}")
        if "," in text:
            raise SettingValueError("bind", text, "several addresses are several --bind, or a list")
        host, colon, port = _split(text)
        if not colon:
            if host.isdigit():
                raise SettingValueError("bind", text, f"a port alone is written ':{host}'")
            return cls("tcp", host=host, port=DEFAULT_PORT)
        number = _digits(port, 65535, "the port must be a whole number from 0 to 65535")
        return cls("tcp", host=host or ANY_HOST, port=number)

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{'//' if self.path.startswith('//') else ''}{self.path}"
        if self.kind == "fd":
            return f"fd://{self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_all(value: object) -> tuple[Bind, ...]:
    """One address or several, each a text or a `Bind`."""
    items: Iterable[object] = [value] if isinstance(value, str | Bind) or not isinstance(value, Iterable) else value
    binds: list[Bind] = []
    for item in items:
        if not isinstance(item, str | Bind):
            raise SettingValueError("bind", item, "must be a text or a Bind")
        bind = Bind.parse(item) if isinstance(item, str) else item
        # Port 0 is a new port each time it is asked for.
        if bind in binds and (bind.kind != "tcp" or bind.port):
            raise SettingValueError("bind", str(bind), "is given twice")
        binds.append(bind)
    if not binds:
        raise SettingValueError("bind", value, "must be at least one address")
    return tuple(binds)


def _split(text: str) -> tuple[str, str, str]:
    """HOST, ':' when a port follows, PORT."""
    if not text.startswith("["):
        if text.count(":") > 1:
            raise SettingValueError("bind", text, "an IPv6 address goes in brackets, as in [::1]:8000")
        return text.partition(":")
    host, bracket, rest = text[1:].partition("]")
    if not bracket or ":" not in host or rest[:1] not in ("", ":"):
        raise SettingValueError("bind", text, "brackets hold an IPv6 address, as in [::1]:8000")
    return host, rest[:1], rest[1:]


def _digits(text: str, high: int, reason: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > high:
        raise SettingValueError("bind", text, reason)
    return int(text)


def _check_host(host: str) -> None:
    if ":" in host:
        # Imported for IPv6 only; everybody else starts sooner without it.
        from ipaddress import AddressValueError, IPv6Address

        try:
            IPv6Address(host)
        except AddressValueError:
            raise SettingValueError("host", host, "not an IPv6 address, nor the name of a host") from None
    elif not host or not host.isprintable() or re.search(r"[\s/@\[\]?#%]", host):
        raise SettingValueError("host", host, f"not the name or the address of a host; {GRAMMAR}")


def _check_path(path: str) -> None:
    if path in ("", "@"):
        raise SettingValueError("uds", path, "needs the path of a socket, or '@' and a name")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise SettingValueError("uds", path, "cannot be written in the file system's encoding") from None
    if b"\0" in encoded:
        raise SettingValueError("uds", path, "holds a NUL byte")
