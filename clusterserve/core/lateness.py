"""Which workers make no progress, and when is that reason enough to take from them what others could begin at once.

Two ways to see it: offers that are not acknowledged (`late`, `overdue`), and the boards of workers that keep
connections (`looked`).  It is written to the workers' own records; only the shell takes anything back.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Final

from .connection import Connection
from .handle import Handle
from .worker import Worker

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

#: A stalled worker from which every offer was taken back has nothing left to acknowledge: it is tried again after this
#: long (seconds).
RETRY: Final = 0.1

#: The same where every request is offered: then a probe delays one request for a moment, and a machine that was slow to
#: let a worker run must not cost a worker for long.
REQUEST_RETRY: Final = 0.004


class Lateness:
    """Looks at the distributor's `workers` and `handles`, by id and key; both are the distributor's to change.

    `narrows` as `Distributor` has it.
    """

    def __init__(
        self, workers: Mapping[int, Worker], handles: Mapping[int, Handle], patience: float, narrows: bool
    ) -> None:
        self.patience = patience
        self._workers = workers
        self._handles = handles
        self._narrows = narrows
        #: How long workers take to acknowledge, on average (seconds).
        self._pace = 0.0

    def acknowledged(self, worker: Worker, now: float) -> None:
        """The worker has said anything at all about what it holds: its loop has turned."""
        if self._narrows and not worker.narrow:
            self._pace += (min(_SLOWEST, now - worker.progress) - self._pace) * 0.05
        worker.progress = now
        worker.stalled = worker.suspect = False
        worker.excuses = 0

    def late(self, now: float) -> list[int]:
        """The workers that made no progress for `patience` and that `overdue` should not take for stalled at once.

        What was offered ahead needs no excuse: it belongs to whoever is free first.
        """
        return [
            worker.id
            for worker in self._workers.values()
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
        for worker in self._workers.values():
            if worker.resting and now >= worker.resting:
                worker.resting = 0.0
            if worker.unacked:
                # The same sum as in `deadlines`: a difference may round to the other side and spin.
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
            worker.retry = now + (REQUEST_RETRY if self._narrows else RETRY)
        return late

    @property
    def watched(self) -> bool:
        """Whether there is anything to look for: connections that workers keep, or a worker that was stuck."""
        for worker in self._workers.values():  # noqa: SIM110 - a thousand times a second, and a generator costs most of it
            if worker.kept or worker.stuck:
                return True
        return False

    def looked(self, boards: Iterable[tuple[Worker, int, bool, int]]) -> list[Worker]:
        """What the workers' boards show, all at once: marks who is stuck, and returns those.

        Of each worker how often its loop has begun or ended a turn; whether the next request of some connection that it
        keeps lies unclaimed; and how many requests it has in progress on those.  A worker is stuck if nothing has moved
        since the last look, and it is in the midst of a turn, or requests have been waiting since.
        """
        stuck = []
        for worker, turns, unclaimed, running in boards:
            if turns != worker.turns:
                worker.turns = turns
                worker.stuck = False
            elif turns & 1 or (unclaimed and worker.unclaimed):
                worker.stuck = True
                stuck.append(worker)
            else:
                worker.stuck = False
            worker.unclaimed = unclaimed
            worker.running = running
        return stuck

    def late_with_kept(self, stuck: Iterable[Worker]) -> list[Worker]:
        """Those of the stuck whose unclaimed requests should be taken back: somebody else is ready for them."""
        return [worker for worker in stuck if worker.unclaimed and self._replaceable(worker, worker.kept)]

    def overlook(self) -> None:
        """The shell stops looking for a while: what was seen last says nothing about what it will see next."""
        for worker in self._workers.values():
            worker.turns, worker.unclaimed, worker.stuck = -1, False, False

    def deadlines(self, now: float) -> Iterator[float]:
        """When `overdue` should run again though nothing happened."""
        for worker in self._workers.values():
            if worker.resting:
                yield worker.resting
            if not worker.stalled:
                if worker.unacked:
                    yield self._overdue_at(worker)
            elif not worker.unacked:
                yield worker.retry
            elif worker.unread:
                yield now + self.patience

    def _overdue_at(self, worker: Worker) -> float:
        patience = AHEAD_PATIENCE if worker.narrow else self.patience
        return worker.progress + max(patience, _PACES * self._pace)

    def _replaceable(self, late: Worker, held: Mapping[int, Connection]) -> bool:
        """Whether another ready worker listens where one of those that this worker holds came from."""
        keys = {connection.listener for connection in held.values()} & self._handles.keys()
        handles = [handle for key in keys if not (handle := self._handles[key]).sticky]
        return any(other is not late and other.ready for handle in handles for other in handle.workers.values())
