"""What a worker tells the master of the connections that it was handed.

Within a turn everything waits for its end, and is one message.  Outside of one it is said soon, behind what the loop
has to run now or with the end of a turn, so that what happens together is one message too.  A master that does not read
holds up nothing but the answers: they wait, in their order.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from ..channel.connection import MAX_ANSWERS, WorkerEnd
from ..core.records import ACK, CLOSED, DROPPED, KEPT, TAKEN, pack_answer

if TYPE_CHECKING:
    from .lazy import LazyTransport


#: What waits for its own turn: that a connection without a first word was begun with.
_BEGUN: Final = frozenset({ACK, ACK | TAKEN})


class Answers:
    """Written to `end`, which is the receiver's to close."""

    def __init__(self, loop: asyncio.AbstractEventLoop, end: WorkerEnd) -> None:
        self._loop = loop
        self._end = end
        #: Of this turn, by connection: whoever is in it is answered at its end.
        self.fresh: dict[int, int] = {}
        #: Outside of a turn, and whether their sending is scheduled.
        self.soon: dict[int, int] = {}
        self._scheduled = False
        #: Records that the channel had no room for.
        self.blocked: list[bytes] = []
        # Under which number those are kept of which the master is about to hear, who is armed when it was told, and who
        # is when there was room for that in the channel.
        self._handles: dict[int, int] = {}
        self._untold: list[LazyTransport] = []
        self._unarmed: list[LazyTransport] = []
        #: Connections that are acknowledged when their protocol has them.
        self.making: set[int] = set()

    def made(self, id: int) -> None:
        """A connection has its protocol: if its client need not speak first, acknowledged one turn later.

        Nothing can be done for it but by its protocol, so it is taken as well.
        """
        if id in self.making:
            self.making.remove(id)
            # Not at once: `flush` may be scheduled already, in front of the tasks that this protocol will create.
            self._loop.call_soon(self._made, id)

    def _made(self, id: int) -> None:
        self.say(id, ACK if self.soon.get(id, 0) & CLOSED else ACK | TAKEN)

    def ended(self, id: int, kind: int) -> None:
        """Our descriptor of a connection is closed: it is over (CLOSED), or the master's again (RETURNED)."""
        if id in self.fresh:
            self.fresh[id] = self.fresh[id] & ~TAKEN | kind
        else:
            self.making.discard(id)
            if self.soon.get(id, 0) & TAKEN:
                # Taken for a moment, of which the master has not heard.
                self.soon[id] &= ~TAKEN
            self.say(id, kind)

    def dropped(self, id: int) -> None:
        """Our copy of a connection that the master has taken back is closed."""
        self._send([pack_answer(DROPPED, id)])

    def kept(self, id: int, fd: int, transport: LazyTransport) -> None:
        """A connection is kept for its next request; it is armed when that is said."""
        self._handles[id] = fd
        self._untold.append(transport)
        self.add(id, KEPT)

    def add(self, id: int, kind: int) -> None:
        """At the end of the turn if the connection came in it, else soon."""
        if id in self.fresh:
            self.fresh[id] |= kind
        else:
            self.say(id, kind)

    def say(self, id: int, kind: int) -> None:
        """Soon."""
        self.soon[id] = self.soon.get(id, 0) | kind
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def turned(self, held: int) -> None:
        """The turn is over; each of its requests has held the loop for so long (microseconds).

        What was to be said soon is said too: what the loop runs before `flush` may hold it for long, and the next
        request of a connection that is given back by then.  But for acknowledgements: they wait for their own turn.
        """
        fresh, self.fresh = self.fresh, {}
        records = [self._pack(kind, id, held) for id, kind in fresh.items()]
        if self.soon:
            records += [self._pack(kind, id) for id, kind in self.soon.items() if kind not in _BEGUN]
            self.soon = {id: kind for id, kind in self.soon.items() if kind in _BEGUN}
        self._tell(records)

    def flush(self) -> None:
        """Now."""
        self._scheduled = False
        answers, self.soon = self.soon, {}
        self._tell([self._pack(kind, id) for id, kind in answers.items()])

    def _tell(self, records: list[bytes]) -> None:
        self._send(records)
        if self._untold:
            self._unarmed += self._untold
            self._untold = []
            self._arm()

    def close(self) -> None:
        """Nobody waits for room in the channel any more."""
        self._loop.remove_writer(self._end.fileno())

    def _pack(self, kind: int, id: int, held: int = 0) -> bytes:
        return pack_answer(kind, id, held, self._handles.pop(id) if kind & KEPT else 0)

    def _arm(self) -> None:
        # What the master was told of, it may claim.  Nothing else: it would claim a number that says nothing to it, and
        # nobody would arm that again.
        if not self.blocked:
            unarmed, self._unarmed = self._unarmed, []
            for transport in unarmed:
                transport.arm_kept()

    def _send(self, records: list[bytes]) -> None:
        if self.blocked:
            self.blocked += records
            return
        for start in range(0, len(records), MAX_ANSWERS):
            if not self._end.answer(b"".join(records[start : start + MAX_ANSWERS])):
                # The master does not read: it is stopped, or dead.  Answers wait, nothing else does.
                self.blocked = records[start:]
                self._loop.add_writer(self._end.fileno(), self._unblock)
                return

    def _unblock(self) -> None:
        while self.blocked and self._end.answer(b"".join(self.blocked[:MAX_ANSWERS])):
            del self.blocked[:MAX_ANSWERS]
        if not self.blocked:
            self._loop.remove_writer(self._end.fileno())
            self._arm()
