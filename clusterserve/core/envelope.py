"""The program's own messages: what is written on them, how they are cut into frames, which reply belongs to what.

A message travels as frames of at most `CHUNK` bytes, so that whatever master and worker have to tell each other fits
between them.  The frames' kind says what it is; the first one's body begins with the number of its request.
"""

from __future__ import annotations

import enum
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, Generic, Protocol, TypeVar

from ..errors import ProtocolError
from .messages import frame

#: The longest message, in bytes as they travel.
MAX_USER_BODY: Final = 64 << 20

#: The longest piece of a message in one frame: an urgent frame waits for no more than one.
CHUNK: Final = 1 << 16

T = TypeVar("T")


class Kind(enum.IntEnum):
    """What a message is to its receiver."""

    SEND = 1
    REQUEST = 2
    REPLY = 3
    #: The request failed; the body is the text of why.
    FAILURE = 4


# In a frame's kind, beside one of the above.
_KIND: Final = 0x0F
_PICKLED: Final = 0x10
#: Not the first frame of its message; not the last one.
_CONTINUES: Final = 0x40
_MORE: Final = 0x80

_KINDS: Final = {kind.value: kind for kind in Kind}
_NUMBER: Final = Struct("<Q")


@dataclass(frozen=True)
class Envelope:
    """A message of the program's, still closed.  `number` tells requests apart; 0 where nobody waits."""

    kind: Kind
    number: int
    pickled: bool
    body: bytes

    @property
    def size(self) -> int:
        """Bytes on the way, near enough."""
        return len(self.body)


class Riders(Protocol):
    """The descriptors that came with a message: closed with it, unless somebody takes them."""

    #: So many more were sent and did not arrive: the receiver was at its descriptor limit.
    lost: int

    def take(self) -> list[int]:
        """They are the caller's from now on."""
        ...

    def close(self) -> None:
        """Close those that nobody has taken."""
        ...


def seal(kind: Kind, number: int, content: Any, pickled: bool) -> Envelope:
    """Encode `content`.  Raises TypeError or ValueError (pickle: whatever it likes) for what cannot be sent."""
    if pickled:
        body = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    else:
        body = json.dumps(content, separators=(",", ":")).encode()
    if len(body) > MAX_USER_BODY:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_USER_BODY}")
    return Envelope(kind, number, pickled, body)


def declined(request: Envelope) -> Envelope:
    """The answer to a request where no program is that could answer."""
    why = "nobody answers requests there: it is the command line's master, and not a program's Cluster"
    return seal(Kind.FAILURE, request.number, why, request.pickled)


def unseal(envelope: Envelope, pickled: bool) -> Any:
    """What is in it.  Raises `ProtocolError` for what no honest sender sends to who expects JSON, or `pickled`.

    Unpickling runs code of the sender's choice, and may raise anything: never done unless chosen.
    """
    if envelope.pickled != pickled:
        raise ProtocolError(f"a message in {_name(envelope.pickled)}, where {_name(pickled)} was agreed upon")
    if pickled:
        return pickle.loads(envelope.body)
    try:
        return json.loads(envelope.body)
    except ValueError:
        raise ProtocolError(f"a message of {len(envelope.body)} bytes is not JSON") from None


def _name(pickled: bool) -> str:
    return "pickle" if pickled else "JSON"


def cut(envelope: Envelope, descriptors: int = 0) -> Iterator[bytes]:
    """Its frames, one after the other as they are needed; the descriptors ride with the first."""
    kind = envelope.kind | (_PICKLED if envelope.pickled else 0)
    body = memoryview(envelope.body)
    left = len(body) - CHUNK
    yield frame(b"".join((_NUMBER.pack(envelope.number), body[:CHUNK])), kind | (_MORE if left > 0 else 0), descriptors)
    for start in range(CHUNK, len(body), CHUNK):
        more = _MORE if start + CHUNK < len(body) else 0
        yield frame(body[start : start + CHUNK], kind | _CONTINUES | more)


class Assembler:
    """Makes messages of their frames again.  One stream: messages come one after the other, never mixed."""

    def __init__(self) -> None:
        self._kind = 0
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def between(self) -> bool:
        """Whether the next frame is the first of a message."""
        return not self._parts

    def add(self, kind: int, body: bytes) -> Envelope | None:
        """The message that is complete with this frame.  Raises `ProtocolError` for one that cannot be."""
        plain = kind & ~_MORE & ~_CONTINUES
        if self._parts:
            if plain != self._kind or not kind & _CONTINUES:
                raise ProtocolError(f"a frame of kind {kind} in the midst of a message")
            self._parts.append(body)
        else:
            if plain & ~_PICKLED not in _KINDS or kind & _CONTINUES or len(body) < _NUMBER.size:
                raise ProtocolError(f"a frame of kind {kind} and {len(body)} bytes cannot be")
            self._kind = plain
            (self._number,) = _NUMBER.unpack_from(body)
            self._parts.append(body[_NUMBER.size :])
        self._size += len(self._parts[-1])
        if self._size > MAX_USER_BODY:
            raise ProtocolError(f"a message of more than {MAX_USER_BODY} bytes")
        if kind & _MORE:
            return None
        envelope = Envelope(_KINDS[plain & _KIND], self._number, bool(plain & _PICKLED), b"".join(self._parts))
        self._parts, self._size = [], 0
        return envelope


class Requests(Generic[T]):
    """The requests of one side of a channel that are not answered, by number.  Numbers are never used twice."""

    def __init__(self) -> None:
        self._last = 0
        self._open: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, asker: T) -> int:
        """A number for a new request of `asker`'s."""
        self._last += 1
        self._open[self._last] = asker
        return self._last

    def answered(self, number: int) -> T | None:
        """Who asked; None if they have given up.  Raises `ProtocolError` if nobody ever asked that."""
        if not 0 < number <= self._last:
            raise ProtocolError(f"an answer to request {number}, which was never sent")
        return self._open.pop(number, None)

    def give_up(self, number: int) -> T | None:
        """Wait no more; None if it is answered already."""
        return self._open.pop(number, None)

    def give_up_all(self) -> list[T]:
        """Nobody will answer: who waits."""
        waiting = list(self._open.values())
        self._open.clear()
        return waiting
