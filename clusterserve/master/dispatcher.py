"""The master's hot path: accept, distribute, hand off; and what the workers answer.

The hot descriptors (listeners, parked connections, connection channels) are in an epoll of their own, which is itself
one descriptor in the master's event loop.  All decisions are the distributor's.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
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
from ..core.records import IPV4, IPV6, KEPT, NO_ADDRESS, pack_offer, unpack_answers
from ..core.worker import EXPENSIVE, Worker
from ..errors import ProtocolError
from .answers import BAD_GATEWAY, GATEWAY_TIMEOUT, UNAVAILABLE, answer
from .fate import Fate, fate_of
from .listeners import Listener
from .lookout import Lookout
from .starvation import Starvation

if TYPE_CHECKING:
    from .introductions import Introductions

logger = logging.getLogger("clusterserve.dispatch")

#: Connections accepted from one listener before the others get their turn.
_ACCEPTS: Final = 64

#: Out of descriptors or memory: accept nothing for this long (seconds).
_EXHAUSTED_PAUSE: Final = 0.1
#: Said no more often than this (seconds).
_COMPLAINT_PAUSE: Final = 10.0
#: A look that comes so late (seconds) shows that the whole machine had no time for us: nor had it for the workers.
_OVERSLEPT: Final = 0.005
#: So many idle connections are closed at a time to make room for new ones.
_SHED: Final = 16
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
_PARKED: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
#: Told of each arrival, and not again and again of what was there and is not enough.
_UNKNOWN: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


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
        self._max_pending = 1 << 30 if faults.on("endless-queue") else max_pending
        self._on_fault = on_fault
        self._on_idle = on_idle
        self._introductions = introductions
        self._epoll = select.epoll()
        self._listeners: dict[int, Listener] = {}
        self._parks: dict[int, bool] = {}
        self._channels: dict[int, tuple[Worker, MasterEnd]] = {}
        self._ends: dict[int, MasterEnd] = {}
        self._threaded: list[tuple[Worker, Board]] = []
        self._parked: dict[int, Connection] = {}
        self._pids: dict[int, int] = {}
        self._starvation = Starvation()
        self._lookout = Lookout(loop, distributor, self._read_answers, self._starves, self._close, self._distribute)
        #: Called with each answer of ours before it is sent, and how long it was waited for a worker in vain (seconds;
        #: None: a worker has read the request).
        self.on_answer: Callable[[Connection, bytes, float | None], None] = lambda connection, response, waited: None
        self._ids = 0
        self._accepting = True
        self._retiring = self._final = False
        # Another master accepts what we could, until it has yielded.
        self._held = False
        # Who gets what no worker has, of which listeners: another master.
        self._heir: Callable[[list[Bequest]], None] = lambda bequests: None
        self._bequeathed: frozenset[int] = frozenset()
        self._pause: asyncio.TimerHandle | None = None
        self._complain_after = 0.0
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
            elif fd in self._listeners:
                self._accept(fd, now, min(_ACCEPTS, self._max_pending - self.distributor.queued))
            else:
                self._unpark(fd, event, now)
        self._distribute(now)

    def _accept(self, fd: int, now: float, limit: int) -> None:
        listener = self._listeners[fd]
        accept = listener.sock._accept  # type: ignore[attr-defined]  # without a socket object for each
        family, parks, distributor = listener.sock.family, self._parks[fd], self.distributor
        for _ in range(limit):
            try:
                new, address = accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._exhausted(exc)
                    return
                if exc.errno == errno.EINVAL:
                    # Whoever shares an inherited socket can shut it down for all: it would be readable for ever.
                    logger.error("Nobody listens on %s any more: it was shut down by another process", listener.address)
                    self.remove_listener(listener)
                    return
                # The client's connection is already broken, or its network is: accept(2) says to treat it as EAGAIN.
                continue
            self._ids += 1
            if family == socket.AF_INET:
                connection = Connection(
                    self._ids, new, listener.key, _MAPPED + socket.inet_aton(address[0]), address[1], IPV4, now
                )
            elif family == socket.AF_INET6:
                host = socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
                connection = Connection(self._ids, new, listener.key, host, address[1], IPV6, now)
            else:
                connection = Connection(self._ids, new, listener.key, b"", 0, NO_ADDRESS, now)
            if self._introductions is not None and self._introductions.expects(connection):
                distributor.accepted(connection, waiting=False)
                connection.unknown = True
                self._meet(self._introductions, connection)
                continue
            distributor.accepted(connection, waiting=not parks)
            if parks:
                self._park(connection)

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
                    self._park(connection)
                    if self._retiring:
                        self.end_idle()
                else:
                    _end(connection)
        except ProtocolError as exc:
            self._on_fault(worker.id, exc)
            return False
        return True

    def _read_answers(self, worker: Worker, end: MasterEnd, now: float) -> None:
        while self._answers(worker, end, now):
            pass

    # -- around it ------------------------------------------------------------------------------------------------

    def _after(self, now: float) -> None:
        """What follows from how full the queue is, and when to look again."""
        self._hand_on(now)
        queued = self.distributor.queued
        if self._pause is None and not self._held and self._accepting != (queued < self._max_pending):
            self._set_accepting(queued < self._max_pending)
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
        self._end_idle(self.distributor.parking.expired(now))
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

    def _meet(self, introductions: Introductions, connection: Connection, *, last: bool = False) -> None:
        """Learn whose it is, if its proxy has said so; `last`: it has no more time for that."""
        fd, known = connection.fd, introductions.read(connection)
        if known is False and not last:
            if fd not in self._parked:
                self._park(connection, _UNKNOWN)
            return
        connection.unknown = False
        self._leave_park(connection)
        handle = self.distributor.handles.get(connection.listener)
        if not known:
            _end(self.distributor.hung_up(connection.id))
        elif (handle is not None and not handle.client_speaks_first) or _has_data(fd):
            self.distributor.readable(connection.id)
        else:
            self._park(connection)

    def _leave_park(self, connection: Connection) -> None:
        if self._parked.pop(connection.fd, None) is not None:
            self._epoll.unregister(connection.fd)

    def _park(self, connection: Connection, events: int = _PARKED) -> None:
        try:
            self._epoll.register(connection.fd, events)
        except OSError as exc:
            # The kernel bounds how many entries a user's epolls may have in all.
            if self._may_complain():
                logger.warning(
                    "Cannot watch an idle connection, it is closed: %s (said once in %g s)",
                    exc.strerror,
                    _COMPLAINT_PAUSE,
                )
            _end(self.distributor.hung_up(connection.id))
        else:
            self._parked[connection.fd] = connection

    def _end_idle(self, connections: Sequence[Connection]) -> None:
        """Close these parked connections, but none whose client has asked for more: the epoll will tell of it."""
        for connection in connections:
            if connection.unknown and self._introductions is not None:
                # A part of its header is no question.
                self._meet(self._introductions, connection, last=True)
            if self._parked.get(connection.fd) is connection and not _has_data(connection.fd):
                del self._parked[connection.fd]
                self._epoll.unregister(connection.fd)
                _end(self.distributor.hung_up(connection.id))

    def _turn_away(self, connections: Sequence[Connection]) -> None:
        """They have waited for a worker for too long, or in vain."""
        for connection in connections:
            handle = self.distributor.handles.get(connection.listener)
            if handle is not None and handle.client_speaks_first:
                waited = max(0.0, self._loop.time() - connection.since)
                self._answer(connection, UNAVAILABLE if handle.plain_http else b"", waited)
            else:
                _end(connection)

    def _answer(self, connection: Connection, response: bytes, waited: float | None) -> None:
        if response:
            self.on_answer(connection, response, waited)
        answer(self._loop, connection.fd, response, self._lingering)

    def _unpark(self, fd: int, event: int, now: float) -> None:
        connection = self._parked.get(fd)
        if connection is None:
            # Closed by an event before it in the same batch.
            return
        if connection.unknown and self._introductions is not None:
            self._meet(self._introductions, connection, last=bool(event & ~select.EPOLLIN))
            return
        del self._parked[fd]
        # A worker gets its own copy, which would keep the entry alive behind our back.
        self._epoll.unregister(fd)
        there = _peeked(fd) if event & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP) else True
        if there is None:
            # The event was another's, whose number this one has got since the epoll was asked.
            self._park(connection)
        elif not there:
            self._close([self.distributor.hung_up(connection.id)])
        else:
            connection.since = now
            self.distributor.readable(connection.id)

    def _close(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            _end(connection)

    def _exhausted(self, exc: OSError) -> None:
        idle = self.distributor.parking.longest_idle(_SHED)
        if self._may_complain():
            what = f"closing the {len(idle)} connections idle longest" if idle else "waiting"
            logger.warning("Cannot accept: %s; %s (said once in %g s)", exc.strerror, what, _COMPLAINT_PAUSE)
        self._end_idle(idle)
        if idle or self._pause is not None:
            return
        self._set_accepting(False)
        self._pause = self._loop.call_later(_EXHAUSTED_PAUSE, self._resume)

    def _may_complain(self) -> bool:
        """Whether nothing of the kind was said for a while."""
        now = self._loop.time()
        may = now >= self._complain_after
        if may:
            self._complain_after = now + _COMPLAINT_PAUSE
        return may

    def _resume(self) -> None:
        self._pause = None
        self._after(self._loop.time())

    def _set_accepting(self, accepting: bool) -> None:
        self._accepting = accepting
        for fd in self._listeners:
            self._epoll.modify(fd, select.EPOLLIN if accepting else 0)

    # -- listeners and workers ------------------------------------------------------------------------------------

    def add_listener(self, listener: Listener, *, client_speaks_first: bool) -> None:
        """Accept from it from now on.  Clients that must speak first are parked until they do, if the kernel cannot."""
        fd = listener.sock.fileno()
        deferred = client_speaks_first and listener.defer(True)
        self._listeners[fd] = listener
        self._parks[fd] = client_speaks_first and not deferred
        self._epoll.register(fd, select.EPOLLIN if self._accepting else 0)

    def accept_rest(self) -> None:
        """Accept what the kernel has accepted: closing a listener resets the clients in its backlog."""
        if self._held:
            return
        now = self._loop.time()
        for fd, listener in tuple(self._listeners.items()):
            listener.defer(False)
            # More than `max_pending` if need be: the kernel has let them in, and the backlog bounds them.
            self._accept(fd, now, listener.backlog + 1)
        self._distribute(now)

    def end_idle(self) -> None:
        """The cluster stops: close every parked connection whose client has not asked for more, now and from now on."""
        self._retiring = True
        self._hand_on(self._loop.time())
        self._end_idle(tuple(self._parked.values()))

    def expect_no_workers(self) -> None:
        """All workers are told to go, and none will come: who waits, or comes to wait, hears so."""
        self._final = True
        self._after(self._loop.time())

    # -- from one master to the next ------------------------------------------------------------------------------

    def hold(self) -> None:
        """Accept nothing before `release`."""
        self._held = True
        self._set_accepting(False)

    def release(self) -> None:
        """Accept from now on."""
        self._held = False
        self._after(self._loop.time())

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
                if waits is not Waits.WORKER and self._parked.pop(connection.fd, None) is not None:
                    self._epoll.unregister(connection.fd)
            self._heir(bequests)

    def inherit(self, fd: int, handed: HandedConnection, key: int) -> None:
        """Go on with a connection of another master's, which was handed over, for the listener `key`.  Takes `fd`."""
        now = self._loop.time()
        if key not in self.distributor.handles:
            os.close(fd)
            return
        self._ids += 1
        connection = Connection(self._ids, fd, key, handed.client, handed.port, handed.family)
        connection.server, connection.server_port = handed.server, handed.server_port
        inherit(self.distributor, connection, handed.waits, handed.since, now)
        if handed.unknown and self._introductions is not None:
            connection.unknown = True
            self._meet(self._introductions, connection)
            self._distribute(now)
        elif handed.waits is Waits.WORKER:
            self._distribute(now)
        else:
            self._park(connection)
            self._after(now)

    def remove_listener(self, listener: Listener) -> None:
        """Accept nothing more from it; what was accepted stays.  The caller closes it."""
        fd = listener.sock.fileno()
        if self._listeners.pop(fd, None) is not None:
            del self._parks[fd]
            self._epoll.unregister(fd)

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

        `capacity`: the most connections it may have.
        """
        if pid is not None:
            self._pids[worker] = pid
        self._ends[worker] = end
        record = self.distributor.add_worker(worker, slot, capacity)
        self._channels[end.fileno()] = (record, end)
        self._lookout.add(record, end, board, kept)
        self._epoll.register(end.fileno(), select.EPOLLIN)

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
                self._park(connection)
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
            self.end_idle()
        self._distribute(now)

    def resize(self, slots: int) -> None:
        """The cluster has `slots` slots from now on."""
        self.distributor.resize(slots)
        self._distribute(self._loop.time())

    def forget(self, key: int) -> None:
        """The listener is gone for good: close what still waits for it."""
        left = self.distributor.remove_handle(key)
        for connection in left:
            self._leave_park(connection)
        self._close(left)

    def close(self) -> None:
        """Let go of everything; workers must have been removed."""
        self._loop.remove_reader(self._epoll.fileno())
        self._lookout.close()
        self._starvation.close()
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
        for key in tuple(self.distributor.handles):
            self.forget(key)
        for end in tuple(self._lingering):
            end()
        self._epoll.close()


def _end(connection: Connection) -> None:
    """Close it, though a worker that it was taken back from may still have a copy, and hold its loop for long."""
    if connection.relics:
        sock = socket.socket(fileno=connection.fd)
        # The client may be gone already.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.detach()
    os.close(connection.fd)


def _has_data(fd: int) -> bool:
    return bool(_peeked(fd))


def _peeked(fd: int) -> bool | None:
    """Whether there is something to read (True), the client has left (False), or neither (None)."""
    # Borrowed, not copied: that works at the descriptor limit too.
    sock = socket.socket(fileno=fd)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return None
    except OSError:
        return False
    finally:
        sock.detach()
