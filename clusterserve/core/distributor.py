"""Who gets this connection: the queue, the ready workers, the offers between them.

A shell feeds it facts (accepted, readable, answered, looked, recalled, lost) and does what it returns: `distribute` the
offers to send, `overdue` the workers whose unread offers to recall, `looked` those whose kept connections to take back,
`answer` the connection to close or to park.  It holds no descriptor and knows no time but what it is told.

Invariants, kept by construction and checked in `tests/core/test_distributor.py`: a connection is in one state and one
place; at most `window` un-acked offers per worker; no connection waits while its policy would give it to a ready
worker; within a lane, who was queued first is offered first; a lost worker loses nothing that it had not touched.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import PolicyError, ProtocolError
from .connection import Connection, Event, State
from .handle import Handle
from .policies import Policy
from .records import Kind
from .worker import EXPENSIVE, Worker

#: How long a worker may sit on offers without acknowledging any before it is stalled (seconds).
PATIENCE: Final = 0.010

#: The same where a connection is given back after every request: being spread evenly matters less than not waiting.
REQUEST_PATIENCE: Final = 0.002

#: The same for a worker that gets one offer at a time: longer than a request that is merely not cheap should take, or
#: what was offered ahead would come back just before its turn.
AHEAD_PATIENCE: Final = 0.005

#: Nor is a worker late that takes no longer than so many times what they all take on average: on a machine whose
#: processors are all busy, taking offers back only moves them from one waiting worker to another.
_PACES: Final = 3

#: What one answer counts for at most in that average (seconds): those who are stuck must not set the pace.
_SLOWEST: Final = 0.020

#: How often in a row a worker is excused that has no processor to run on: a busy machine must not look like stuck
#: workers.
EXCUSES: Final = 25

#: How long a connection that was given back may be idle (seconds), unless told otherwise.
KEEP_ALIVE: Final = 5.0

#: A worker that refused a connection is left alone this long, so that a connection nobody can take does not spin.
REFUSED_PAUSE: Final = 0.1

#: A stalled worker from which every offer was taken back has nothing left to acknowledge: it is tried again after this
#: long (seconds).
RETRY: Final = 0.1

#: The same where every request is offered: then a probe delays one request for a moment, and a machine that was slow to
#: let a worker run must not cost a worker for long.
REQUEST_RETRY: Final = 0.004

_ACK: Final = int(Kind.ACK)
_CLOSED: Final = int(Kind.CLOSED)
_RETURNED: Final = int(Kind.RETURNED)
_TAKEN: Final = int(Kind.TAKEN)
_REFUSED: Final = int(Kind.REFUSED)
_KEPT: Final = int(Kind.KEPT)
_DROPPED: Final = int(Kind.DROPPED)
_SILENT: Final = int(Kind.SILENT)

#: All that can be said of a connection that is being served, and of one that was offered.
_ENDINGS: Final = frozenset(ack | ending for ack in (0, _ACK) for ending in (_CLOSED, _RETURNED, _TAKEN))
_ANSWERS: Final = _ENDINGS | {_ACK, _ACK | _KEPT, _ACK | _SILENT, _REFUSED}


@dataclass(frozen=True)
class Statistics:
    """A snapshot: connections by state, and per worker (id, slot, offered, borrowed)."""

    queued: int
    parked: int
    offered: int
    borrowed: int
    workers: tuple[tuple[int, int, int, int], ...]
    #: Of the borrowed ones those that a worker keeps between requests.
    kept: int = 0


class Distributor:
    """All connections the master knows, and who may have them."""

    def __init__(
        self,
        patience: float = PATIENCE,
        keep_alive: float = KEEP_ALIVE,
        *,
        queue: float = 0.0,
        head: float = 0.0,
        narrows: bool = False,
    ) -> None:
        self.patience = patience
        #: Whether a worker of an expensive application gets one offer at a time.  Where connections are for long, being
        #: spread evenly counts for more.
        self.narrows = narrows
        self.keep_alive = keep_alive
        #: How long a connection may wait for a worker, and a new client with its first word (seconds; 0: for ever).
        self.queue_timeout = queue
        self.head_timeout = head
        self.handles: dict[int, Handle] = {}
        self.workers: dict[int, Worker] = {}
        self.parked: dict[int, Connection] = {}
        #: When a parked connection that was served before is closed, by id, soonest first.
        self._expiries: dict[int, float] = {}
        #: The same of those that have never said anything.
        self._silent: dict[int, float] = {}
        #: Connections in all lanes together; what `--max-pending` bounds.
        self.queued = 0
        self._tickets = 0
        #: How long workers take to acknowledge, on average (seconds).
        self._pace = 0.0
        #: As many as `resize` said; None: the policies know.
        self._slots: int | None = None

    # -- who is there ---------------------------------------------------------------------------------------------

    def add_handle(self, key: int, policy: Policy, *, client_speaks_first: bool) -> None:
        """A listener `key` exists from now on."""
        self.handles[key] = Handle(key, policy, client_speaks_first)
        if self._slots is not None:
            self.resize(self._slots)

    def remove_handle(self, key: int) -> list[Connection]:
        """The listener is gone; returns the connections that waited for it, for the shell to close."""
        handle = self.handles.pop(key)
        left = [connection for lane in handle.lanes.values() for connection in lane]
        self.queued -= len(left)
        left += [connection for connection in self.parked.values() if connection.listener == key]
        for worker in handle.workers.values():
            worker.listeners.discard(key)
        for connection in left:
            self.parked.pop(connection.id, None)
            self._unpark(connection.id)
            connection.step(Event.CLOSE)
        return left

    def resize(self, slots: int) -> None:
        """The cluster has `slots` slots from now on; for the policies that care, also those that are still to come."""
        self._slots = slots
        for handle in self.handles.values():
            handle.resize(slots)

    def add_worker(self, id: int, slot: int, capacity: int | None = None) -> Worker:
        """A worker exists; it gets nothing before it is attached to a handle."""
        worker = self.workers[id] = Worker(id, slot, capacity)
        # Until it is known what a connection costs it.
        worker.narrow = self.narrows
        return worker

    def attach(self, worker: int, key: int) -> None:
        """The worker listens on handle `key` (Node: `add`)."""
        handle, record = self.handles[key], self.workers[worker]
        if worker not in handle.workers:
            record.listeners.add(key)
            handle.workers[worker] = record
            if record.open:
                handle.policy.add(record)

    def detach(self, worker: int, key: int) -> None:
        """The worker has closed its server on `key` (Node: `remove`); what it holds it keeps."""
        handle = self.handles[key]
        record = handle.workers.pop(worker, None)
        if record is not None:
            record.listeners.discard(key)
            if record.open:
                handle.policy.remove(record)

    def drain_worker(self, worker: int) -> None:
        """Offer it nothing more."""
        record = self.workers[worker]
        if record.open:
            record.open = False
            for key in record.listeners:
                self.handles[key].policy.remove(record)

    def remove_worker(self, worker: int) -> list[Connection]:
        """The worker is dead; returns what it held, oldest first.

        The shell finds out what the worker had done to each and calls `requeue` or `gone`.
        """
        record = self.workers[worker]
        self.drain_worker(worker)
        for key in tuple(record.listeners):
            self.detach(worker, key)
        del self.workers[worker]
        held = sorted((*record.unacked.values(), *record.borrowed.values()), key=_by_ticket)
        # What still lies in its channel must not speak for connections that others have by then.
        record.unacked.clear()
        record.borrowed.clear()
        record.kept.clear()
        for connection in record.lost.values():
            connection.relics -= 1
        record.lost.clear()
        record.taken.clear()
        return held

    # -- facts about connections ----------------------------------------------------------------------------------

    def accepted(self, connection: Connection, *, waiting: bool) -> None:
        """A new connection; `waiting` if it can be offered at once, else it is parked until `readable`."""
        if waiting:
            self._enqueue(connection)
        else:
            self._park_silent(connection, connection.since)

    def readable(self, id: int) -> None:
        """A parked connection's client has sent something."""
        self._unpark(id)
        self._enqueue(self.parked.pop(id))

    def hung_up(self, id: int) -> Connection:
        """A parked connection's client left without a word; returns it for the shell to close."""
        connection = self.parked.pop(id)
        self._unpark(id)
        connection.step(Event.CLOSE)
        return connection

    def expired(self, now: float) -> list[Connection]:
        """Idle for `keep_alive` seconds since they were given back, or silent for `head_timeout` from the start.

        They are `hung_up`, if nothing has arrived meanwhile.  Each is named once; whoever has sent something is
        `readable` as soon as the shell hears of it.
        """
        ids = []
        for deadlines in (self._expiries, self._silent):
            for id, deadline in deadlines.items():
                if deadline > now:
                    break
                ids.append(id)
        for id in ids:
            self._unpark(id)
        return [self.parked[id] for id in ids]

    def longest_idle(self, count: int) -> list[Connection]:
        """So many parked connections that were served before, longest idle first: who goes when room is short."""
        return [self.parked[id] for id in itertools.islice(self._expiries, count)]

    def waited_too_long(self, now: float) -> list[Connection]:
        """Take out of the queue who has waited for a worker for `queue_timeout`; the shell answers and closes them."""
        over = []
        if self.queue_timeout:
            for handle in self.handles.values():
                for lane in handle.lanes.values():
                    while lane and lane[0].since + self.queue_timeout <= now:
                        connection = lane.popleft()
                        self.queued -= 1
                        connection.step(Event.CLOSE)
                        over.append(connection)
        return over

    def answer(self, worker: Worker, kind: int, id: int, held: int, now: float, handle: int = -1) -> Connection | None:
        """A worker's answer.  Returns the connection if the shell must act: close it if GONE, watch it if PARKED.

        `handle` is the worker's descriptor of one that it keeps.  Raises `ProtocolError`, and changes nothing, for a
        connection this worker does not hold (what was recalled was never read, so an honest worker cannot answer for
        it) and for an answer that says nothing or too much.
        """
        if worker.lost and id in worker.lost:
            # It may have given back, or closed, what was taken back from it: until it has heard of that, others decide.
            if kind == _DROPPED:
                worker.lost.pop(id).relics -= 1
            worker.progress = now
            worker.stalled = worker.suspect = False
            return None
        connection = worker.unacked.get(id)
        if connection is None:
            connection = worker.borrowed.get(id)
            if connection is None and kind == _CLOSED and id in worker.taken:
                worker.taken.remove(id)
                return None
            if connection is None or not (kind in _ENDINGS or (kind == _KEPT and connection.state is State.BORROWED)):
                raise ProtocolError(f"worker {worker.id} answered {kind} for connection {id}, which it was not offered")
            if kind == _TAKEN and connection.relics:
                # Another worker still has a copy of it, and cannot hear: ours is needed to end it.
                return None
            del worker.borrowed[id]
            if connection.state is State.KEPT:
                self._release(worker, connection)
        else:
            if kind not in _ANSWERS:
                raise ProtocolError(f"worker {worker.id} answered {kind} for connection {id}, which is no answer")
            del worker.unacked[id]
            if kind == _ACK | _TAKEN and connection.relics:
                kind = _ACK
            # A peak counts at once and fades over some hundred answers: see `held`.
            worker.held = max(held, worker.held - (worker.held >> 6) - 1)
            worker.narrow = self.narrows and worker.held > EXPENSIVE
        if self.narrows and not worker.narrow:
            took = now - worker.progress
            self._pace += ((min(_SLOWEST, took)) - self._pace) * 0.05
        # Whatever it says, its loop has turned.
        worker.progress = now
        worker.stalled = worker.suspect = False
        worker.excuses = 0
        if kind == _ACK:
            connection.step(Event.ACK)
            worker.borrowed[id] = connection
            return None
        if kind & _KEPT:
            connection.step(Event.KEEP)
            connection.handle = handle
            worker.borrowed[id] = worker.kept[handle] = connection
            return None
        if kind == _REFUSED:
            worker.resting = now + REFUSED_PAUSE
            return connection if self._back((connection,)) else None
        if kind & _TAKEN:
            connection.step(Event.TAKE)
            worker.taken.add(id)
        elif kind & _SILENT and connection.listener in self.handles:
            connection.step(Event.RETURN)
            connection.worker = 0
            self._park_silent(connection, connection.since)
            return connection
        elif kind & _RETURNED and connection.listener in self.handles:
            connection.step(Event.RETURN)
            connection.worker = 0
            self.parked[id] = connection
            self._expiries[id] = now + self.keep_alive
            return connection
        else:
            # Closed, or given back for a listener that is gone.
            connection.step(Event.CLOSE)
        connection.worker = 0
        return connection

    def recalled(self, worker: Worker, ids: Iterable[int]) -> list[Connection]:
        """These offers came back unread: to the head of their lanes, in their old order.

        Returns those whose listener is gone, for the shell to close.  Raises `ProtocolError`, and changes nothing, if
        the worker has answered for one of them, which it cannot have read.
        """
        back = tuple(ids)
        for id in back:
            if id not in worker.unacked:
                raise ProtocolError(f"worker {worker.id} answered for connection {id} before it had read the offer")
        worker.unread = False
        return self._back([worker.unacked.pop(id) for id in back])

    def taken_back(self, worker: Worker, connections: Sequence[Connection], now: float) -> list[Connection]:
        """The shell has claimed the unread requests of these, which the worker keeps: others may have them.

        Returns those whose listener is gone, for the shell to close.  The shell tells the worker, which answers DROPPED
        for each.
        """
        for connection in connections:
            del worker.borrowed[connection.id]
            self._release(worker, connection)
            worker.lost[connection.id] = connection
            connection.relics += 1
            connection.since = now
            # It became readable just now, and not when it was first offered.
            self._tickets += 1
            connection.ticket = self._tickets
        return self._back(connections)

    def undelivered(self, worker: Worker, ids: Iterable[int], now: float) -> list[Connection]:
        """These offers could not be sent, its channel is full: as `recalled`, and it gets a pause."""
        worker.resting = now + REFUSED_PAUSE
        return self._back([worker.unacked.pop(id) for id in ids])

    def requeue(self, connections: Sequence[Connection]) -> list[Connection]:
        """A dead worker had not touched these: as `recalled`."""
        return self._back(connections)

    def idle(self, connection: Connection, now: float) -> bool:
        """A dead worker had it between two requests: as if it had given it back.  False if its listener is gone."""
        connection.worker = 0
        if connection.listener not in self.handles:
            connection.step(Event.CLOSE)
            return False
        connection.step(Event.RETURN)
        self.parked[connection.id] = connection
        self._expiries[connection.id] = now + self.keep_alive
        return True

    def gone(self, connection: Connection) -> None:
        """The shell ends this connection of a dead worker."""
        connection.step(Event.CLOSE)
        connection.worker = 0

    # -- decisions ------------------------------------------------------------------------------------------------

    def distribute(self, now: float) -> list[tuple[Worker, Connection]]:
        """Give waiting connections to ready workers; the offers to send, in order.

        Raises `PolicyError` if a policy names a worker that is not ready for the connection.  (The shell wraps policies
        that are not ours so that this is a fault of ours; see `master.policies`.)
        """
        offers: list[tuple[Worker, Connection]] = []
        if self.queued:
            self._hand_out(offers, now)
        if self.queued and self.narrows:
            # Nobody is free.  The one that will be first should not have to wait for us then.
            narrow = [worker for worker in self.workers.values() if worker.narrow]
            for worker in narrow:
                worker.ahead = True
            self._hand_out(offers, now)
            for worker in narrow:
                worker.ahead = False
        return offers

    def late(self, now: float) -> list[int]:
        """The workers that made no progress for `patience` and that `overdue` should not take for stalled at once.

        What was offered ahead needs no excuse: it belongs to whoever is free first.
        """
        return [
            worker.id
            for worker in self.workers.values()
            if worker.unacked
            and not worker.stalled
            and not (worker.narrow and len(worker.unacked) > 1)
            and now >= self._overdue_at(worker)
        ]

    def overdue(self, now: float, excused: Container[int] = ()) -> list[Worker]:
        """Mark the workers that made no progress for `patience`; returns those whose unread offers should come back.

        Only while another worker is ready: with nobody to take them, they may as well stay where they are.  `excused`
        are workers that could not run for want of a processor: each gets its `patience` anew, `EXCUSES` times.
        """
        late = []
        for worker in self.workers.values():
            if worker.resting and now >= worker.resting:
                worker.resting = 0.0
            if worker.unacked:
                # The same sum as in `wake_at`: a difference may round to the other side and spin.
                if now < self._overdue_at(worker):
                    continue
                if not worker.stalled and worker.id in excused and worker.excuses < EXCUSES:
                    worker.excuses += 1
                    worker.progress = now
                    continue
                worker.stalled = True
                if worker.unread:
                    late.append(worker)
            elif worker.stalled and now >= worker.retry:
                worker.stalled = False
                worker.suspect = True
        # What was offered ahead belongs to whoever is free first, and that is somebody else.  But whoever drains is the
        # last that could have it: nothing is offered any more.
        late = [
            worker for worker in late if (worker.narrow and worker.open) or self._replaceable(worker, worker.unacked)
        ]
        for worker in late:
            worker.retry = now + (REQUEST_RETRY if self.narrows else RETRY)
        return late

    @property
    def watched(self) -> bool:
        """Whether there is anything to look for: connections that workers keep, or a worker that was stuck."""
        return any(worker.kept or worker.stuck for worker in self.workers.values())

    def looked(self, worker: Worker, turns: int, unclaimed: bool, running: int) -> bool:
        """What the worker's board shows: how often its loop has begun or ended a turn, and the requests in progress.

        `unclaimed`: the next request of some connection that it keeps lies there.  Marks it as stuck if nothing has
        moved since the last look, and it is in the midst of a turn, or requests have been waiting since; returns
        whether they should be taken back, because somebody else is ready for them.
        """
        still = turns == worker.turns and (bool(turns & 1) or (unclaimed and worker.unclaimed))
        worker.turns, worker.unclaimed, worker.running, worker.stuck = turns, unclaimed, running, still
        return still and unclaimed and self._replaceable(worker, worker.kept)

    def overlook(self) -> None:
        """The shell stops looking for a while: what was seen last says nothing about what it will see next."""
        for worker in self.workers.values():
            worker.turns, worker.unclaimed, worker.stuck = -1, False, False

    def wake_at(self, now: float) -> float | None:
        """When `overdue` and `distribute` should run again though nothing happened; None if never."""
        times = []
        for worker in self.workers.values():
            if worker.resting:
                times.append(worker.resting)
            if not worker.stalled:
                if worker.unacked:
                    times.append(self._overdue_at(worker))
            elif not worker.unacked:
                times.append(worker.retry)
            elif worker.unread:
                times.append(now + self.patience)
        if self.queued:
            wakes = (getattr(handle.policy, "wake_at", None) for handle in self.handles.values())
            times += [wake for wake in wakes if wake is not None]
        times += itertools.islice(self._expiries.values(), 1)
        times += itertools.islice(self._silent.values(), 1)
        if self.queued and self.queue_timeout:
            heads = [lane[0].since for handle in self.handles.values() for lane in handle.lanes.values() if lane]
            times.append(min(heads) + self.queue_timeout)
        return min(times, default=None)

    def statistics(self) -> Statistics:
        """A frozen snapshot for tests, logs and tools."""
        workers = self.workers.values()
        return Statistics(
            queued=self.queued,
            parked=len(self.parked),
            offered=sum(len(worker.unacked) for worker in workers),
            borrowed=sum(len(worker.borrowed) for worker in workers),
            workers=tuple((worker.id, worker.slot, len(worker.unacked), len(worker.borrowed)) for worker in workers),
            kept=sum(len(worker.kept) for worker in workers),
        )

    def _hand_out(self, offers: list[tuple[Worker, Connection]], now: float) -> None:
        lanes = [(handle, lane) for handle in self.handles.values() for lane in handle.lanes.values() if lane]
        while lanes:
            until = None
            if len(lanes) > 1:
                # Several listeners or lanes: the one whose head has waited longest, for as long as it is that one.
                lanes.sort(key=_by_head)
                until = lanes[1][1][0].ticket
            handle, lane = lanes[0]
            pick = handle.policy.pick
            while lane and (until is None or lane[0].ticket < until):
                connection = lane[0]
                worker = pick(connection, now)
                if worker is None:
                    del lanes[0]
                    break
                record = handle.workers.get(worker.id)
                if record is None or not record.ready:
                    raise PolicyError(f"policy {type(handle.policy).__name__} chose {worker!r}, which is not ready")
                lane.popleft()
                self.queued -= 1
                connection.step(Event.OFFER)
                connection.worker = record.id
                if not record.unacked:
                    record.progress = now
                record.unacked[connection.id] = connection
                record.unread = True
                offers.append((record, connection))
            else:
                if not lane:
                    del lanes[0]

    # -- parking --------------------------------------------------------------------------------------------------

    def _park_silent(self, connection: Connection, since: float) -> None:
        self.parked[connection.id] = connection
        if self.head_timeout:
            self._silent[connection.id] = since + self.head_timeout

    def _unpark(self, id: int) -> None:
        self._expiries.pop(id, None)
        self._silent.pop(id, None)

    # -- the queue ------------------------------------------------------------------------------------------------

    def _enqueue(self, connection: Connection) -> None:
        self._tickets += 1
        connection.ticket = self._tickets
        connection.step(Event.READABLE)
        self.handles[connection.listener].lane(connection).append(connection)
        self.queued += 1

    def _back(self, connections: Sequence[Connection]) -> list[Connection]:
        """Merge into the heads of the lanes by ticket: what came back from two workers keeps one order."""
        orphans = []
        for connection in sorted(connections, key=_by_ticket, reverse=True):
            connection.worker = 0
            handle = self.handles.get(connection.listener)
            if handle is None:
                connection.step(Event.CLOSE)
                orphans.append(connection)
                continue
            connection.step(Event.BACK)
            lane = handle.lane(connection)
            older = []
            while lane and lane[0].ticket < connection.ticket:
                older.append(lane.popleft())
            lane.appendleft(connection)
            lane.extendleft(reversed(older))
            self.queued += 1
        return orphans

    def _overdue_at(self, worker: Worker) -> float:
        patience = AHEAD_PATIENCE if worker.narrow else self.patience
        return worker.progress + max(patience, _PACES * self._pace)

    def _release(self, worker: Worker, connection: Connection) -> None:
        """The worker keeps it no longer.  Its number may be another's already, whose KEPT came first."""
        if worker.kept.get(connection.handle) is connection:
            del worker.kept[connection.handle]
        connection.handle = -1

    def _replaceable(self, late: Worker, held: Mapping[int, Connection]) -> bool:
        """Whether another ready worker listens where one of those that this worker holds came from."""
        keys = {connection.listener for connection in held.values()} & self.handles.keys()
        handles = [handle for key in keys if not (handle := self.handles[key]).sticky]
        return any(other is not late and other.ready for handle in handles for other in handle.workers.values())


def _by_ticket(connection: Connection) -> int:
    return connection.ticket


def _by_head(entry: tuple[Handle, deque[Connection]]) -> int:
    return entry[1][0].ticket
