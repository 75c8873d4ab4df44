"""Which workers should exist: compare what is wanted with what is there, never patch by event.

`plan(target, roster, now)` changes nothing and returns what to do now and when to ask again.  Start, respawn
with back-off, scale, reload and stop are one reconciliation with different targets.  Facts enter through the `Roster`;
executing an action is a fact too (`spawned`, `drained`, `killed`), so asking twice never orders twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .lifecycle import WorkerEvent, WorkerState, step


class Stop(Enum):
    """How a cluster ends: NO (it does not), GRACEFUL (requests in flight finish), QUICK (they are cut)."""

    NO = 0
    GRACEFUL = 1
    QUICK = 2


class Verdict(Enum):
    """What has become of the whole cluster."""

    RUNNING = "running"
    #: As many workers listen as are wanted, of the wanted generation, and no other lives.
    SETTLED = "settled"
    #: No worker of the first generation ever listened, and none is left to do so.
    FAILED = "failed"
    #: A worker of a newer generation is dead before any of that generation listened: stay with the one that serves.
    REJECTED = "rejected"
    #: Told to stop, and every worker is dead.
    STOPPED = "stopped"


@dataclass(frozen=True)
class Target:
    """What is wanted: `count` workers of `generation`, or none and how fast."""

    count: int
    generation: int = 1
    stop: Stop = Stop.NO


@dataclass(frozen=True)
class Limits:
    """Times in seconds; 0 switches `boot` off."""

    boot: float = 60.0
    graceful: float = 30.0
    quick: float = 2.0
    #: A worker whose channel is closed should be dead by then.
    disconnected: float = 5.0
    backoff: float = 0.1
    backoff_max: float = 15.0
    #: A worker that listened this long was healthy: its slot's failures are forgotten.
    min_uptime: float = 1.0
    #: Workers of a new generation that may boot while the old one still serves.
    surge: int = 1


@dataclass(frozen=True)
class Spawn:
    """Start a worker process in `slot`."""

    slot: int
    generation: int


@dataclass(frozen=True)
class Drain:
    """Tell a worker to finish.  `interrupt`: it boots and does not read messages yet, so signal it as well."""

    worker: int
    quick: bool
    interrupt: bool
    #: Others go on serving: what is idle is not closed but given back.
    keep: bool


@dataclass(frozen=True)
class Kill:
    """SIGKILL a worker; `why` completes the log line "worker N was killed: …"."""

    worker: int
    why: str


Action = Spawn | Drain | Kill


@dataclass
class Member:
    """One worker process, from spawn to exit."""

    id: int
    slot: int
    generation: int
    spawned: float
    state: WorkerState = WorkerState.NONE
    listening: float | None = None
    #: When it was told to drain (again), and whether quickly.
    drained: float | None = None
    quick: bool = False
    disconnected: float | None = None
    killed: bool = False

    @property
    def current(self) -> bool:
        """Neither leaving nor gone."""
        return self.state in (WorkerState.NONE, WorkerState.ONLINE, WorkerState.LISTENING)


@dataclass
class Slot:
    """What is remembered of a place after its worker died."""

    failures: int = 0
    not_before: float = 0.0


@dataclass
class Roster:
    """Every worker that is not dead, and the slots.  Changed only by facts."""

    limits: Limits
    members: dict[int, Member] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    #: Whether any worker ever listened, and the newest generation of which one did.
    proven: int = 0
    #: The newest generation of which one left before any of it had listened, while an older one serves.
    rejected: int = 0
    _ids: int = 0

    def spawned(self, slot: int, generation: int, now: float) -> Member:
        """A process was started in `slot`; gives it its id (1, 2, 3 …, never reused)."""
        self._ids += 1
        member = self.members[self._ids] = Member(self._ids, slot, generation, now)
        self.slots.setdefault(slot, Slot())
        return member

    def happened(self, id: int, event: WorkerEvent, now: float) -> Member:
        """A fact about worker `id`; raises `IllegalStep` for one that cannot be."""
        member = self.members[id]
        current = member.current
        member.state = step(member.state, event)
        if current and event in (WorkerEvent.DISCONNECTED, WorkerEvent.EXITED):
            # Unasked, and counted when it stops serving: the channel's end and the exit are one failure.
            self._failed(member, now)
        if event is WorkerEvent.LISTENING and member.state is WorkerState.LISTENING and member.listening is None:
            member.listening = now
            self.proven = max(self.proven, member.generation)
        elif event is WorkerEvent.DISCONNECTED:
            member.disconnected = now
        elif event is WorkerEvent.EXITED:
            del self.members[id]
        return member

    def drained(self, id: int, quick: bool, now: float) -> None:
        """Worker `id` was told to drain."""
        member = self.happened(id, WorkerEvent.DRAIN, now)
        member.drained, member.quick = now, quick

    def killed(self, id: int) -> None:
        """Worker `id` was sent SIGKILL."""
        self.members[id].killed = True

    def count(self, state: WorkerState) -> int:
        """How many workers are in `state`."""
        return sum(member.state is state for member in self.members.values())

    def _failed(self, member: Member, now: float) -> None:
        """It left unasked: the next one in its slot waits, longer each time, unless it had been healthy."""
        slot = self.slots[member.slot]
        if self.proven and member.generation > self.proven:
            self.rejected = member.generation
        if member.listening is not None and now - member.listening >= self.limits.min_uptime:
            slot.failures = 0
            slot.not_before = now
            return
        # The exponent is capped: the delay has long reached its maximum, and floats end at 2**1024.
        delay = self.limits.backoff * 2.0 ** min(slot.failures, 60)
        slot.failures += 1
        slot.not_before = now + min(delay, self.limits.backoff_max)


@dataclass(frozen=True)
class Plan:
    """What to do now, when to ask again (None: only when something happens), and how the cluster stands."""

    actions: tuple[Action, ...]
    deadline: float | None
    verdict: Verdict


def plan(target: Target, roster: Roster, now: float) -> Plan:
    """The steps from what is there to what is wanted."""
    if target.stop is not Stop.NO:
        wanted = list(_stop(target, roster))
    else:
        wanted = [*_start(target, roster), *_retire(target, roster)]
    wanted += _kill(roster)
    # An entry is (when, what); what lies ahead only sets the deadline.
    actions = tuple(action for due, action in wanted if due <= now)
    deadline = min((due for due, _ in wanted if due > now), default=None)
    return Plan(actions, deadline, _verdict(target, roster, actions))


_Due = Iterator[tuple[float, Action]]


def _stop(target: Target, roster: Roster) -> _Due:
    quick = target.stop is Stop.QUICK
    for member in roster.members.values():
        if member.state is WorkerState.DISCONNECTED:
            continue
        if member.drained is None or (quick and not member.quick):
            yield 0.0, Drain(member.id, quick, interrupt=member.listening is None, keep=False)


def _start(target: Target, roster: Roster) -> _Due:
    """Fill empty slots; in a reload, also start replacements, `surge` at a time."""
    if _rejected(target, roster):
        return
    here = [member for member in roster.members.values() if member.current and not _abandoned(member, target)]
    taken = {member.slot for member in here}
    fresh = {member.slot for member in here if member.generation == target.generation}
    booting = sum(member.listening is None for member in here)
    for number in range(target.count):
        if number in fresh:
            continue
        slot = roster.slots.get(number, Slot())
        if number not in taken:
            # Before anyone ever listened, a slot whose first worker died stays empty: no respawn loop of a broken app.
            if roster.proven or not slot.failures:
                yield slot.not_before, Spawn(number, target.generation)
        elif booting < roster.limits.surge:
            booting += 1
            yield slot.not_before, Spawn(number, target.generation)


def _retire(target: Target, roster: Roster) -> _Due:
    """Workers of slots no longer wanted, and those of other generations that are replaced or not needed any more."""
    # The best of each slot: one of the wanted generation, else the newest.
    best: dict[int, Member] = {}
    for member in roster.members.values():
        if member.state is WorkerState.LISTENING:
            known = best.get(member.slot)
            if known is None or known.generation != target.generation:
                best[member.slot] = member
    for member in roster.members.values():
        replaced = member.generation != target.generation and best.get(member.slot, member) is not member
        if member.current and (member.slot >= target.count or replaced or _abandoned(member, target)):
            yield 0.0, Drain(member.id, quick=False, interrupt=member.listening is None, keep=True)


def _abandoned(member: Member, target: Target) -> bool:
    """Whether it boots for a generation that is not wanted any more."""
    return member.generation != target.generation and member.listening is None


def _rejected(target: Target, roster: Roster) -> bool:
    """Whether what is wanted cannot be had: nobody starts any more until the target is another."""
    return roster.proven < target.generation == roster.rejected


def _kill(roster: Roster) -> _Due:
    """Who did not come up, or did not go, in time."""
    limits = roster.limits
    for member in roster.members.values():
        if member.killed:
            continue
        if member.state is WorkerState.DISCONNECTED and member.disconnected is not None:
            yield member.disconnected + limits.disconnected, Kill(member.id, "it closed its channel but did not exit")
        elif member.drained is not None:
            grace = limits.quick if member.quick else limits.graceful
            yield member.drained + grace, Kill(member.id, f"it did not finish within {grace:g} s")
        elif member.listening is None and limits.boot:
            yield member.spawned + limits.boot, Kill(member.id, f"it did not listen within {limits.boot:g} s")


def _verdict(target: Target, roster: Roster, actions: tuple[Action, ...]) -> Verdict:
    members = roster.members.values()
    if target.stop is not Stop.NO:
        return Verdict.RUNNING if members else Verdict.STOPPED
    if not members and not roster.proven and target.count and not any(isinstance(action, Spawn) for action in actions):
        return Verdict.FAILED
    if _rejected(target, roster):
        # Why it failed is known for certain when it is dead.
        dying = any(member.generation == target.generation and member.disconnected is not None for member in members)
        return Verdict.RUNNING if dying else Verdict.REJECTED
    listening = [member for member in members if member.state is WorkerState.LISTENING]
    settled = (
        len(listening) == len(members) == target.count
        and all(member.generation == target.generation for member in members)
        and not actions
    )
    return Verdict.SETTLED if settled else Verdict.RUNNING
