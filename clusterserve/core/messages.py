"""The message channel's frames: a fixed header, then JSON.  One frozen dataclass per message.

Frames of another kind than 0 are the program's own messages (`core.envelope`) and are never looked into here.

Facts are named in the past tense, commands in the imperative.  What arrives from the other end is data: an unknown or
malformed frame raises `ProtocolError`, which costs that worker and nobody else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType
from typing import Any, Final, get_args

from ..errors import ProtocolError

#: The longest body of a frame of ours, in bytes.  The longest real one is a traceback.
MAX_BODY: Final = 1 << 20

#: The longest body of a frame of the program's: a piece of a message, and its number.
MAX_USER_FRAME: Final = (1 << 16) + 8

# body length, kind (0: a message of this module), descriptors that ride with the frame
_HEADER: Final = Struct("<IBB")
HEADER_SIZE: Final = _HEADER.size


@dataclass(frozen=True)
class Boot:
    """Master to worker, first of all: who you are and what to serve.

    The descriptors of the log's files ride along, where there are any.
    """

    worker: int
    slot: int
    settings: dict[str, Any]
    #: The master's sys.path, so that what imports there imports here; empty to leave the worker's own.
    path: list[str]
    #: How this worker was launched: exec (empty: serve the application), args, serialization …
    launch: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Certificate and keys, as `Credentials.to_json` has them; empty: no TLS.
    tls: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Its cell in the tally, which no other living worker has.
    place: int = 0


@dataclass(frozen=True)
class Online:
    """The worker is up and about to import the application, or to run its program.

    A descriptor rides along: the file to which it writes its threads' stacks when it gets SIGPWR.
    """

    pid: int


@dataclass(frozen=True)
class Listen:
    """The worker wants to listen.  `request` comes back with the answer.

    `bind` is the address as text: with a numeric host, resolved by the worker.  Port 0 means the first listener on such
    a port that this worker is not on yet, so that a worker's second server on port 0 is a second listener, and each is
    common to all workers.  `client_speaks_first` allows the master to wait for bytes before it hands a connection over:
    only HTTP servers of ours set it.  `pinned` asks for a listener of `--bind`.
    """

    request: int
    bind: str
    backlog: int
    client_speaks_first: bool
    pinned: bool
    #: A datagram socket instead of a stream's: it is shared, whatever the policy.
    datagram: bool = False
    #: IPv6 without IPv4.
    v6only: bool = False
    reuse_address: bool = True
    keep_alive: bool = False
    #: The master sends this worker no more than so many connections at a time; -1: no limit.
    max_connections: int = -1
    #: For every worker that listens there: the first one's counts.  See `clusterserve.listen_options`.
    data: str = ""
    #: Its server speaks TLS.
    tls: bool = False


@dataclass(frozen=True)
class Listened:
    """The master's answer.  `errno` is 0 or why it failed; with `shared` the listening socket itself rides along."""

    request: int
    listener: int
    errno: int
    reason: str
    family: int
    #: What getsockname() says: [host, port, ...] or the path.
    sockname: list[Any] | str
    shared: bool
    #: The largest that any worker asked for so far.
    backlog: int = 0
    #: The first worker's.
    data: str = ""


@dataclass(frozen=True)
class Listening:
    """The worker's server is in place: connections of `listener` may come."""

    listener: int


@dataclass(frozen=True)
class Closed:
    """The worker has closed its server on `listener`."""

    listener: int


@dataclass(frozen=True)
class Failed:
    """The application could not be loaded or started; the worker exits next."""

    reason: str
    traceback: str


@dataclass(frozen=True)
class Beat:
    """A heartbeat: the worker's event loop turns.  `served` counts its requests since it started."""

    served: int
    #: All the same it is of no use: its threads are stuck.
    stuck: bool = False


@dataclass(frozen=True)
class Debug:
    """Master to worker: let a debugger attach.  `port` is as in `Settings.debug_port`: a text, or a number."""

    port: str | int


@dataclass(frozen=True)
class Debugged:
    """A debugger can attach at `address` (HOST:PORT).

    `wanted` is the address it could not have, and `why`.  Without an address there is no debugger.
    """

    address: str
    wanted: str
    why: str


@dataclass(frozen=True)
class ShowStacks:
    """Master to worker: tell where your tasks stand."""


@dataclass(frozen=True)
class Stacks:
    """The answer.  `threads` names threads by their numbers, in hexadecimal; `tasks` is a text of many lines."""

    threads: dict[str, Any]
    tasks: str


@dataclass(frozen=True)
class Renew:
    """Master to worker: these are the certificate and keys from now on, for new connections; as `Boot.tls`."""

    tls: dict[str, Any]


@dataclass(frozen=True)
class Leave:
    """The worker was asked to go (SIGTERM), and asks to be drained: the master decides when."""


@dataclass(frozen=True)
class Stopping:
    """Master to worker: the cluster was told to stop.  Serve on until you are drained, but you may let others know."""


@dataclass(frozen=True)
class Drain:
    """Master to worker: finish what you hold within `grace` seconds (`quick`: cut it), shut down, exit 0.

    `keep`: others go on serving, so idle connections come back to the master.
    """

    grace: float
    quick: bool
    keep: bool


