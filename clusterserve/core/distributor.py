"""Who gets this connection: the queue, the ready workers, the offers between them.

A shell feeds it facts (accepted, readable, answered, recalled, lost) and does what it returns: `distribute` the offers
to send, `answer` the connection to close or to park.  Of its parts, `lateness` names the workers from which to take
something back, and `parking` the connections whose time is over.  It holds no descriptor and knows no time but what it
is told.

Invariants, kept by construction and checked in `tests/core/test_distributor.py`: a connection is in one state and one
place; at most `window` un-acked offers per worker; no connection waits while its policy would give it to a ready
worker; within a lane, who was queued first is offered first; a lost worker loses nothing that it had not touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import PolicyError, ProtocolError
from .connection import ACK, BACK, CLOSE, KEEP, OFFER, READABLE, RETURN, TAKE, Connection, State
from .handle import Handle
from .lateness import PATIENCE, Lateness
from .parking import KEEP_ALIVE, Parking
from .policies import Policy
from .records import ACK as _ACK
from .records import CLOSED as _CLOSED
from .records import DROPPED as _DROPPED
from .records import FREE, FULL
from .records import KEPT as _KEPT
from .records import REFUSED as _REFUSED
from .records import RETURNED as _RETURNED
from .records import SILENT as _SILENT
from .records import TAKEN as _TAKEN
from .worker import EXPENSIVE, Worker

#: A worker that refused a connection is left alone this long, so that a connection nobody can take does not spin.
REFUSED_PAUSE: Final = 0.1

#: All that can be said of a connection that is being served, and of one that was offered.
_ENDINGS: Final = frozenset(ack | ending for ack in (0, _ACK) for ending in (_CLOSED, _RETURNED, _TAKEN))
_ANSWERS: Final = _ENDINGS | {_ACK, _ACK | _KEPT, _ACK | _SILENT, _REFUSED, FULL}


@dataclass(frozen=True)
class Statistics:
    """A snapshot: connections by state, and per worker (id, slot, offered, borrowed or its own for good)."""

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
        #: Whether a worker of an expensive application gets one offer at a time.  Where connections are for long, being
        #: spread evenly counts for more.
        self.narrows = narrows
        #: How long a connection may wait for a worker (seconds; 0: for ever).
        self.queue_timeout = queue
        self.handles: dict[int, Handle] = {}
        self.workers: dict[int, Worker] = {}
        #: Whose client must speak first, and who makes no progress.
        self.parking = Parking(keep_alive, head)
        self.lateness = Lateness(self.workers, self.handles, patience, narrows)
        #: Connections in all lanes together; what `--max-pending` bounds.
        self.queued = 0
        self._tickets = 0
        #: As many as `resize` said; None: the policies know.
        self._slots: int | None = None

    # -- who is there ---------------------------------------------------------------------------------------------

    def add_handle(self, key: int, policy: Policy, *, client_speaks_first: bool, tls: bool = False) -> None:
        """A listener `key` exists from now on."""
        self.handles[key] = Handle(key, policy, client_speaks_first, tls)
        if self._slots is not None:
            self.resize(self._slots)

    def remove_handle(self, key: int) -> list[Connection]:
        """The listener is gone; returns the connections that waited for it, for the shell to close."""
        handle = self.handles.pop(key)
        left = [connection for lane in handle.lanes.values() for connection in lane]
        self.queued -= len(left)
        left += self.parking.clear(key)
        for worker in handle.workers.values():
            worker.listeners.discard(key)
        for connection in left:
            connection.step(CLOSE)
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

    def occupied(self, worker: Worker, busy: int, threads: int) -> None:
        """The worker serves requests in `threads` threads, of which `busy` are occupied; it has said so on its board.

        Such a worker needs no narrow window: how many offers it can begin with is known.
        """
        worker.busy, worker.threads = busy, threads
        worker.narrow = worker.narrow and not threads

    # -- facts about connections ----------------------------------------------------------------------------------

    def accepted(self, connection: Connection, *, waiting: bool) -> None:
        """A new connection; `waiting` if it can be offered at once, else it is parked until `readable`."""
        if waiting:
            self._enqueue(connection)
        else:
            self.parking.silent(connection)

    def readable(self, id: int) -> None:
        """A parked connection's client has sent something."""
        self._enqueue(self.parking.leave(id))

    def hung_up(self, id: int) -> Connection:
        """A parked connection's client left without a word, or its time is over; returns it for the shell to close."""
        connection = self.parking.leave(id)
        connection.step(CLOSE)
        return connection

    def waited_too_long(self, now: float) -> list[Connection]:
        """Take out of the queue who has waited for a worker for `queue_timeout`; the shell answers and closes them."""
        over = []
        if self.queue_timeout:
            for handle in self.handles.values():
                for lane in handle.lanes.values():
                    while lane and lane[0].since + self.queue_timeout <= now:
                        connection = lane.popleft()
                        self.queued -= 1
                        connection.step(CLOSE)
                        over.append(connection)
        return over

    def given_up(self) -> list[Connection]:
        """Nobody will ever be ready again: take everything out of the queue; the shell answers and closes it."""
        left = [connection for handle in self.handles.values() for lane in handle.lanes.values() for connection in lane]
        for handle in self.handles.values():
            handle.lanes.clear()
        for connection in left:
            connection.step(CLOSE)
        self.queued = 0
        return left

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
            if kind == FREE and not id:
                self.lateness.acknowledged(worker, now)
                return None
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
            worker.narrow = self.narrows and worker.held > EXPENSIVE and not worker.threads
        self.lateness.acknowledged(worker, now)
        if kind == _ACK:
            connection.step(ACK)
            worker.borrowed[id] = connection
            return None
        if kind & _KEPT:
            connection.step(KEEP)
            connection.handle = handle
            worker.borrowed[id] = worker.kept[handle] = connection
            return None
        if kind in (_REFUSED, FULL):
            if kind == _REFUSED:
                worker.resting = now + REFUSED_PAUSE
            return connection if self._back((connection,)) else None
        if kind & _TAKEN:
            connection.step(TAKE)
            worker.taken.add(id)
        elif kind & _SILENT and connection.listener in self.handles:
            connection.step(RETURN)
            connection.worker = 0
            self.parking.silent(connection)
            return connection
        elif kind & _RETURNED and connection.listener in self.handles:
            connection.step(RETURN)
            connection.worker = 0
            self.parking.idle(connection, now)
            return connection
        else:
            # Closed, or given back for a listener that is gone.
            connection.step(CLOSE)
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
            connection.step(CLOSE)
            return False
        connection.step(RETURN)
        self.parking.idle(connection, now)
        return True

    def gone(self, connection: Connection) -> None:
        """The shell ends this connection of a dead worker."""
        connection.step(CLOSE)
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

    def wake_at(self, now: float) -> float | None:
        """When `lateness`, `parking` and `distribute` should be asked again though nothing happened; None if never."""
        times = [*self.lateness.deadlines(now), *self.parking.deadlines()]
        if self.queued:
            wakes = (getattr(handle.policy, "wake_at", None) for handle in self.handles.values())
            times += [wake for wake in wakes if wake is not None]
        if self.queued and self.queue_timeout:
            heads = [lane[0].since for handle in self.handles.values() for lane in handle.lanes.values() if lane]
            times.append(min(heads) + self.queue_timeout)
        return min(times, default=None)

    def statistics(self) -> Statistics:
        """A frozen snapshot for tests, logs and tools."""
        workers = self.workers.values()
        return Statistics(
            queued=self.queued,
            parked=len(self.parking.connections),
            offered=sum(len(worker.unacked) for worker in workers),
            borrowed=sum(len(worker.borrowed) for worker in workers),
            workers=tuple(
                (worker.id, worker.slot, len(worker.unacked), len(worker.borrowed) + len(worker.taken))
                for worker in workers
            ),
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
                connection.step(OFFER)
                connection.worker = record.id
                if not record.unacked:
                    record.progress = now
                record.unacked[connection.id] = connection
                record.unread = True
                offers.append((record, connection))
            else:
                if not lane:
                    del lanes[0]

    # -- the queue ------------------------------------------------------------------------------------------------

    def _enqueue(self, connection: Connection) -> None:
        self._tickets += 1
        connection.ticket = self._tickets
        connection.step(READABLE)
        self.handles[connection.listener].lane(connection).append(connection)
        self.queued += 1

    def _back(self, connections: Sequence[Connection]) -> list[Connection]:
        """Merge into the heads of the lanes by ticket: what came back from two workers keeps one order."""
        orphans = []
        for connection in sorted(connections, key=_by_ticket, reverse=True):
            connection.worker = 0
            handle = self.handles.get(connection.listener)
            if handle is None:
                connection.step(CLOSE)
                orphans.append(connection)
                continue
            connection.step(BACK)
            lane = handle.lane(connection)
            older = []
            while lane and lane[0].ticket < connection.ticket:
                older.append(lane.popleft())
            lane.appendleft(connection)
            lane.extendleft(reversed(older))
            self.queued += 1
        return orphans

    def _release(self, worker: Worker, connection: Connection) -> None:
        """The worker keeps it no longer.  Its number may be another's already, whose KEPT came first."""
        if worker.kept.get(connection.handle) is connection:
            del worker.kept[connection.handle]
        connection.handle = -1


def _by_ticket(connection: Connection) -> int:
    return connection.ticket


def _by_head(entry: tuple[Handle, deque[Connection]]) -> int:
    return entry[1][0].ticket
