"""Which workers should exist: compare what is wanted with what is there, never patch by event.

`plan(target, roster, now)` changes nothing and returns what to do now and when to ask again.  Start, respawn
with back-off, scale, reload, the replacement of worn and hung workers, and stop are one reconciliation with different
targets.  Facts enter through the `Roster`; executing an action is a fact too (`spawned`, `drained`, `aborted`,
`killed`), so asking twice never orders twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .lifecycle import WorkerState
from .roster import Member, Roster, Slot
from .templates import Step, steps


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
    #: Every worker has ended, with an exit code that means not to restart it.
    DESERTED = "deserted"
    #: A worker of a newer generation is dead before any of that generation listened: stay with the one that serves.
    REJECTED = "rejected"
    #: Told to stop, and every worker is dead.
    STOPPED = "stopped"


@dataclass(frozen=True)
class Target:
    """What is wanted: `count` workers of `generation`, or none and how fast.

    `manual`: how many there are is somebody else's business: nobody is started, replaced or sent away.  `keep`: when it
    stops, another cluster goes on with what is idle.
    """

    count: int
    generation: int = 1
    stop: Stop = Stop.NO
    manual: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Spawn:
    """Start a worker process in `slot`; to replace worker `worn`, which `why`, if that is not 0."""

    slot: int
    generation: int
    worn: int = 0
    why: str = ""


@dataclass(frozen=True)
class Drain:
    """Tell a worker to finish.  `interrupt`: it boots and does not read messages yet, so signal it as well."""

    worker: int
    quick: bool
    interrupt: bool
    #: Others go on serving: what is idle is not closed but given back.
    keep: bool


@dataclass(frozen=True)
class Abort:
    """Have a hung worker write its stacks, of which it dies; `why` completes "worker N is hung: …"."""

    worker: int
    why: str


@dataclass(frozen=True)
class Kill:
    """SIGKILL a worker; `why` completes the log line "worker N was killed: …"."""

    worker: int
    why: str


Action = Spawn | Drain | Abort | Kill | Step


@dataclass(frozen=True)
class Plan:
    """What to do now, when to ask again (None: only when something happens), and how the cluster stands."""

    actions: tuple[Action, ...]
    deadline: float | None
    verdict: Verdict
    #: Slots whose worker has failed so often that whoever waits for it should not wait any longer.
    stuck: tuple[int, ...]
    #: Slots in which so many workers in a row have failed that they are only tried from time to time.
    given_up: tuple[int, ...] = ()


def plan(target: Target, roster: Roster, now: float) -> Plan:
    """The steps from what is there to what is wanted."""
    if target.stop is not Stop.NO:
        wanted = list(_stop(target, roster))
    elif target.manual:
        wanted = []
    else:
        wanted = [*_start(target, roster, now), *_retire(target, roster, now)]
    wanted += _kill(roster)
    hopeless = _hopeless(target, roster, wanted)
    wanted += _templates(target, roster, hopeless or _deserted(target, roster))
    # An entry is (when, what); what lies ahead only sets the deadline.
    actions = tuple(action for due, action in wanted if due <= now)
    deadline = min((due for due, _ in wanted if due > now), default=None)
    return Plan(
        actions,
        deadline,
        _verdict(target, roster, actions, hopeless),
        _stuck(target, roster),
        _given_up(target, roster),
    )


_Due = Iterator[tuple[float, Action]]


def _stop(target: Target, roster: Roster) -> _Due:
    quick = target.stop is Stop.QUICK
    for member in roster.members.values():
        if member.state is WorkerState.DISCONNECTED or member.doomed:
            continue
        if member.drained is None or (quick and not member.quick):
            yield 0.0, Drain(member.id, quick, interrupt=member.listening is None, keep=target.keep)


def _start(target: Target, roster: Roster, now: float) -> _Due:
    """Fill empty slots; in a reload and for worn workers also start replacements, `surge` at a time."""
    if _rejected(target, roster):
        return
    generation = _at_hand(target, roster)
    if not generation:
        # Nobody to fork them: it is asked again when there is.
        return
    here = [member for member in roster.members.values() if member.current and not _abandoned(member, target, roster)]
    newest = {member.slot: member for member in here}
    fresh = {member.slot: member for member in here if _fresh(member, target, now)}
    for number in range(target.count):
        slot = roster.slots.get(number, Slot())
        # Before anyone ever listened, a slot whose first worker died stays empty: no respawn loop of a broken app.
        if slot.closed or roster.undecided(number):
            continue
        if number not in newest and (roster.proven or not slot.failures):
            yield slot.not_before, Spawn(number, generation)
    if generation != target.generation:
        return
    booting = sum(member.listening is None for member in here)
    # The oldest first: else the lowest slots, if their workers wear out quickly, would always be served before others.
    stale = sorted((number for number in newest if number not in fresh), key=lambda number: newest[number].id)
    for number in stale:
        if number < target.count and booting < roster.limits.surge:
            # One that waits for its back-off keeps its turn: what made it fail may make the next one fail too.
            booting += 1
            old = newest[number]
            of_age = old.id if old.generation == target.generation else 0
            why = old.worn(now) if of_age else ""
            yield roster.slots[number].not_before, Spawn(number, target.generation, of_age, why)
    for number, member in fresh.items():
        if member.wear.lifetime and member.listening is not None:
            # Ahead, or it were not fresh: what is asked for then is decided then.
            yield member.listening + member.wear.lifetime, Spawn(number, target.generation)


def _at_hand(target: Target, roster: Roster) -> int:
    """The generation of which workers can be started now: the wanted one, or an older one until that is ready; or 0."""
    templates = roster.templates
    if templates is None or templates.ready(target.generation) is not None:
        return target.generation
    # Before anyone ever listened there is nothing that older code could go on with.
    other = templates.stand_in(target.generation, roster.proven) if roster.proven else None
    return 0 if other is None or other.ready is None else other.generation


def _retire(target: Target, roster: Roster, now: float) -> _Due:
    """Workers of slots no longer wanted, and those worn or of other generations that are replaced or not needed."""
    # While it may turn out that of the new generation none can start, and all others are wanted as they were.
    unproven = 0 < roster.proven < target.generation and len(_closed(target, roster)) < target.count
    # The best of each slot: a fresh one of the wanted generation, else the newest.
    best: dict[int, Member] = {}
    for member in roster.members.values():
        if member.serving:
            known = best.get(member.slot)
            if known is None or not _fresh(known, target, now):
                best[member.slot] = member
    for member in roster.members.values():
        replaced = not _fresh(member, target, now) and best.get(member.slot, member) is not member
        surplus = member.slot >= target.count and not (unproven and member.serving)
        leaves = surplus or replaced or _abandoned(member, target, roster)
        if member.current and not member.doomed and leaves:
            yield 0.0, Drain(member.id, quick=False, interrupt=member.listening is None, keep=True)


def _fresh(member: Member, target: Target, now: float) -> bool:
    """Whether it needs no replacement."""
    return member.generation == target.generation and not member.worn(now)


def _abandoned(member: Member, target: Target, roster: Roster) -> bool:
    """Whether it boots for a generation that is not wanted any more, and can be spared: its slot has another.

    Otherwise it cannot: reloads that follow one another faster than a worker boots would leave nobody.  Of several that
    boot the oldest stays, being the first to serve.
    """
    if member.generation == target.generation or member.listening is not None:
        return False
    others = (other for other in roster.members.values() if other.slot == member.slot and not other.doomed)
    return not roster.proven or any(
        other.serving or (other.current and other.listening is None and other.id < member.id) for other in others
    )


def _rejected(target: Target, roster: Roster) -> bool:
    """Whether what is wanted cannot be had: nobody starts any more until the target is another."""
    return roster.proven < target.generation == roster.rejected


def _kill(roster: Roster) -> _Due:
    """Who did not come up, did not go, or did not answer in time."""
    limits = roster.limits
    for member in roster.members.values():
        if member.killed:
            continue
        if member.aborted is not None:
            yield member.aborted + limits.abort, Kill(member.id, "it was hung, and did not die of SIGABRT")
        elif member.state is WorkerState.DISCONNECTED and member.disconnected is not None:
            due = member.disconnected + limits.disconnected
            if member.drained is not None and roster.programs:
                # It has handlers for this moment, which have what is left of its grace.
                due = max(due, member.drained + (limits.quick if member.quick else limits.graceful))
            yield due, Kill(member.id, "it closed its channel but did not exit")
        elif member.drained is not None:
            grace = limits.quick if member.quick else limits.graceful
            yield member.drained + grace, Kill(member.id, f"it did not finish within {grace:g} s")
        elif member.terminated is not None:
            yield member.terminated + limits.graceful, Kill(member.id, "it does not act on SIGTERM")
        elif member.listening is None and limits.boot and not member.debugged:
            what = "come up" if roster.programs else "listen"
            yield member.spawned + limits.boot, Kill(member.id, f"it did not {what} within {limits.boot:g} s")
        elif member.serving and roster.hung(member):
            what = "nothing has come of its threads" if member.stuck else "its event loop has not turned"
            yield 0.0, Abort(member.id, f"{what} for {limits.timeout:g} s")


def _templates(target: Target, roster: Roster, hopeless: bool) -> _Due:
    """One for what is wanted, and the one of what serves: if the wanted one cannot start, that stays."""
    if roster.templates is None:
        return
    over = target.stop is not Stop.NO or hopeless
    other = None
    if 0 < roster.proven < target.generation:
        other = roster.templates.stand_in(target.generation, roster.proven)
    keep = () if over else (target.generation, roster.proven if other is None else other.generation)
    start = 0 if over or _rejected(target, roster) or _tried(target, roster) else target.generation
    yield from steps(roster.templates, keep, start, roster.limits.boot, roster.limits.disconnected)


def _tried(target: Target, roster: Roster) -> bool:
    """Whether, before anyone ever listened, this generation has had its template: no respawn loop of a broken app."""
    return roster.templates is not None and not roster.proven and roster.templates.tried >= target.generation


def _hopeless(target: Target, roster: Roster, wanted: list[tuple[float, Action]]) -> bool:
    """Whether no worker of the first generation ever listened, and none is left to do so."""
    if target.stop is not Stop.NO or target.manual or roster.proven or roster.members or not target.count:
        return False
    if roster.templates is not None:
        template = roster.templates.of(target.generation)
        if not _tried(target, roster) or (template is not None and template.ready is None):
            return False
    return not any(isinstance(action, Spawn) for _, action in wanted)


def _verdict(target: Target, roster: Roster, actions: tuple[Action, ...], hopeless: bool) -> Verdict:
    members = roster.members.values()
    templates = roster.templates is not None and bool(roster.templates.here)
    if target.stop is not Stop.NO:
        return Verdict.RUNNING if members or templates else Verdict.STOPPED
    if target.manual:
        return Verdict.SETTLED
    if hopeless and not templates:
        return Verdict.FAILED
    if _deserted(target, roster) and not templates:
        return Verdict.DESERTED
    if _rejected(target, roster):
        # Why it failed is known for certain when it is dead.
        dying = any(member.generation == target.generation and member.disconnected is not None for member in members)
        return Verdict.RUNNING if dying else Verdict.REJECTED
    listening = [member for member in members if member.serving]
    settled = (
        len(listening) == len(members) == target.count - len(_closed(target, roster))
        and all(member.generation == target.generation for member in members)
        and not actions
    )
    return Verdict.SETTLED if settled else Verdict.RUNNING


def _closed(target: Target, roster: Roster) -> list[int]:
    """The wanted slots whose worker has ended for good."""
    return [number for number in range(target.count) if roster.slots.get(number, Slot()).closed]


def _deserted(target: Target, roster: Roster) -> bool:
    """Whether every worker that is wanted has ended for good."""
    over = target.stop is not Stop.NO or target.manual or roster.members
    return not over and 0 < target.count == len(_closed(target, roster))


def _given_up(target: Target, roster: Roster) -> tuple[int, ...]:
    if target.stop is not Stop.NO or target.manual or not roster.proven:
        return ()
    return tuple(number for number in range(target.count) if roster.given_up(roster.slots.get(number, Slot())))


def _stuck(target: Target, roster: Roster) -> tuple[int, ...]:
    """The wanted slots without a worker of the wanted generation in which one after the other fails."""
    if target.stop is not Stop.NO or target.manual or not roster.proven:
        return ()
    served = {
        member.slot for member in roster.members.values() if member.serving and member.generation == target.generation
    }
    unforked = 0 if roster.templates is None else roster.templates.failures
    return tuple(
        number
        for number in range(target.count)
        if number not in served and max(unforked, roster.slots.get(number, Slot()).failures) >= roster.limits.tries
    )
