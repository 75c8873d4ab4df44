"""The master's hot path: accept, distribute, hand off; and what the workers answer.

The hot descriptors (listeners, parked connections, connection channels) are in an epoll of their own, which is itself
one descriptor in the master's event loop.  All decisions are the distributor's.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from .. import faults
from ..channel.board import UNTOUCHED, Board
from ..channel.connection import MAX_BATCH, MasterEnd
from ..core.bequest import Bequest, bequeath, inherit
from ..core.connection import Connection, State
from ..core.distributor import Distributor
from ..core.handover import HandedConnection, Waits
from ..core.records import KEPT, pack_offer, unpack_answers
from ..core.worker import EXPENSIVE, Worker
from ..errors import ProtocolError
from .acceptor import Acceptor
from .answers import BAD_GATEWAY, GATEWAY_TIMEOUT, UNAVAILABLE, answer
from .fate import Fate, fate_of
from .listeners import Listener
from .lookout import Lookout
from .parked import Parked
from .sockets import hang_up
from .starvation import Starvation

if TYPE_CHECKING:
    from .introductions import Introductions

#: A look that comes so late (seconds) shows that the whole machine had no time for us: nor had it for the workers.
_OVERSLEPT: Final = 0.005


class Dispatcher:
    """Owns the accepted descriptors and the epoll; borrows listeners and channels.

    `on_fault(worker id, error)` is told of a worker that breaks the protocol, `on_idle()` when the queue has run empty.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        distributor: Distributor,
        max_pending: int,
        on_fault: Callable[[int, ProtocolError], None],
        on_idle: Callable[[], None],
        introductions: Introductions | None = None,
    ) -> None:
        self._loop = loop
        self.distributor = distributor
        self._on_fault = on_fault
        self._on_idle = on_idle
        self._epoll = select.epoll()
        self._parked = Parked(self._epoll, distributor, introductions)
        max_pending = 1 << 30 if faults.on("endless-queue") else max_pending
        self._acceptor = Acceptor(loop, self._epoll, distributor, self._parked, max_pending, self._look_around)
        self._channels: dict[int, tuple[Worker, MasterEnd]] = {}
        self._ends: dict[int, MasterEnd] = {}
        self._threaded: list[tuple[Worker, Board]] = []
        self._pids: dict[int, int] = {}
        self._starvation = Starvation()
        self._lookout = Lookout(loop, distributor, self._read_answers, self._starves, self._close, self._distribute)
        #: Called with each answer of ours before it is sent, and how long it was waited for a worker in vain (seconds;
        #: None: a worker has read the request).
        self.on_answer: Callable[[Connection, bytes, float | None], None] = lambda connection, response, waited: None
        self._retiring = self._final = False
        # Who gets what no worker has, of which listeners: another master.
        self._heir: Callable[[list[Bequest]], None] = lambda bequests: None
        self._bequeathed: frozenset[int] = frozenset()
        # uvloop's handle for a time that is not ahead does not know its time, so it is kept beside.
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._lingering: set[Callable[[], None]] = set()
        loop.add_reader(self._epoll.fileno(), self._poll)

    # -- the hot path ---------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        now = self._loop.time()
        for fd, event in self._epoll.poll(0, 256):
            channel = self._channels.get(fd)
            if channel is not None:
                self._answers(channel[0], channel[1], now)
            elif fd in self._acceptor.listeners:
                self._acceptor.accept(fd, now)
            else:
                self._parked.woken(fd, event, now)
        self._distribute(now)

    def _distribute(self, now: float) -> None:
        for worker, board in self._threaded:
            # As late as this: a thread that becomes free is told of only if all were occupied.
            self.distributor.occupied(worker, board.counters[2], board.counters[3])
        offers = self.distributor.distribute(now)
        if len(offers) == 1:
            worker, connection = offers[0]
            self._offer(worker, (connection,), now)
        elif offers:
            batches: dict[int, list[Connection]] = {}
            for worker, connection in offers:
                # What it has read in one message cannot be recalled.
                if worker.held > EXPENSIVE:
                    self._offer(worker, (connection,), now)
                    continue
                batch = batches.setdefault(worker.id, [])
                batch.append(connection)
                if len(batch) == MAX_BATCH:
                    del batches[worker.id]
                    self._offer(worker, batch, now)
            for id, batch in batches.items():
                self._offer(self.distributor.workers[id], batch, now)
        self._after(now)

    def _offer(self, worker: Worker, connections: Sequence[Connection], now: float) -> None:
        board, records = self._lookout.board(worker.id), []
        # The loop's clock counts milliseconds, and the worker knows none of it.
        shift = monotonic() - now
        for c in connections:
            if c.fd < board.places:
                board.marks[c.fd] = UNTOUCHED
            since = int((shift + c.since) * 1e6)
            offer = pack_offer(c.id, c.listener, since, c.family, c.client, c.port, c.fd, c.server, c.server_port)
            records.append(offer)
        if not self._ends[worker.id].offer(records, array.array("i", [c.fd for c in connections])):
            self._close(self.distributor.undelivered(worker, [c.id for c in connections], now))
            # Another may be ready for them.
            self._wake(now)

    def _answers(self, worker: Worker, end: MasterEnd, now: float) -> bool:
        data = end.answers()
        if not data:
            return False
        answer = self.distributor.answer
        try:
            for _, kind, _, held, handle, id in unpack_answers(data):
                connection = answer(worker, kind, id, held, now, handle)
                if connection is None:
                    if kind & KEPT:
                        self._lookout.start()
                elif connection.state is State.PARKED:
                    self._parked.park(connection)
                    if self._retiring:
                        self._end_idle(now)
                else:
                    hang_up(connection)
        except ProtocolError as exc:
            self._on_fault(worker.id, exc)
            return False
        return True

    def _read_answers(self, worker: Worker, end: MasterEnd, now: float) -> None:
        while self._answers(worker, end, now):
            pass

    # -- around it ------------------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        self._after(self._loop.time())

    def _after(self, now: float) -> None:
        """What follows from how full the queue is, and when to look again."""
        self._hand_on(now)
        self._acceptor.balance()
        queued = self.distributor.queued
        if queued and self._final:
            # What its worker had not touched when it died, or has refused.
            self._turn_away(self.distributor.given_up())
            queued = 0
        if not queued:
            self._on_idle()
        if self._timer is None or self._due > now + self.distributor.lateness.patience:
            # A look that is due within that time is soon enough for what has just begun.
            wake = self.distributor.wake_at(now)
            if wake is not None:
                self._wake(max(wake, now + 0.001))

    def _wake(self, when: float) -> None:
        """Look again at `when`, or sooner if that is set already."""
        if self._timer is not None:
            if self._due <= when:
                return
            self._timer.cancel()
        self._timer, self._due = self._loop.call_at(when, self._tick), when

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        overslept = now - self._due > _OVERSLEPT
        starving = {id for id in self.distributor.lateness.late(now) if overslept or self._starves(id, now)}
        for worker in self.distributor.lateness.overdue(now, starving):
            self._recall(worker, self._ends[worker.id])
        self._parked.end_idle(self.distributor.parking.expired(now), now)
        self._turn_away(self.distributor.waited_too_long(now))
        self._distribute(now)

    def _starves(self, worker: int, now: float) -> bool:
        pid = self._pids.get(worker)
        return pid is not None and self._starvation.starves(pid, now)

    def _recall(self, worker: Worker, end: MasterEnd) -> None:
        try:
            self._close(self.distributor.recalled(worker, end.recall()))
        except ProtocolError as exc:
            # What came back stays in its name: its death will show that nobody has touched it.
            self._on_fault(worker.id, exc)

    def _turn_away(self, connections: Sequence[Connection]) -> None:
        """They have waited for a worker for too long, or in vain."""
        for connection in connections:
            handle = self.distributor.handles.get(connection.listener)
            if handle is not None and handle.client_speaks_first:
                waited = max(0.0, self._loop.time() - connection.since)
                self._answer(connection, UNAVAILABLE if handle.plain_http else b"", waited)
            else:
                hang_up(connection)

    def _answer(self, connection: Connection, response: bytes, waited: float | None) -> None:
        if response:
            self.on_answer(connection, response, waited)
        answer(self._loop, connection.fd, response, self._lingering)

    def _close(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            hang_up(connection)

    # -- listeners and workers ------------------------------------------------------------------------------------

    def add_listener(self, listener: Listener, *, client_speaks_first: bool) -> None:
        """As `Acceptor.add`."""
        self._acceptor.add(listener, client_speaks_first=client_speaks_first)

    def remove_listener(self, listener: Listener) -> None:
        """As `Acceptor.remove`."""
        self._acceptor.remove(listener)

    def accept_rest(self) -> None:
        """As `Acceptor.accept_rest`."""
        now = self._loop.time()
        self._acceptor.accept_rest(now)
        self._distribute(now)

    def end_idle(self) -> None:
        """The cluster stops: close every parked connection whose client has not asked for more, now and from now on."""
        self._retiring = True
        now = self._loop.time()
        self._end_idle(now)
        self._distribute(now)

    def _end_idle(self, now: float) -> None:
        self._hand_on(now)
        # What they have asked is in the queue then, which must not look empty before the epoll tells of it.
        self._parked.end_all(now)

    def expect_no_workers(self) -> None:
        """All workers are told to go, and none will come: who waits, or comes to wait, hears so."""
        self._final = True
        self._after(self._loop.time())

    # -- from one master to the next ------------------------------------------------------------------------------

    def hold(self) -> None:
        """Accept nothing before `release`."""
        self._acceptor.hold()

    def release(self) -> None:
        """Accept from now on."""
        self._acceptor.release()
        self._look_around()

    def bequeath(self, listeners: Iterable[int], heir: Callable[[list[Bequest]], None]) -> None:
        """What no worker has of these listeners is the heir's, now and whenever a worker gives something back.

        It gets the descriptors too.
        """
        self._bequeathed, self._heir = frozenset(listeners), heir
        self._hand_on(self._loop.time())

    def disinherit(self) -> None:
        """There is no heir any more, and nobody who could serve them: turn away who waits, and close the others."""
        self._heir = self._refuse

    def _refuse(self, bequests: list[Bequest]) -> None:
        self._turn_away([each for each, waits, _ in bequests if waits is Waits.WORKER])
        self._close([each for each, waits, _ in bequests if waits is not Waits.WORKER])

    def _hand_on(self, now: float) -> None:
        if self._bequeathed and (bequests := bequeath(self.distributor, self._bequeathed, now)):
            for connection, waits, _ in bequests:
                if waits is not Waits.WORKER:
                    self._parked.leave(connection)
            self._heir(bequests)

    def inherit(self, fd: int, handed: HandedConnection, key: int) -> None:
        """Go on with a connection of another master's, which was handed over, for the listener `key`.  Takes `fd`."""
        now = self._loop.time()
        if key not in self.distributor.handles:
            os.close(fd)
            return
        connection = Connection(self._acceptor.next_id(), fd, key, handed.client, handed.port, handed.family)
        connection.server, connection.server_port = handed.server, handed.server_port
        inherit(self.distributor, connection, handed.waits, handed.since, now)
        if (handed.unknown and self._parked.get_to_know(connection, now)) or handed.waits is Waits.WORKER:
            self._distribute(now)
        else:
            self._parked.park(connection)
            self._after(now)

    def add_worker(
        self,
        worker: int,
        slot: int,
        end: MasterEnd,
        board: Board,
        kept: select.epoll,
        pid: int | None = None,
        capacity: int | None = None,
    ) -> None:
        """A worker exists.  Owns `end`, `board` and `kept` from now on.  `pid`: its process, to ask why it is late.
        Raises OSError if the kernel cannot tell of it; then it is not there, and nothing of it is taken.

        `capacity`: the most connections it may have.
        """
        # First: it is what can fail.
        self._epoll.register(end.fileno(), select.EPOLLIN)
        if pid is not None:
            self._pids[worker] = pid
        self._ends[worker] = end
        record = self.distributor.add_worker(worker, slot, capacity)
        self._channels[end.fileno()] = (record, end)
        self._lookout.add(record, end, board, kept)

    def attach(self, worker: int, key: int) -> None:
        """The worker's server on listener `key` is in place."""
        board, record = self._lookout.board(worker), self.distributor.workers[worker]
        # It has written that before it listens.
        if board.counters[3] and (record, board) not in self._threaded:
            self._threaded.append((record, board))
        self.distributor.attach(worker, key)
        self._distribute(self._loop.time())

    def remove_worker(self, worker: int, *, hung: bool = False) -> None:
        """The worker is dead: what it said last counts, what it had not touched goes to others, the rest is ended.

        `hung`: it was killed for taking too long, which is what its clients are told.
        """
        now = self._loop.time()
        end = self._ends.pop(worker)
        self._starvation.forget(self._pids.pop(worker, 0))
        record, _ = self._channels.pop(end.fileno())
        self._threaded = [(each, board) for each, board in self._threaded if each is not record]
        self._read_answers(record, end, now)
        loses = faults.on("lost-offers")
        if not loses:
            self._recall(record, end)
        board = self._lookout.board(worker)
        untouched = []
        for connection in self.distributor.remove_worker(worker):
            fate = fate_of(connection.fd, board.mark(connection.fd))
            if fate is Fate.UNTOUCHED and not loses:
                untouched.append(connection)
                continue
            if fate is Fate.IDLE and self.distributor.idle(connection, now):
                self._parked.park(connection)
                continue
            if connection.state is not State.GONE:
                self.distributor.gone(connection)
            handle = self.distributor.handles.get(connection.listener)
            # A response that was begun cannot be mended, and a protocol that is not ours has no 502: what it was sent
            # is for the client to read all the same, so that is no reset either.
            read = fate is Fate.READ and handle is not None and handle.plain_http
            told = GATEWAY_TIMEOUT if hung else BAD_GATEWAY
            self._answer(connection, told if read else b"", None)
        self._close(self.distributor.requeue(untouched))
        self._lookout.remove(worker)
        self._epoll.unregister(end.fileno())
        end.close()
        if self._retiring:
            self._end_idle(now)
        self._distribute(now)

    def resize(self, slots: int) -> None:
        """The cluster has `slots` slots from now on."""
        self.distributor.resize(slots)
        self._distribute(self._loop.time())

    def forget(self, key: int) -> None:
        """The listener is gone for good: close what still waits for it."""
        left = self.distributor.remove_handle(key)
        for connection in left:
            self._parked.leave(connection)
        self._close(left)

    def close(self) -> None:
        """Let go of everything; workers must have been removed."""
        self._loop.remove_reader(self._epoll.fileno())
        self._lookout.close()
        self._starvation.close()
        self._acceptor.close()
        if self._timer is not None:
            self._timer.cancel()
        for key in tuple(self.distributor.handles):
            self.forget(key)
        for end in tuple(self._lingering):
            end()
        self._epoll.close()
