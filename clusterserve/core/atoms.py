"""gunicorn's atoms: `%(h)s`, `%({Referer}i)s` … in a template, filled in with an `Exchange`.

What gunicorn's documents say of an atom holds here.  An atom that is unknown, or has nothing to say, is `-`.  Whatever
the client chose is made harmless: quotes are escaped as gunicorn does, and so is what is not printable.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from .exchange import Exchange, value_of

_NAMES: Final = re.compile(r"%\(([^)]*)\)")

Getter = Callable[[Exchange], object]


class Who(NamedTuple):
    """Who writes the log; None for the master."""

    worker: int | None
    slot: int | None
    pid: int


class Template:
    """A line's template.  Raises `ValueError` with a sentence if it is none."""

    def __init__(self, text: str, who: Who) -> None:
        self._text = text
        bare = text.replace("%%", "")
        if re.search(r"%(?!\()", bare):
            raise ValueError("a % that is none of an atom's is written %%")
        names = set(_NAMES.findall(bare))
        self._getters = [(name, getter) for name in names if (getter := _getter(name, who)) is not None]
        #: Whether it wants to know what time it is.
        self.timed = "t" in names
        #: What has no getter: unknown to gunicorn too.
        self._unknown = dict.fromkeys(names, "-")
        sample = Exchange({"path": "/", "headers": []}, "", None, 0.0)
        try:
            self.filled(sample, "")
        except (ValueError, TypeError) as exc:
            raise ValueError(f"it cannot be filled in: {exc}") from None

    def filled(self, exchange: Exchange, time: str) -> str:
        """The line.  `time` is what `%(t)s` shows, in the form of Apache's log: `[10/Oct/2000:13:55:36 -0700]`."""
        atoms: dict[str, object] = dict(self._unknown)
        atoms["t"] = time
        for name, getter in self._getters:
            value = getter(exchange)
            atoms[name] = harmless(value) if isinstance(value, str) else "-" if value is None else value
        return self._text % atoms


def harmless(text: str) -> str:
    """`text` in one line, whose quotes end nothing."""
    if '"' in text:
        text = text.replace('"', '\\"')
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _getter(name: str, who: Who) -> Getter | None:
    if name.startswith("{") and name[-2:-1] == "}":
        kind, variable = name[-1], name[1:-2].lower()
        if kind == "i":
            return lambda exchange: exchange.header(variable.encode("latin-1", "replace"))
        if kind == "o":
            return lambda exchange: value_of(exchange.headers, variable.encode("latin-1", "replace"))
        return _variable(variable, who) if kind == "e" else None
    return (lambda exchange: f"<{who.pid}>") if name == "p" else _ATOMS.get(name)


def _host(exchange: Exchange) -> str | None:
    client = exchange.scope.get("client")
    return str(client[0]) if client else None


def _user(exchange: Exchange) -> str | None:
    """Whose name stands in the credentials, whether they were right or not."""
    scheme, _, credentials = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(credentials.strip()).decode().partition(":")[0] or None
    except ValueError:
        return None


def _micro(exchange: Exchange) -> int:
    # Also if nobody knows it: a template may want a number.
    return round((exchange.service_time or 0.0) * 1_000_000)


_ATOMS: Final[Mapping[str, Getter]] = {
    "h": _host,
    "l": lambda exchange: None,
    "u": _user,
    "r": lambda exchange: exchange.line,
    "m": lambda exchange: exchange.method or None,
    "U": lambda exchange: exchange.path or None,
    "q": lambda exchange: exchange.query.decode("latin-1"),
    "H": lambda exchange: exchange.protocol,
    "s": lambda exchange: exchange.status,
    "b": lambda exchange: exchange.sent or None,
    "B": lambda exchange: exchange.sent,
    "f": lambda exchange: exchange.header(b"referer"),
    "a": lambda exchange: exchange.header(b"user-agent"),
    "T": lambda exchange: int(exchange.service_time or 0.0),
    "D": _micro,
    "M": lambda exchange: _micro(exchange) // 1000,
    "L": lambda exchange: "{}.{:06}".format(*divmod(_micro(exchange), 1_000_000)),
}


def _part(name: str, index: int) -> Getter:
    """Of an address of the connection's."""

    def getter(exchange: Exchange) -> object:
        address = exchange.scope.get(name)
        return address[index] if address else None

    return getter


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.6f}"


#: The variables of WSGI's environment, by their names in lower case; ours are called as WSGI calls its own.
_VARIABLES: Final[Mapping[str, Getter]] = {
    "request_method": lambda exchange: exchange.method or None,
    "raw_uri": lambda exchange: exchange.target or None,
    "path_info": lambda exchange: exchange.path.removeprefix(exchange.scope.get("root_path", "")) or None,
    "script_name": lambda exchange: exchange.scope.get("root_path", ""),
    "query_string": lambda exchange: exchange.query.decode("latin-1"),
    "server_protocol": lambda exchange: exchange.protocol,
    "server_name": _part("server", 0),
    "server_port": _part("server", 1),
    "remote_addr": _part("client", 0),
    "remote_port": _part("client", 1),
    "content_type": lambda exchange: exchange.header(b"content-type"),
    "content_length": lambda exchange: exchange.header(b"content-length"),
    "wsgi.url_scheme": lambda exchange: exchange.scope.get("scheme"),
    "clusterserve.request_id": lambda exchange: exchange.request_id or None,
    "clusterserve.queue_time": lambda exchange: _seconds(exchange.queue_time),
    "clusterserve.service_time": lambda exchange: _seconds(exchange.service_time),
    "clusterserve.close_code": lambda exchange: exchange.close_code,
}


def _variable(name: str, who: Who) -> Getter | None:
    if name in ("clusterserve.worker", "clusterserve.slot"):
        number = who.worker if name.endswith("worker") else who.slot
        return lambda exchange: number
    if name.startswith("http_"):
        header = name[5:].replace("_", "-").encode("latin-1", "replace")
        return lambda exchange: exchange.header(header)
    return _VARIABLES.get(name)
