"""Which ready worker gets a connection.

A policy is any class with the three methods of `Policy`; `--policy package.module:Class` uses one of yours.  It is
called for one connection at a time, at the head of its queue, and answers with a ready worker or with None, "let it
wait".  It never does I/O and never blocks: it runs in the master's accept path.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final, Protocol, runtime_checkable

#: How long round robin waits for the worker whose turn it is, in `--dispatch connection` (seconds).
TURN: Final = 0.010


class Candidate(Protocol):
    """A worker as a policy sees it."""

    @property
    def id(self) -> int:
        """1, 2, 3 …; never reused."""

    @property
    def slot(self) -> int:
        """0 … N-1; a replacement takes over its predecessor's."""

    @property
    def ready(self) -> bool:
        """Whether it may be chosen now."""

    @property
    def full(self) -> bool:
        """Whether all threads in which it serves requests are occupied, so that it is not ready."""

    @property
    def load(self) -> int:
        """Connections with a request in progress, or offered for one; in `--dispatch connection` all that it holds."""


class Waiting(Protocol):
    """A connection as a policy sees it."""

    @property
    def id(self) -> int:
        """1, 2, 3 … in the order of acceptance."""

    @property
    def client(self) -> bytes:
        """The client's address, 16 bytes (IPv4 mapped into IPv6), or empty if it has none (unix sockets)."""


@runtime_checkable
class Policy(Protocol):
    """What `--policy package.module:Class` must provide; the class is called without arguments, once per listener.

    Four attributes are optional.  `sticky` (bool): a connection waits for one worker and no other, so what that worker
    has not read is left with it.  `wake_at` (float or None): ask again at this time, on the clock of `pick`'s `now`,
    even if nothing changed.  `lane(connection)`: connections with the same lane wait in one queue; without it all of
    a listener do, and a connection that must wait holds up those behind it.  `resize(slots)`: the cluster has that many
    slots from now on; called at the start as well, and every connection that waits is asked for its lane anew.
    """

    def add(self, worker: Candidate) -> None:
        """A worker has begun to listen."""

    def remove(self, worker: Candidate) -> None:
        """A worker is gone, or draining: never choose it again."""

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        """The ready worker that gets `connection`, or None to let it wait for the next change.  `now` in seconds."""


class RoundRobin:
    """`rr`: the ready worker that was offered a connection longest ago.

    With `patience` it first waits that long for the very worker whose turn it is, so that a burst of long-lived
    connections is spread evenly.  A worker it waited for in vain is `late` and passed over without delay until it is
    ready again: otherwise every round would pay the wait once more.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience
        self.wake_at: float | None = None
        self._ring: dict[int, Candidate] = {}
        self._late: set[int] = set()

    def add(self, worker: Candidate) -> None:
        self._ring[worker.id] = worker

    def remove(self, worker: Candidate) -> None:
        self._ring.pop(worker.id, None)
        self._late.discard(worker.id)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        ring = self._ring
        passed: list[int] = []
        for worker in ring.values():
            if worker.ready:
                break
            # Who has no thread free is not merely slow: waiting for it would be in vain.
            if worker.id not in self._late and not worker.full:
                passed.append(worker.id)
        else:
            self.wake_at = None
            return None
        if passed and self.patience and not self._turn_is_over(now):
            return None
        self._late.update(passed)
        self._late.discard(worker.id)
        self.wake_at = None
        del ring[worker.id]
        ring[worker.id] = worker
        return worker

    def _turn_is_over(self, now: float) -> bool:
        if self.wake_at is None:
            self.wake_at = now + self.patience
        return now >= self.wake_at


class Least:
    """`least`: the ready worker with the smallest load, ties in rotation."""

    def __init__(self) -> None:
        self._ring: dict[int, Candidate] = {}

    def add(self, worker: Candidate) -> None:
        self._ring[worker.id] = worker

    def remove(self, worker: Candidate) -> None:
        self._ring.pop(worker.id, None)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        best: Candidate | None = None
        for worker in self._ring.values():
            if worker.ready and (best is None or worker.load < best.load):
                best = worker
        if best is not None:
            del self._ring[best.id]
            self._ring[best.id] = best
        return best


class Hash:
    """`hash`: a client address always meets the same slot (rendezvous hashing), and waits for that slot's worker.

    Rendezvous over slots, not workers: a respawn or a reload moves nobody, and one slot more or less moves only 1/N of
    the clients.  Clients without an address take turns.
    """

    sticky = True

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        #: In a reload the replacement listens in the slot before its predecessor leaves it: the newest counts.
        self._by_slot: dict[int, dict[int, Candidate]] = {}
        self._turns = RoundRobin()

    def resize(self, slots: int) -> None:
        """The cluster has `slots` slots from now on."""
        self.slots = slots

    def lane(self, connection: Waiting) -> int:
        """The slot of this client; -1 for clients without an address."""
        client = connection.client
        if not client:
            return -1
        return _slot_of(client, self.slots)

    def add(self, worker: Candidate) -> None:
        self._by_slot.setdefault(worker.slot, {})[worker.id] = worker
        self._turns.add(worker)

    def remove(self, worker: Candidate) -> None:
        self._by_slot.get(worker.slot, {}).pop(worker.id, None)
        self._turns.remove(worker)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        slot = self.lane(connection)
        if slot < 0:
            return self._turns.pick(connection, now)
        workers = self._by_slot.get(slot)
        if not workers:
            return None
        worker = next(reversed(workers.values()))
        return worker if worker.ready else None


@lru_cache(maxsize=65536)
def _slot_of(client: bytes, slots: int) -> int:
    """Rendezvous: the slot whose digest with the client is the highest."""
    return max(range(slots), key=lambda slot: blake2b(client, digest_size=8, salt=b"%d" % slot).digest())


#: The names `--policy` knows.  `none` is no policy object: the workers accept for themselves (SharedHandle).
NAMES: Final = ("rr", "least", "hash", "none")


def make_policy(name: str, *, slots: int, patience: float = 0.0) -> Policy:
    """The built-in policy called `name`, fresh (each listener has its own rotation)."""
    if name == "rr":
        return RoundRobin(patience)
    if name == "least":
        return Least()
    if name == "hash":
        return Hash(slots)
    raise KeyError(name)
