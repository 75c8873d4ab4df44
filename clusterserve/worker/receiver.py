"""The worker's end of the hot path: offers in, turns of the loop, answers out at the end of each.

Reading one message at a time is what makes recall work: whatever holds the loop, the offers behind it still lie in the
socket, where the master can take them back.  The acknowledgement goes out when the loop has turned once after the first
bytes were processed (`_turned` runs behind the tasks they created), so a handler that holds the loop acknowledges when
it has finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

from .. import faults
from ..channel.board import IDLE, READING, UNTOUCHED, Board
from ..channel.connection import WorkerEnd
from ..core.records import (
    ACK,
    CLOSED,
    FREE,
    FULL,
    IPV4,
    IPV6,
    PROXIED,
    REFUSED,
    RETURNED,
    SILENT,
    TAKEN,
    Flag,
    unpack_offers,
)
from ..errors import ProtocolError
from .answers import Answers
from .keeping import Keeping
from .lazy import CHUNK, LazyTransport
from .stopwatch import Stopwatch
from .transport import HandedTransport, Told
from .watch import Watch

if TYPE_CHECKING:
    from .server import Entrance

_LOST: Final = int(Flag.LOST)

#: How often idle connections are looked for, and how long one stays at least (seconds).
IDLE_LOOK: Final = 0.5

#: How often heads are looked at in the time one may take.
HEAD_LOOKS: Final = 4


def _told(family: int, address: bytes, port: int) -> tuple[str, int]:
    """An address of a PROXY header."""
    if family == PROXIED | IPV4:
        return Told((socket.inet_ntop(socket.AF_INET, address[12:]), port))
    return Told((socket.inet_ntop(socket.AF_INET6, address), port) if family == PROXIED | IPV6 else ())


class Receiver:
    """Takes offers for the faux servers in `servers` and answers for every connection.

    Owns `end` and `board`.  `on_lost` is called when the master has closed the channel, or speaks another version.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, end: WorkerEnd, board: Board, on_lost: Callable[[], None]
    ) -> None:
        self.loop = loop
        self.servers: dict[int, Entrance] = {}
        #: Connections that outlive their first turn, for `cut`.
        self.kept: dict[int, LazyTransport] = {}
        self.answers = Answers(loop, end)
        #: What the master sees without a message: see `channel.board`.
        self.marks = board.marks
        self.counters = board.counters
        #: Where HTTP connections wait; None for servers that are not HTTP (`borrow`).
        self.watch: Watch | None = None
        #: Whether connections stay between two requests, and whether the next one has a thread.
        self.keeping = Keeping(board.counters, self._thread_is_free)
        #: Of the connections that are kept, how many have a request in progress.
        self.running = self._shown = 0
        #: Whether somebody wants to know how long connections have waited for this worker.
        self.timed = False
        self._board = board
        self._end = end
        self._refuses = not faults.on("lost-refusals")
        self._on_lost = on_lost
        # How many requests have held the loop for as long as the stopwatch says, and how many the batch being read has.
        self._stopwatch = Stopwatch()
        self._requests = self._batch = 0
        # Of this turn: the lazy transports to settle.
        self._lazy: list[LazyTransport] = []
        self._open = self._weighed = False
        self._turning = False
        self._later_batch = self._postponed = False
        # Those whose TLS handshake is not done.
        self._handshakes: set[int] = set()
        self._shaken: asyncio.Event | None = None
        self._on_idle: Callable[[], None] | None = None
        loop.add_reader(end.fileno(), self._readable)

    def borrow(
        self, kept: select.epoll | None, *, keep: bool, head_timeout: float, capacity: int | None = None
    ) -> None:
        """HTTP connections wait in a watch of ours from now on, and are given back after a request.

        With `keep` only if that is worth it; without `kept`, the epoll shared with the master, only when this worker
        leaves.  A request's head may take `head_timeout` seconds (0: for ever).  Owns `kept`.
        Of the `capacity` connections that it may have, half at most are idle.
        """
        self.watch = Watch(self.loop, kept, self)
        self.keeping.start(self.watch, keep=keep, capacity=capacity)
        if self.keeping.possible:
            self.loop.call_later(IDLE_LOOK, self._look_for_idle)
        if head_timeout:
            self.loop.call_later(head_timeout / HEAD_LOOKS, self._look_at_heads, head_timeout / HEAD_LOOKS)

    def _thread_is_free(self) -> None:
        self.answers.say(0, FREE)

    def _look_at_heads(self, pause: float) -> None:
        for transport in tuple(self.kept.values()):
            look = getattr(transport.get_protocol(), "look_at_head", None)
            if look is not None:
                look()
        self.loop.call_later(pause, self._look_at_heads, pause)

    def stop_keeping(self, *, last: bool = False) -> None:
        """Give every connection back as soon as it is idle, those that are kept for the next request now.

        Those that nobody could take back belong to their protocols, which `shutdown` tells.  `last`: nobody is left to
        serve what has been asked on them, so that is served here.
        """
        if last:
            self.keeping.take_all()
            if self.watch is not None:
                self.watch.claim_all()
        self.keeping.stop()
        for transport in tuple(self.kept.values()):
            transport.give_back_if_kept()

    async def handshakes_done(self, within: float) -> None:
        """Returns when every TLS handshake is over that has begun, or after so many seconds."""
        if self._handshakes and within > 0:
            self._shaken = asyncio.Event()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._shaken.wait(), within)

    def _shook(self, id: int) -> None:
        self._handshakes.discard(id)
        if self._shaken is not None and not self._handshakes:
            self._shaken.set()

    def _look_for_idle(self) -> None:
        for transport in tuple(self.kept.values()):
            transport.grow_old()
        if self.keeping.possible:
            self.loop.call_later(IDLE_LOOK, self._look_for_idle)

    # -- offers in ------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        # One message: the master puts the more connections into it the longer we take.
        self._receive()

    def _receive(self) -> bool:
        """One message; False if there was none."""
        message = self._end.offers()
        if message is None:
            return False
        data, fds = message
        try:
            offers = unpack_offers(data)
        except ProtocolError:
            # Empty: the end.
            self.loop.remove_reader(self._end.fileno())
            for fd in fds:
                os.close(fd)
            self._on_lost()
            return False
        self.begin_turn(weighed=True)
        arrived, number = len(fds), -1
        for _, family, flag, key, id, queued, port, server_port, client, local, place in offers:
            if flag:
                self._noted(flag, id)
                continue
            number += 1
            server = self.servers.get(key)
            if server is None or number >= arrived:
                # No such server (any more), or the descriptor was lost at our limit: somebody else's, please.
                if self._refuses:
                    self.answers.fresh[id] = REFUSED
                if number < arrived:
                    os.close(fds[number])
                continue
            peername, sockname = None, server.sockname
            if family == IPV4:
                peername = (socket.inet_ntop(socket.AF_INET, client[12:]), port)
            elif family == IPV6:
                peername = (socket.inet_ntop(socket.AF_INET6, client), port)
            elif family:
                peername = _told(family, client, port)
                if any(local):
                    sockname = _told(family, local, server_port)
            self._take(server, id, fds[number], peername, sockname, min(place, self._board.places), queued)
            self._batch += 1
        self.end_batch()
        return True

    def _noted(self, flag: int, id: int) -> None:
        """News of a connection that this worker keeps, or has kept."""
        transport = self.kept.get(id)
        if flag != _LOST:
            if transport is not None:
                transport.arm_kept()
            return
        # What was said of it before the news goes first: the master hears nothing of it until it hears DROPPED.
        self.answers.flush()
        if transport is None:
            self.answers.dropped(id)
        else:
            transport.lost()

    def _take(
        self,
        server: Entrance,
        id: int,
        fd: int,
        peername: tuple[str, int] | None,
        sockname: tuple[str, int] | str | None,
        place: int,
        queued: int,
    ) -> None:
        os.set_blocking(fd, False)
        data: bytes | None = None
        watch = None
        if server.client_speaks_first:
            if self.keeping.crowds and not self.keeping.has_room():
                os.close(fd)
                self.answers.fresh[id] = FULL
                return
            watch = self.watch
            self.answers.fresh[id] = ACK
            # Before it is read: whoever died in between has read it for all the master knows.
            self.marks[place] = READING
            try:
                # What a TLS client says is the loop's transport's to read.
                data = _peek(fd) if server.ssl else os.read(fd, CHUNK)
            except BlockingIOError:
                pass
            except OSError:
                data = b""
            if data is None and watch is not None:
                # Nobody has said a word yet: the master can wait for that without costing a worker anything.
                self.marks[place] = UNTOUCHED
                os.close(fd)
                self.answers.fresh[id] = ACK | SILENT
                return
            if data == b"":
                # It left before it said anything: no protocol needs to hear of it.  Nor does it need to hear of us,
                # should this worker die before that is told: it has asked nothing that is owed a 502.
                self.marks[place] = IDLE
                os.close(fd)
                self.answers.fresh[id] = ACK | CLOSED
                return
            if server.ssl:
                data = None
        elif server.most is not None and len(self.kept) >= server.most:
            server.drops += 1
            os.close(fd)
            self.answers.fresh[id] = ACK | CLOSED
            return
        elif server.ssl:
            # A client that dribbles its handshake must not hold the acknowledgement.
            self.answers.fresh[id] = ACK
        else:
            self.answers.making.add(id)
        try:
            transport = HandedTransport(self, id, fd, server.protocol_factory(), peername, sockname, place, watch)
        except Exception as exc:  # noqa: BLE001 - the user's factory; as a loop does, and this client alone pays
            self.fault(exc, "protocol factory")
            os.close(fd)
            self.answers.making.discard(id)
            self.answers.fresh[id] = ACK | CLOSED
            return
        if self.timed:
            transport.handed_over(queued, monotonic(), self.counters[0])
        if data is None:
            if server.ssl:
                self._handshakes.add(id)
            transport.become_real(**server.ssl)
            return
        self._lazy.append(transport)
        try:
            transport.begin(data)
        except Exception as exc:  # noqa: BLE001 - the user's protocol; as a loop's transport does
            self.fault(exc, "protocol")
            transport.abort()

    def fault(self, exc: Exception, where: str) -> None:
        """What the user's code raised is the loop's exception handler's to report."""
        message = f"the server's {where} raised"
        self.loop.call_exception_handler({"message": message, "exception": exc})

    def drain(self) -> None:
        """Take everything that was offered: the master sends no more, and nothing must be left behind."""
        while self._receive():
            pass

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` when no connection is left, soon or now, and whenever that is so again."""
        self._on_idle = callback
        # Behind the end of this turn, in which those that were just read are kept or ended.
        self.loop.call_soon(self.loop.call_soon, lambda: None if self.kept else callback())

    # -- turns ----------------------------------------------------------------------------------------------------

    def begin_turn(self, requests: int = 0, *, weighed: bool = False) -> None:
        """A batch was read, or is about to be; so many requests, of those that are kept, begin with it.

        `weighed`: it matters how long this batch holds the loop.
        """
        if not self._open:
            self._open = True
            self.counters[0] = (self.counters[0] + 1) & 0xFFFFFFFF
        if weighed:
            self._weighed = True
            self._batch = requests
            # In front of the tasks that are about to be created: what else the loop has to run is nobody's cost.
            self._stopwatch.start()
            self.loop.call_soon(self._stopwatch.start)

    def end_batch(self) -> None:
        """All of it was given to its protocols: the turn ends behind the tasks that these have created."""
        if self._weighed:
            self._stopwatch.stop()
        # Before any of them can hold the loop.
        self.show_running()
        if not self._turning:
            self._turning = True
            self._requests += self._batch
            self.loop.call_soon(self._turned)
        else:
            # It would end in front of them.
            self._later_batch = True
            if self._weighed:
                self.loop.call_soon(self._batch_done, self._batch)
        self._weighed = False
        self._batch = 0

    def show_running(self) -> None:
        """On the board."""
        if self.running != self._shown:
            self._shown = self.counters[1] = self.running

    def _batch_done(self, requests: int) -> None:
        self._stopwatch.stop()
        self._requests += requests

    def settle_later(self, transport: LazyTransport) -> None:
        """Something has happened to a transport that waits in the watch; settle it when this turn ends."""
        self._lazy.append(transport)
        # In the midst of a batch its end will see to it.
        if not self._open:
            self.begin_turn()
            self.end_batch()

    def _turned(self) -> None:
        """The loop has turned: settle the lazy transports, acknowledge everything of this turn."""
        self._stopwatch.stop()
        if self._later_batch and not self._postponed:
            # Once: what is read in every turn of the loop must not keep this one from ending.
            self._postponed, self._later_batch = True, False
            self.loop.call_soon(self._turned)
            return
        self._open = self._turning = self._postponed = self._later_batch = False
        lazy, self._lazy = self._lazy, []
        held, requests = self._stopwatch.spent, self._requests
        self.keeping.turned(held, requests)
        if requests:
            self._stopwatch.spent, self._requests = 0.0, 0
        for transport in lazy:
            transport.settle()
        self.show_running()
        if self.answers.fresh or self.answers.soon:
            self.answers.turned(int(held / requests * 1e6) if requests else 0)
        self.counters[0] = (self.counters[0] + 1) & 0xFFFFFFFF

    # -- what becomes of them -------------------------------------------------------------------------------------

    def made(self, id: int) -> None:
        """A connection has its protocol."""
        self._shook(id)
        self.answers.made(id)

    def ended(self, id: int, *, returned: bool = False) -> None:
        """Our descriptor of a connection is closed: the connection is over, or `returned` to the master."""
        self.kept.pop(id, None)
        self._shook(id)
        if self._on_idle is not None and not self.kept:
            self._on_idle()
        self.answers.ended(id, RETURNED if returned else CLOSED)

    def taken(self, id: int) -> None:
        """A connection is ours alone from now on: it is HTTP no more, and nobody else can do anything for it."""
        self.answers.add(id, TAKEN)

    def dropped(self, id: int) -> None:
        """Our copy of a connection that the master has taken back is closed."""
        self.kept.pop(id, None)
        self.answers.dropped(id)

    def abandon(self) -> None:
        """The loop is about to be closed, its servers are: refuse what was offered, and be done with what it holds.

        The channel and the board stay open, for the receiver of the next loop.
        """
        self.drain()
        if self._open:
            self._turned()
        for id, transport in tuple(self.kept.items()):
            transport.abort()
            self.ended(id)
        self.answers.flush()
        self.loop.remove_reader(self._end.fileno())
        self.answers.close()

    # -- the ones that stay ---------------------------------------------------------------------------------------

    def keep(self, id: int, transport: LazyTransport) -> None:
        """A transport goes beyond its first turn."""
        self.kept[id] = transport

    def cut(self) -> None:
        """Abort every connection that is still open."""
        for transport in (*self._lazy, *self.kept.values()):
            transport.cut()

    def close(self) -> None:
        """Stop reading and close the channel; connections go on."""
        self.loop.remove_reader(self._end.fileno())
        self.answers.close()
        self._end.close()
        if self.watch is not None:
            self.watch.close()
        self._board.close()


def _peek(fd: int) -> bytes:
    """What can be read, left where it is: a byte of it, nothing at its end; raises BlockingIOError if nothing can."""
    sock = socket.socket(fileno=fd)
    try:
        return sock.recv(1, socket.MSG_PEEK)
    finally:
        sock.detach()