@dataclass(frozen=True)
class Reopen:
    """Master to worker: write the log to the files whose descriptors ride along from now on."""

    number: int


@dataclass(frozen=True)
class Reopened:
    """Nothing more goes to the files before `Reopen` number `number`; `trouble` says what has kept it from that."""

    number: int
    trouble: str


@dataclass(frozen=True)
class Prepare:
    """Master to template, first of all: what to make once for all workers of this generation."""

    template: int
    generation: int
    settings: dict[str, Any]
    #: As in `Boot`, and so are the descriptors.
    path: list[str]
    #: What its forks' TLS sessions are made on, as `credentials.terms` has it; empty without TLS.
    terms: str = ""


@dataclass(frozen=True)
class Prepared:
    """Workers can be forked from this template from now on."""


@dataclass(frozen=True)
class Fork:
    """Master to template: fork a worker.  `env` are variables of its own.

    Its descriptors ride along: the four of every worker, and then those of `stdio`, by the numbers they shall have.
    """

    worker: int
    slot: int
    env: dict[str, Any]
    stdio: list[int]


@dataclass(frozen=True)
class Born:
    """The worker was forked, is a child of the master, and starts now."""

    worker: int
    pid: int


@dataclass(frozen=True)
class Unborn:
    """The worker could not be forked, for this errno."""

    worker: int
    errno: int


Message = (
    Boot | Online | Listen | Listened | Listening | Closed | Failed | Beat | Leave | Drain | Debug | Debugged
    | ShowStacks | Stacks | Stopping | Renew | Prepare | Prepared | Fork | Born | Unborn | Reopen | Reopened
)  # fmt: skip

_KINDS: Final = MappingProxyType({kind.__name__: kind for kind in get_args(Message)})
_JSON_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = MappingProxyType(
    {"int": int, "float": (int, float), "str": str, "bool": bool, "dict[str, Any]": dict,
     "list[Any] | str": (list, str), "str | int": (str, int)}
)  # fmt: skip


def encode(message: Message, descriptors: int = 0) -> bytes:
    """The frame of `message`; `descriptors` of them ride with its first byte."""
    # Not `astuple`: it copies whatever the fields hold, of which a Boot's are many.
    values = [getattr(message, field.name) for field in dataclasses.fields(message)]
    body = json.dumps([type(message).__name__, *values], separators=(",", ":")).encode()
    if len(body) > MAX_BODY:
        raise ProtocolError(f"a {type(message).__name__} message of {len(body)} bytes is over the limit of {MAX_BODY}")
    return frame(body, 0, descriptors)


def frame(body: bytes | memoryview, kind: int, descriptors: int = 0) -> bytes:
    """A header and its body."""
    return b"".join((_HEADER.pack(len(body), kind, descriptors), body))


def decode(body: bytes) -> Message:
    """The message in a frame's body; raises `ProtocolError` if there is none."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ProtocolError(f"a frame of {len(body)} bytes is not JSON") from None
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ProtocolError("a frame is not a message")
    kind = _KINDS.get(values[0])
    if kind is None:
        raise ProtocolError(f"unknown message {values[0]!r:.60}")
    fields = dataclasses.fields(kind)
    if len(values) != len(fields) + 1:
        raise ProtocolError(f"a {values[0]} message with {len(values) - 1} fields instead of {len(fields)}")
    for field, value in zip(fields, values[1:], strict=True):
        if not _is_of_type(value, str(field.type)):
            raise ProtocolError(f"a {values[0]} message with {value!r:.60} for its {field.name}")
    message: Message = kind(*values[1:])
    return message


def _is_of_type(value: object, annotation: str) -> bool:
    if annotation in ("list[str]", "list[int]"):
        kind = str if annotation == "list[str]" else int
        return isinstance(value, list) and all(type(each) is kind for each in value)
    # bool is an int to isinstance, and must not pass for one.
    return isinstance(value, _JSON_TYPES[annotation]) and (not isinstance(value, bool) or annotation == "bool")


class Decoder:
    """Cuts a byte stream into frames: `feed` what arrived, iterate over (body, descriptors)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """The frames completed by `data`, where none but ours can be."""
        return ((body, descriptors) for _, body, descriptors in self.frames(data, users=False))

    def frames(self, data: bytes, *, users: bool = True) -> Iterator[tuple[int, bytes, int]]:
        """The frames completed by `data`: (kind, body, descriptors); the program's own only if there may be `users`.

        Raises `ProtocolError` on a header that cannot be: the stream is lost.
        """
        buffer = self._buffer
        buffer += data
        while len(buffer) >= HEADER_SIZE:
            length, kind, descriptors = _HEADER.unpack_from(buffer)
            if length > (MAX_USER_FRAME if kind else MAX_BODY) or (kind and not users):
                raise ProtocolError(f"a frame of kind {kind} and {length} bytes cannot be")
            end = HEADER_SIZE + length
            if len(buffer) < end:
                return
            body = bytes(memoryview(buffer)[HEADER_SIZE:end])
            del buffer[:end]
            yield kind, body, descriptors
