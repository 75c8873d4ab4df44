"""What the distributor knows of a worker; policies see it as their `Candidate`.  Changed by the distributor only."""

from __future__ import annotations

from typing import Final

from .connection import Connection

#: Un-acked offers a worker may have.  Recall makes a wide window harmless: what a stalled worker has not read comes
#: back.
WINDOW: Final = 64


#: A connection that holds its worker's loop for longer (µs) is expensive.
EXPENSIVE: Final = 500


class Worker:
    """One worker: what it was offered, what it is serving, whether it may get more."""

    __slots__ = (
        "ahead", "borrowed", "busy", "capacity", "excuses", "held", "id", "kept", "listeners", "lost", "narrow", "open",
        "progress", "resting", "retry", "running", "slot", "stalled", "stuck", "suspect", "taken", "threads", "turns",
        "unacked", "unclaimed", "unread",
    )  # fmt: skip

    def __init__(self, id: int, slot: int, capacity: int | None = None) -> None:
        self.id = id
        self.slot = slot
        #: The most connections it may hold; None for no limit, 0 takes none.
        self.capacity = capacity
        self.listeners: set[int] = set()
        #: Offered and not acknowledged, oldest first; then the ones it is serving.
        self.unacked: dict[int, Connection] = {}
        self.borrowed: dict[int, Connection] = {}
        #: Of the borrowed ones those it keeps between requests, by its own descriptors; and how many of them have a
        #: request in progress, as it says.
        self.kept: dict[int, Connection] = {}
        self.running = 0
        #: What was taken back from it and it has not confirmed: nothing it says of these counts.
        self.lost: dict[int, Connection] = {}
        #: What it has for good (WebSockets): counted, and no concern of ours otherwise.
        self.taken: set[int] = set()
        #: At the last look: how often its loop had turned, and whether requests lay unclaimed.
        self.turns = 0
        self.unclaimed = False
        #: Two looks apart its loop had not turned, though something was waiting or it was in the midst of a turn.
        self.stuck = False
        #: False once it drains: nothing more is offered, what it holds it may finish.
        self.open = True
        #: When it last acknowledged something, or was first offered something after being idle.
        self.progress = 0.0
        #: It made no progress for `PATIENCE`: nothing more for it until it does (or `RETRY`).
        self.stalled = False
        #: How often in a row it was late because the machine was busy with others.
        self.excuses = 0
        #: Some of what it was offered may still lie unread in its channel; False once that was recalled.
        self.unread = False
        #: All it was offered was recalled: nothing is left whose acknowledgement would clear it, so after a rest it
        #: gets a single offer as a probe, and is trusted again when it answers.
        self.suspect = False
        #: When that rest ends.
        self.retry = 0.0
        #: Not before this time, after a refusal.
        self.resting = 0.0
        #: How long a connection of its holds its loop (µs), as its answers say, at its recent worst.
        self.held = 0
        #: One offer at a time: its requests are expensive, and what waits is better off in the queue.
        self.narrow = False
        #: Nobody is free: it may have one more, to begin with as soon as it has done.
        self.ahead = False
        #: In how many threads it serves requests, 0: on its loop; and how many of them are occupied, as its board says.
        self.threads = 0
        self.busy = 0

    @property
    def load(self) -> int:
        """Connections with a request in progress, or on their way to it."""
        # What its board said may be older than what it has said of its connections.
        kept = len(self.kept)
        return len(self.unacked) + len(self.borrowed) + len(self.taken) - kept + min(kept, self.running)

    @property
    def window(self) -> int:
        """How many un-acked offers it may have."""
        if self.suspect:
            return 1
        return 1 + self.ahead if self.narrow else WINDOW

    @property
    def full(self) -> bool:
        """Whether no thread is free for one more request.  What is acknowledged has its thread, so each counts once."""
        return self.threads > 0 and len(self.unacked) + self.busy >= self.threads

    @property
    def ready(self) -> bool:
        return (
            self.open
            and not self.stalled
            and not self.stuck
            and not self.resting
            and len(self.unacked) < self.window
            and not self.full
            and (self.capacity is None or len(self.unacked) + len(self.borrowed) + len(self.taken) < self.capacity)
        )

    def __repr__(self) -> str:
        word = "ready" if self.ready else "stalled" if self.stalled else "busy" if self.open else "draining"
        holds = f"{len(self.unacked)} offered, {len(self.borrowed)} borrowed, {len(self.kept)} of them kept"
        return f"<Worker {self.id} slot {self.slot} {word}: {holds}>"
