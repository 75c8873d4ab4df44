"""Who is there: every worker that is not dead, and what is remembered of the slots.

The roster changes only by facts; `plan` (reconcile.py) reads it and says what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .heartbeat import pace
from .lifecycle import WorkerEvent, WorkerState, step
from .templates import Templates
from .wear import Wear


@dataclass(frozen=True)
class Limits:
    """Times in seconds; 0 switches `boot` and `timeout` off."""

    boot: float = 60.0
    graceful: float = 30.0
    quick: float = 2.0
    #: A worker whose channel is closed should be dead by then.
    disconnected: float = 5.0
    backoff: float = 0.1
    backoff_max: float = 15.0
    #: A worker that listened this long was healthy: its slot's failures are forgotten.
    min_uptime: float = 1.0
    #: Replacements that may boot while those they replace still serve.
    surge: int = 1
    #: A worker whose event loop has not turned for so long is hung.
    timeout: float = 30.0
    #: What it then has to write its stacks and die of it.
    abort: float = 1.0
    #: Failures in a row after which whoever waits for a slot is told.  The cluster goes on trying.
    tries: int = 3
    #: Restarts in a row that did not help, after which a slot is given up for `backoff_max` each time; 0: never.
    max_restarts: int = 16
    #: Exit codes with which a worker says that it is not to be restarted.
    final: frozenset[int] = frozenset()


@dataclass
class Member:
    """One worker process, from spawn to exit."""

    id: int
    slot: int
    generation: int
    spawned: float
    state: WorkerState = WorkerState.NONE
    #: When it came to be of use: it listened, or was up, if workers are programs that may never listen.
    listening: float | None = None
    #: When it was told to drain (again), and whether quickly.
    drained: float | None = None
    quick: bool = False
    disconnected: float | None = None
    #: When it was told to write its stacks, for being hung.
    aborted: float | None = None
    killed: bool = False
    #: It may stand at a breakpoint, or wait for its debugger: its silence means nothing.
    debugged: bool = False
    #: When it was sent a SIGTERM that it is to act upon.
    terminated: float | None = None
    wear: Wear = field(default_factory=Wear)
    #: When it was last heard of; when that was of use; and for how long the master has listened since, in vain.
    heard: float = 0.0
    useful: float = 0.0
    #: It has sent a heartbeat: a program does from when it listens, which it may never do.
    beats: bool = False
    silence: float = 0.0
    #: Its loop turns, but its threads do nothing for anybody: the last that was heard of it.
    stuck: bool = False

    @property
    def current(self) -> bool:
        """Neither leaving nor gone."""
        return self.state in (WorkerState.NONE, WorkerState.ONLINE, WorkerState.LISTENING)

    @property
    def serving(self) -> bool:
        """It is of use, and not leaving."""
        return self.listening is not None and self.current

    @property
    def doomed(self) -> bool:
        """It is being killed: what it is told now it does not hear."""
        return self.killed or self.aborted is not None

    def worn(self, now: float) -> str:
        """Why it needs a replacement ("has served 1000 requests"); empty if it does not."""
        return "" if self.listening is None else self.wear.reason(self.listening, now)


@dataclass
class Slot:
    """What is remembered of a place after its worker died."""

    failures: int = 0
    not_before: float = 0.0
    #: Its worker has ended for good: nobody follows it before somebody orders a change.
    closed: bool = False


@dataclass
class Roster:
    """Every worker that is not dead, and the slots.  Changed only by facts."""

    limits: Limits
    #: Workers run programs, of which nobody knows whether they will ever listen: who is up is of use.
    programs: bool = False
    #: What workers are forked from; None: each is a process of its own from the start.
    templates: Templates | None = None
    members: dict[int, Member] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    #: Whether any worker ever listened, and the newest generation of which one did.
    proven: int = 0
    #: The newest generation of which one left before any of it had listened, while an older one serves.
    rejected: int = 0
    _ids: int = 0
    _looked: float | None = None

    def spawned(self, slot: int, generation: int, now: float, wear: Wear | None = None) -> Member:
        """A process was started in `slot`; gives it its id (1, 2, 3 …, never reused)."""
        self._ids += 1
        member = self.members[self._ids] = Member(self._ids, slot, generation, now, wear=wear or Wear())
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
        useful = event is WorkerEvent.LISTENING or (self.programs and event is WorkerEvent.ONLINE)
        if useful and member.current and member.listening is None:
            member.listening = member.heard = member.useful = now
            self.proven = max(self.proven, member.generation)
        elif event is WorkerEvent.DISCONNECTED:
            member.disconnected = now
        elif event is WorkerEvent.EXITED:
            del self.members[id]
        return member

    def ended(self, id: int, code: int | None) -> bool:
        """Worker `id` is about to be dead, with this exit code; whether it is not to be restarted.

        Only what it does of its own accord says so, and only where it was of use before or others are.
        """
        member = self.members[id]
        final = code in self.limits.final and member.drained is None and not member.doomed and self.proven > 0
        # Who is to replace it is there already, or whom it was to replace still is.
        alone = not any(
            other.current and other.slot == member.slot for other in self.members.values() if other.id != id
        )
        if final and alone:
            self.slots[member.slot].closed = True
        return final and alone

    def undecided(self, slot: int) -> bool:
        """Whether a worker of this slot is about to end, and its exit code may say that nobody is to follow."""
        return bool(self.limits.final) and any(
            member.slot == slot and member.state is WorkerState.DISCONNECTED and member.drained is None
            for member in self.members.values()
        )

    def drained(self, id: int, quick: bool, now: float) -> None:
        """Worker `id` was told to drain."""
        member = self.happened(id, WorkerEvent.DRAIN, now)
        if member.drained is None and self._healthy(member, now):
            self._recovered(self.slots[member.slot], now)
        member.drained, member.quick = now, quick

    def aborted(self, id: int, now: float) -> None:
        """Worker `id` was told to write its stacks, and will not live."""
        self.members[id].aborted = now

    def killed(self, id: int) -> None:
        """Worker `id` was sent SIGKILL."""
        self.members[id].killed = True

    def terminated(self, id: int, now: float) -> None:
        """Worker `id` was sent SIGTERM, on which it should ask to be drained; a busy one does not hear it."""
        member = self.members[id]
        if member.terminated is None:
            member.terminated = now

    def debugging(self, id: int) -> None:
        """A debugger may attach to worker `id`."""
        member = self.members[id]
        member.debugged, member.silence = True, 0.0

    def template_gone(self, id: int, now: float) -> None:
        """Template `id` has ended."""
        assert self.templates is not None
        limits = self.limits
        template = self.templates.gone(id, now, limits.backoff, limits.backoff_max, limits.min_uptime)
        if template.dismissed is None and self.proven and template.generation > self.proven:
            self.rejected = template.generation

    def forgiven(self, now: float) -> None:
        """Somebody has ordered a change: what failed before says nothing of what will be."""
        if self.templates is not None:
            self.templates.forgiven(now)
        for slot in self.slots.values():
            self._recovered(slot, now)
            slot.closed = False

    def heard(self, id: int, served: int, now: float, *, stuck: bool = False) -> bool:
        """Worker `id` has sent a heartbeat; whether it is worn.  One that is `stuck` is as good as silent."""
        member = self.members[id]
        member.heard, member.beats, member.stuck = now, True, stuck
        if not stuck:
            member.useful, member.silence = now, 0.0
        member.wear.count(served)
        return bool(member.worn(now))

    def weighed(self, id: int, rss: int, now: float) -> bool:
        """Worker `id` holds so many bytes of memory; whether it is worn."""
        member = self.members[id]
        member.wear.weigh(rss)
        return bool(member.worn(now))

    def looked(self, now: float) -> bool:
        """The master is awake and has read what had arrived; whether a worker has been silent for too long.

        Silence counts only as far as there was somebody to hear: a look that comes late, because the machine slept, the
        master was stopped or had no time, counts as one in time.
        """
        since, self._looked = self._looked, now
        if since is None or not self.limits.timeout:
            return False
        overdue = False
        for member in self.members.values():
            if member.serving and not member.debugged and (member.beats or not self.programs):
                member.silence += min(now - max(since, member.useful), pace(self.limits.timeout))
                overdue = overdue or self.hung(member)
        return overdue

    def hung(self, member: Member) -> bool:
        """Whether nothing has come of it for `timeout`.  Something may have until just before the next heartbeat."""
        timeout = self.limits.timeout
        return bool(timeout) and member.silence >= timeout + pace(timeout)

    def responsive(self, within: float, now: float) -> bool:
        """Whether any worker listens and was heard of within so many seconds, a heartbeat's delay aside."""
        timeout = self.limits.timeout
        return any(
            member.state is WorkerState.LISTENING
            and not member.doomed
            and (not timeout or now - member.heard <= within + pace(timeout))
            for member in self.members.values()
        )

    def count(self, state: WorkerState) -> int:
        """How many workers are in `state`."""
        return sum(member.state is state for member in self.members.values())

    def _failed(self, member: Member, now: float) -> None:
        """It left unasked: the next one in its slot waits, longer each time, unless it had been healthy."""
        slot = self.slots[member.slot]
        if self.proven and member.generation > self.proven:
            self.rejected = member.generation
        if self._healthy(member, now):
            self._recovered(slot, now)
            return
        # The exponent is capped: the delay has long reached its maximum, and floats end at 2**1024.
        delay = self.limits.backoff * 2.0 ** min(slot.failures, 60)
        slot.failures += 1
        if self.given_up(slot):
            delay = self.limits.backoff_max
        slot.not_before = now + min(delay, self.limits.backoff_max)

    def given_up(self, slot: Slot) -> bool:
        """Whether restarting does not help there."""
        return 0 < self.limits.max_restarts < slot.failures

    def _healthy(self, member: Member, now: float) -> bool:
        return member.listening is not None and now - member.listening >= self.limits.min_uptime

    def _recovered(self, slot: Slot, now: float) -> None:
        slot.failures, slot.not_before = 0, min(slot.not_before, now)
