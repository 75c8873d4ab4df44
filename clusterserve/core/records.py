"""The connection channel's binary records: fixed size, one or more to a message.

Master to worker: an `OFFER` per descriptor, in the order of the descriptors.  Worker to master: an answer per
connection, whose kinds may be combined (`ACK | CLOSED` is the whole life of a short request).  Both carry a version, so
that a worker of another release is refused instead of misread; the channel carries nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag
from struct import Struct
from typing import Final

from ..errors import ProtocolError

VERSION: Final = 3

#: Address families of an offer, as bytes on the wire: none (unix sockets), IPv4, IPv6.
NO_ADDRESS: Final = 0
IPV4: Final = 4
IPV6: Final = 6

#: With one of these: it is what a PROXY header said, and not what the kernel would say of the socket.
PROXIED: Final = 16


class Kind(IntFlag):
    """What a worker says about a connection it was offered."""

    #: Processed, and the loop has turned once since.
    ACK = 1
    #: Over: the worker has closed its copy, the master's last close ends the connection.
    CLOSED = 2
    #: Idle again and given back: nothing read beyond the last response, nothing left to flush.
    RETURNED = 4
    #: The worker keeps it for good (TLS, WebSocket, a protocol that is not ours).
    TAKEN = 8
    #: Not wanted here: no such listener, or the descriptor got lost at the descriptor limit.
    REFUSED = 16
    #: Idle, and kept for its next request: it lies in the kept epoll, where the master can take it back.
    KEPT = 32
    #: The worker has heard that it was taken back, and has closed its copy.
    DROPPED = 64
    #: Given back to be watched: its client has not said a word yet.
    SILENT = 128


# The same as plain numbers: until Python 3.12, reading a member from its class costs ten times as much as a global.
ACK: Final = int(Kind.ACK)
CLOSED: Final = int(Kind.CLOSED)
RETURNED: Final = int(Kind.RETURNED)
TAKEN: Final = int(Kind.TAKEN)
REFUSED: Final = int(Kind.REFUSED)
KEPT: Final = int(Kind.KEPT)
DROPPED: Final = int(Kind.DROPPED)
SILENT: Final = int(Kind.SILENT)

#: Not now: by the time the offer was read, no thread was free for its request, of which nothing was read.
FULL: Final = REFUSED | RETURNED

#: News of no connection (its id is 0): a worker whose threads were all occupied has one that is free.
FREE: Final = 0


class Flag(IntFlag):
    """What an offer is that is none: news of a connection the worker keeps.  No descriptor rides with it."""

    #: The master has taken it back.
    LOST = 1
    #: The master may have disarmed it by mistake: arm it again.
    REARM = 2


# version, family, flags, listener, id, queued since (µs), client port, local port, client, local, place on the board
_OFFER: Final = Struct("<BBHIQIHH16s16sI")
OFFER_SIZE: Final = _OFFER.size
_pack_offer = _OFFER.pack
_iter_offers = _OFFER.iter_unpack

# version, kind, flags, time the batch held the loop (µs), the worker's descriptor (KEPT only), id
_ANSWER: Final = Struct("<BBHIIQ")
ANSWER_SIZE: Final = _ANSWER.size
_pack_answer = _ANSWER.pack
_iter_answers = _ANSWER.iter_unpack

#: The longest times the records can carry, in microseconds.
MAX_MICROSECONDS: Final = 2**32 - 1


def pack_offer(
    id: int,
    listener: int,
    queued: int,
    family: int,
    client: bytes,
    port: int,
    place: int = 0,
    server: bytes = b"",
    server_port: int = 0,
) -> bytes:
    """One offer; `server` is what a PROXY header has told of the local address (empty: ask the kernel).

    `queued` is since when, in microseconds on the clock that all processes share (CLOCK_MONOTONIC), of which the last
    32 bits travel: see `waited`.  `place` is where on the board the worker says how far it is with it.
    """
    queued &= MAX_MICROSECONDS
    return _pack_offer(VERSION, family, 0, listener, id, queued, port, server_port, client, server, place)


def waited(queued: int, now: float) -> float:
    """How long an offer has waited, `queued` being as it has travelled, and `now` in seconds on the same clock.

    In seconds, and right up to 71 minutes.
    """
    return ((int(now * 1e6) - queued) & MAX_MICROSECONDS) / 1e6


def pack_note(flag: Flag, id: int) -> bytes:
    """News of a connection that the worker keeps, in the shape of an offer."""
    return _pack_offer(VERSION, 0, flag, 0, id, 0, 0, 0, b"", b"", 0)


def unpack_offers(data: bytes) -> Iterator[tuple[int, int, int, int, int, int, int, int, bytes, bytes, int]]:
    """(version, family, flags, listener, id, queued, client port, local port, client, local, place) of each offer.

    Raises `ProtocolError` on a message that is not a whole number of offers of this version.
    """
    if not data or len(data) % OFFER_SIZE or data[0] != VERSION:
        raise ProtocolError(f"a message of {len(data)} bytes on the connection channel is no list of offers")
    return _iter_offers(data)


def pack_answer(kind: int, id: int, held: int = 0, handle: int = 0) -> bytes:
    """One answer.  `held`: how long the batch it came in held the worker's event loop, in microseconds.

    `handle`: the worker's descriptor, under which a KEPT connection shows in the kept epoll.
    """
    return _pack_answer(VERSION, kind, 0, min(held, MAX_MICROSECONDS), handle, id)


def unpack_answers(data: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(version, kind, flags, held, handle, id) of each answer; raises `ProtocolError` as `unpack_offers` does."""
    if not data or len(data) % ANSWER_SIZE or data[0] != VERSION:
        raise ProtocolError(f"a message of {len(data)} bytes on the connection channel is no list of answers")
    return _iter_answers(data)
