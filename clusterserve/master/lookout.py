"""Takes requests back that lie behind a worker that holds its loop: the shell around `Distributor.looked`.

As long as any worker keeps connections between requests, the boards are looked at: every millisecond if workers hold
their loops now and then, every four if they never do.  A request is
taken back by claiming its connection's entry in the worker's kept epoll: the entries are one-shot, so the kernel gives
each to one of us.  An entry is known by the worker's descriptor, whose number may be used again at any time, so the
worker's answers are read before claiming and after: a number that means another connection then is not touched, only
armed again.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..channel.board import Board
from ..channel.connection import MasterEnd
from ..core.connection import Connection
from ..core.distributor import Distributor
from ..core.records import Flag
from ..core.worker import Worker

#: Between two looks (seconds): as long as some worker was found stuck within the last `ALERT`, and otherwise.
LOOK: Final = 0.001
CALM_LOOK: Final = 0.004
ALERT: Final = 2.0

#: How long it is believed that a worker waits for a processor, or does not (seconds): asking is a read of /proc.
BELIEF: Final = 0.005


@dataclass
class Post:
    """Where a worker can be looked at."""

    worker: Worker
    end: MasterEnd
    board: Board
    kept: select.epoll
    starves: bool = False
    asked: float = 0.0

    def __post_init__(self) -> None:
        self.counters = self.board.counters
        #: The descriptor of `kept`.
        self.number = self.kept.fileno()


class Lookout:
    """Looks, claims, and tells the workers.  Owns what is in its posts but their `end`.

    `read_answers(worker, end, now)` reads all that the worker has said; `starves(worker id, now)` whether it waits for
    a processor; `release(connections)` closes those that nobody can have; `distribute(now)` follows each look that
    changed something.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        distributor: Distributor,
        read_answers: Callable[[Worker, MasterEnd, float], None],
        starves: Callable[[int, float], bool],
        release: Callable[[list[Connection]], None],
        distribute: Callable[[float], None],
    ) -> None:
        self._loop = loop
        self._distributor = distributor
        self._read_answers = read_answers
        self._starves = starves
        self._release = release
        self._distribute = distribute
        self._posts: dict[int, Post] = {}
        self._poll = select.poll()
        self._timer: asyncio.TimerHandle | None = None
        self._alert_until = 0.0
        # At the last look.
        self._stuck: list[Worker] = []

    def add(self, worker: Worker, end: MasterEnd, board: Board, kept: select.epoll) -> None:
        """Look at this worker too."""
        self._posts[worker.id] = Post(worker, end, board, kept)
        self._poll.register(kept.fileno(), select.POLLIN)

    def board(self, worker: int) -> Board:
        """The worker's board."""
        return self._posts[worker].board

    def remove(self, worker: int) -> None:
        """The worker is dead: close its board and its epoll."""
        post = self._posts.pop(worker)
        self._poll.unregister(post.kept.fileno())
        post.kept.close()
        post.board.close()

    def start(self) -> None:
        """A worker keeps something: look from now on, until nobody does."""
        if self._timer is None:
            self._distributor.lateness.overlook()
            self._timer = self._loop.call_later(CALM_LOOK, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        # A thousand times a second, for every worker: what is not needed for those that move is left for the others.
        now = self._loop.time()
        lateness, posts = self._distributor.lateness, self._posts
        unclaimed = {fd for fd, _ in self._poll.poll(0)}
        boards = [
            (post.worker, post.counters[0], post.number in unclaimed, post.counters[1]) for post in posts.values()
        ]
        stuck = [worker for worker in lateness.looked(boards) if not self._waits_for_a_processor(worker, now)]
        late = lateness.late_with_kept(stuck) if stuck else stuck
        for worker in late:
            self._take_back(posts[worker.id], now)
        if stuck:
            self._alert_until = now + ALERT
        if late or stuck != self._stuck:
            self._stuck = stuck
            self._distribute(now)
        owing = False
        for post in posts.values():
            if post.end.owed:
                owing = not post.end.remind() or owing
        # Who cannot be told of its losses yet holds copies of connections that are others' by now.
        if owing or lateness.watched:
            self._timer = self._loop.call_later(LOOK if now < self._alert_until else CALM_LOOK, self._look)
        else:
            self._timer = None

    def _waits_for_a_processor(self, worker: Worker, now: float) -> bool:
        """One that only waits for its turn to run is not stuck."""
        post = self._posts[worker.id]
        if now - post.asked >= BELIEF:
            post.asked = now
            post.starves = self._starves(worker.id, now)
        worker.stuck = not post.starves
        return post.starves

    def _take_back(self, post: Post, now: float) -> None:
        worker = post.worker
        self._read_answers(worker, post.end, now)
        claimed = [fd for fd, _ in post.kept.poll(0)]
        known = [worker.kept.get(fd) for fd in claimed]
        self._read_answers(worker, post.end, now)
        lost: list[Connection] = []
        moved: list[Connection] = []
        for fd, connection in zip(claimed, known, strict=True):
            current = worker.kept.get(fd)
            if current is None:
                # Given back or closed meanwhile: what we have claimed was its entry, which is gone.
                continue
            (lost if current is connection else moved).append(current)
        if lost:
            self._release(self._distributor.taken_back(worker, lost, now))
            post.end.note(Flag.LOST, [connection.id for connection in lost])
        if moved:
            post.end.note(Flag.REARM, [connection.id for connection in moved])
