"""What two masters say to each other while the new one takes over: one frozen dataclass per message, as JSON objects.

They may be of different versions.  So every message says which protocol it speaks, fields that are not known are passed
over, and fields that are missing have their defaults, where there are any.  What cannot be understood raises
`ProtocolError`; before `Yielded` that ends the upgrade and changes nothing.

    old                                     new
     | -- Estate, with the listeners ------> |  (inherited, read before anything is opened)
     | <------------------------- Hello ---- |  its workers start
     | <------------------------- Ready ---- |  they all listen; nobody has been served yet
     | -- Yielded -------------------------> |  it accepts from now on
     | -- Passed, with connections --------> |  … until the old one's last worker has gone:
     | -- Left ----------------------------> |
     | <--------------------- Succeeded ---- |  only to a parent that stays: who is next
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, get_args

from ..errors import ProtocolError

#: The protocol that is spoken here, the only one so far.
PROTOCOL: Final = 1

#: Descriptors that ride with one message; the kernel takes 253.
MAX_RIDERS: Final = 64

#: The longest message in bytes: 64 listeners with long names.
MAX_MESSAGE: Final = 1 << 16


class Waits(str, Enum):
    """What a connection that is handed over waits for."""

    #: A worker: its client has said something.
    WORKER = "worker"
    #: Its client's next request; it was served before.
    REQUEST = "request"
    #: Its client's first word.
    WORD = "word"


@dataclass(frozen=True)
class HeldListener:
    """A listening socket of the old master's.  `key` is its name in both directions."""

    key: int
    #: What it was called.
    bind: str
    #: Of `--bind`; else a worker has asked for it.
    pinned: bool = True
    #: UDP.
    datagram: bool = False
    #: Whether its connections are of HTTP, so that any such server can go on with them, and with TLS.
    client_speaks_first: bool = False
    #: The socket file that goes with it: path, device, inode; nothing if there is none of ours.
    file: tuple[str, int, int] | None = None
    tls: bool = False


@dataclass(frozen=True)
class HandedConnection:
    """A connection of which nobody has read anything that was not answered."""

    listener: int
    waits: Waits
    #: For so long already (seconds).
    since: float
    #: As in `core.connection.Connection`.
    client: bytes = b""
    port: int = 0
    family: int = 0
    server: bytes = b""
    server_port: int = 0
    #: Its proxy may yet say whose it is: what there is of a PROXY header has not been taken off.
    unknown: bool = False


@dataclass(frozen=True)
class Estate:
    """Old to new, first: what there is.  The sockets ride along, in this order; `more` follow in another message."""

    listeners: tuple[HeldListener, ...]
    #: The pid file of the old one, an absolute path; empty: none.
    pid_file: str = ""
    more: bool = False


@dataclass(frozen=True)
class Hello:
    """New to old: understood.  `patience` is how long its start may take, until all workers listen (seconds)."""

    patience: float


@dataclass(frozen=True)
class Ready:
    """New to old: all workers listen.  What is in neither list is not wanted any more."""

    #: These it listens on.
    taken: tuple[int, ...]
    #: These it keeps for a while: a program of its may still ask for them.
    kept: tuple[int, ...] = ()
    #: Of those taken: with these connections it can go on.
    continued: tuple[int, ...] = ()


@dataclass(frozen=True)
class Yielded:
    """Old to new: all yours.  The old one is gone within `grace` seconds."""

    grace: float = 0.0


@dataclass(frozen=True)
class Passed:
    """Old to new: connections, whose descriptors ride along in this order."""

    connections: tuple[HandedConnection, ...]


@dataclass(frozen=True)
class Left:
    """Old to new: the last worker has gone, and nothing more is passed.  A process 1 lives on, as a bare parent."""


@dataclass(frozen=True)
class Succeeded:
    """A master to the parent that stays for its sake (process 1): process `pid` is the master from now on."""

    pid: int


Message = Estate | Hello | Ready | Yielded | Passed | Left | Succeeded


_KINDS: Final[Mapping[str, type[Any]]] = MappingProxyType({kind.__name__: kind for kind in get_args(Message)})


def encode(message: Message) -> bytes:
    """The message as one packet.  Raises `ProtocolError` if it is too long for that."""
    values = {"message": type(message).__name__, "protocol": PROTOCOL, **dataclasses.asdict(message)}
    body = json.dumps(values, separators=(",", ":"), default=_plain).encode()
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return body


def _plain(value: object) -> str:
    assert isinstance(value, bytes)
    return value.hex()


def decode(body: bytes) -> Message:
    """The message in a packet; raises `ProtocolError` if there is none that is understood here."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ProtocolError("it is not JSON") from None
    if not isinstance(values, dict):
        raise ProtocolError("it is not an object")
    if values.get("protocol") != PROTOCOL:
        raise ProtocolError(f"it speaks protocol {values.get('protocol')!r:.20}, and this version {PROTOCOL}")
    name = values.get("message")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"the message {name!r:.60} is not known")
    message: Message = _build(kind, values)
    return message


def _build(kind: type[Any], values: Any) -> Any:
    if not isinstance(values, dict):
        raise ProtocolError(f"a {kind.__name__} is an object, not {values!r:.60}")
    found = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            found[field.name] = _value(kind, field.name, str(field.type), values[field.name])
        elif field.default is dataclasses.MISSING:
            raise ProtocolError(f"a {kind.__name__} without its {field.name}")
    return kind(**found)


def _value(kind: type[Any], name: str, annotation: str, value: Any) -> Any:
    """`value` as what the field is; JSON knows neither tuples nor bytes."""
    if annotation == "bool" and isinstance(value, bool):
        return value
    if annotation == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if annotation == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if annotation == "str" and isinstance(value, str):
        return value
    if annotation == "bytes" and isinstance(value, str):
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    if annotation == "Waits" and value in set(Waits):
        return Waits(value)
    if annotation.endswith("| None"):
        if value is None:
            return None
        path, *numbers = value if isinstance(value, list) else [None]
        if isinstance(path, str) and len(numbers) == 2 and all(type(number) is int for number in numbers):
            return path, *numbers
    if annotation.startswith("tuple[") and annotation.endswith(", ...]") and isinstance(value, list):
        inner = annotation.removeprefix("tuple[").removesuffix(", ...]")
        nested = {"HeldListener": HeldListener, "HandedConnection": HandedConnection}.get(inner)
        return tuple(_build(nested, each) if nested else _value(kind, name, inner, each) for each in value)
    raise ProtocolError(f"a {kind.__name__} with {value!r:.60} for its {name}")
