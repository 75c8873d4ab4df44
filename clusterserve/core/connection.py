"""The life of one accepted connection, as a table.

    accept -> PARKED -readable-> QUEUED -offer-> OFFERED -ack-> BORROWED -+- returned -> PARKED
                                   ^                |              |      +- closed   -> GONE
                                   +-----back-------+              |keep  +- taken    -> GONE (the worker's own)
                                   ^                               v      |
                                   +-----back (taken back)------- KEPT ---+

A connection is in exactly one state and only `Connection.step` assigns it.  An illegal step raises `IllegalStep` and
changes nothing, so a worker that answers for a connection it does not hold is found out at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final


class State(IntEnum):
    #: The master holds it and waits for the client to say something.
    PARKED = 0
    #: Something can be read (or the client does not speak first): waits for a ready worker.
    QUEUED = 1
    #: Sent to a worker that has not acknowledged it yet.
    OFFERED = 2
    #: A worker is serving it.
    BORROWED = 3
    #: A worker holds it between requests and serves the next one unasked, unless the master takes it back first.
    KEPT = 4
    #: Closed, or taken for good by a worker: the master has closed its copy.
    GONE = 5


class Event(IntEnum):
    #: The client sent its first bytes, or hung up.
    READABLE = 0
    #: The distributor chose a worker.
    OFFER = 1
    #: The worker's loop has turned once after it processed the first bytes.
    ACK = 2
    #: Refused, recalled before it was read, or its worker died without touching it.
    BACK = 3
    #: The worker gave the idle connection back.
    RETURN = 4
    #: The worker or the master closed it.
    CLOSE = 5
    #: The worker keeps it for good.
    TAKE = 6
    #: The worker keeps it for the next request; the master may take it back as long as nobody has read that.
    KEEP = 7


TRANSITIONS: Final[Mapping[State, Mapping[Event, State]]] = MappingProxyType(
    {
        State.PARKED: {Event.READABLE: State.QUEUED, Event.CLOSE: State.GONE},
        State.QUEUED: {Event.OFFER: State.OFFERED, Event.CLOSE: State.GONE},
        State.OFFERED: {
            Event.ACK: State.BORROWED,
            Event.BACK: State.QUEUED,
            Event.KEEP: State.KEPT,
            # One record may say "processed, and already over": the ack and the ending arrive together.
            Event.RETURN: State.PARKED,
            Event.CLOSE: State.GONE,
            Event.TAKE: State.GONE,
        },
        State.BORROWED: {
            # Only when its worker died and had not read a byte of what waits.
            Event.BACK: State.QUEUED,
            Event.KEEP: State.KEPT,
            Event.RETURN: State.PARKED,
            Event.CLOSE: State.GONE,
            Event.TAKE: State.GONE,
        },
        State.KEPT: {
            # Taken back while its request lay unread, or its worker died.
            Event.BACK: State.QUEUED,
            Event.RETURN: State.PARKED,
            Event.CLOSE: State.GONE,
            Event.TAKE: State.GONE,
        },
        State.GONE: {},
    }
)

# The same table as nested tuples: indexing costs half of two dictionary look-ups, and this runs four times a
# connection.
_NEXT: Final = tuple(tuple(TRANSITIONS[state].get(event) for event in Event) for state in State)


# For the hot path: until Python 3.12, reading a member from its class costs ten times as much as a global.
READABLE: Final = Event.READABLE
OFFER: Final = Event.OFFER
ACK: Final = Event.ACK
BACK: Final = Event.BACK
RETURN: Final = Event.RETURN
CLOSE: Final = Event.CLOSE
TAKE: Final = Event.TAKE
KEEP: Final = Event.KEEP
_PARKED: Final = State.PARKED


class IllegalStep(ValueError):  # noqa: N818 - reads as the fact it states
    """An event that its connection's state does not allow; nothing was changed."""


class Connection:
    """One accepted connection as the master sees it.

    `fd` is the master's own copy of the descriptor (an opaque number here; the shell owns and closes it).  `id` is
    never reused, unlike `fd`.  `client` is the peer's address as 16 bytes, IPv4 in its IPv4-mapped form, so that one
    client has one spelling; empty when it has none (unix sockets).  `ticket` is its place among all that were ever
    queued.
    """

    __slots__ = (
        "client", "family", "fd", "handle", "id", "listener", "port", "relics", "server", "server_port", "since",
        "state", "ticket", "unknown", "worker",
    )  # fmt: skip

    def __init__(
        self, id: int, fd: int, listener: int, client: bytes = b"", port: int = 0, family: int = 0, since: float = 0.0
    ) -> None:
        self.id = id
        self.fd = fd
        self.listener = listener
        self.client = client
        self.port = port
        self.family = family
        #: When it was accepted or last became readable, on the master's clock (seconds).
        self.since = since
        #: What its client has connected to, as a PROXY header has told; empty: nobody has.
        self.server = b""
        self.server_port = 0
        #: Its proxy may yet say whose it is.
        self.unknown = False
        self.state = _PARKED
        self.ticket = 0
        #: Id of the worker it is offered to or borrowed by, else 0.
        self.worker = 0
        #: Under which number that worker keeps it (its own descriptor), once it has said so.
        self.handle = -1
        #: How many workers it was taken back from still have a copy of the descriptor, as they have not heard of it.
        self.relics = 0

    def step(self, event: Event) -> None:
        """Make the one transition `event` allows; raises `IllegalStep` otherwise."""
        target = _NEXT[self.state][event]
        if target is None:
            raise IllegalStep(f"connection {self.id} is {self.state.name}: it cannot {event.name}")
        self.state = target

    def __repr__(self) -> str:
        holder = f", worker {self.worker}" if self.worker else ""
        return f"<Connection {self.id} {self.state.name}{holder}>"
