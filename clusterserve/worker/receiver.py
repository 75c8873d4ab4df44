"""The worker's end of the hot path: offers in, answers out, one message a turn of the loop.

Reading one message at a time is what makes recall work: whatever holds the loop, the offers behind it still lie in the
socket, where the master can take them back.  The acknowledgement goes out when the loop has turned once after the first
bytes were processed (`_turned` runs behind the tasks they created), so a handler that holds the loop acknowledges when
it has finished.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from resource import RUSAGE_THREAD, getrusage
from time import perf_counter
from typing import TYPE_CHECKING, Final

from ..channel.connection import MAX_ANSWERS, WorkerEnd
from ..core.records import IPV4, IPV6, Kind, pack_answer, unpack_offers
from ..errors import ProtocolError
from .transport import HandedTransport

if TYPE_CHECKING:
    from .server import FauxServer

#: The first read of a request.
_CHUNK: Final = 65536

#: A turn shorter than this (seconds) is taken at its word: asking the kernel is not worth it.
_DOUBTFUL: Final = 0.0005

_ACK: Final = int(Kind.ACK)
_CLOSED: Final = int(Kind.CLOSED)
_RETURNED: Final = int(Kind.RETURNED)
_REFUSED: Final = int(Kind.REFUSED)


class Receiver:
    """Takes offers for the faux servers in `servers` and answers for every connection.

    Owns `end`.  `on_lost` is called when the master has closed the channel, or speaks another version of it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, end: WorkerEnd, on_lost: Callable[[], None]) -> None:
        self.loop = loop
        self.servers: dict[int, FauxServer] = {}
        #: Connections that outlive their first turn, for `cut`.
        self.kept: dict[int, HandedTransport] = {}
        self._end = end
        self._on_lost = on_lost
        self._began = 0.0
        self._usage = getrusage(RUSAGE_THREAD)
        # Of this turn: the lazy transports to settle, and the answers so far.
        self._lazy: list[HandedTransport] = []
        self._fresh: dict[int, int] = {}
        self._turning = False
        # Those that are acknowledged when their protocol has its connection.
        self._making: set[int] = set()
        # Answers outside of a turn, and whether their sending is scheduled.
        self._answers: dict[int, int] = {}
        self._scheduled = False
        self._blocked: list[bytes] = []
        loop.add_reader(end.fileno(), self._readable)

    # -- offers in ------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
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
        if not self._fresh:
            self._usage = getrusage(RUSAGE_THREAD)
            self._began = perf_counter()
        arrived = len(fds)
        for number, (_, family, _, key, id, _, port, _, client, _) in enumerate(offers):
            server = self.servers.get(key)
            if server is None or number >= arrived:
                # No such server (any more), or the descriptor was lost at our limit: somebody else's, please.
                self._fresh[id] = _REFUSED
                if number < arrived:
                    os.close(fds[number])
                continue
            peername = None
            if family == IPV4:
                peername = (socket.inet_ntop(socket.AF_INET, client[12:]), port)
            elif family == IPV6:
                peername = (socket.inet_ntop(socket.AF_INET6, client), port)
            self._take(server, id, fds[number], peername)
        if not self._turning:
            # Behind the tasks that the first bytes have created.
            self._turning = True
            self.loop.call_soon(self._turned)
        return True

    def _take(self, server: FauxServer, id: int, fd: int, peername: tuple[str, int] | None) -> None:
        os.set_blocking(fd, False)
        data: bytes | None = None
        if server.client_speaks_first:
            self._fresh[id] = _ACK
            try:
                data = os.read(fd, _CHUNK)
            except BlockingIOError:
                pass
            except OSError:
                data = b""
            if data == b"":
                # It left before it said anything: no protocol needs to hear of it.
                os.close(fd)
                self._fresh[id] = _ACK | _CLOSED
                return
        elif server.ssl:
            # A client that dribbles its handshake must not hold the acknowledgement.
            self._fresh[id] = _ACK
        else:
            self._making.add(id)
        try:
            transport = HandedTransport(self, id, fd, server.protocol_factory(), peername, server.sockname)
        except Exception as exc:  # noqa: BLE001 - the user's factory; as a loop does, and this client alone pays
            self.fault(exc, "protocol factory")
            os.close(fd)
            self._making.discard(id)
            self._fresh[id] = _ACK | _CLOSED
            return
        if data is None:
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

    # -- answers out ----------------------------------------------------------------------------------------------

    def _turned(self) -> None:
        """The loop has turned: settle the lazy transports, acknowledge everything of this turn."""
        self._turning = False
        lazy, self._lazy = self._lazy, []
        for transport in lazy:
            transport.settle()
        fresh, self._fresh = self._fresh, {}
        if fresh:
            held = int(self._held() * 1e6) // len(fresh)
            self._send([pack_answer(kind, id, held) for id, kind in fresh.items()])

    def _held(self) -> float:
        """How long the turn held the loop (seconds): what it took, less what other processes had of it.

        A handler that sleeps or waits gives up the processor of its own will, and its time counts in full.
        """
        took = perf_counter() - self._began
        if took < _DOUBTFUL:
            return took
        usage = getrusage(RUSAGE_THREAD)
        if usage.ru_nvcsw != self._usage.ru_nvcsw:
            return took
        return usage.ru_utime + usage.ru_stime - self._usage.ru_utime - self._usage.ru_stime

    def made(self, id: int) -> None:
        """A connection has its protocol: if its client need not speak first, acknowledged one turn later."""
        if id in self._making:
            self._making.remove(id)
            # Not at once: `_flush` may be scheduled already, in front of the tasks that this protocol will create.
            self.loop.call_soon(self._later, id, _ACK)

    def ended(self, id: int, *, returned: bool = False) -> None:
        """Our descriptor of a connection is closed: the connection is over, or `returned` to the master."""
        self.kept.pop(id, None)
        kind = _RETURNED if returned else _CLOSED
        if id in self._fresh:
            self._fresh[id] |= kind
        else:
            self._making.discard(id)
            self._later(id, kind)

    def _later(self, id: int, kind: int) -> None:
        self._answers[id] = self._answers.get(id, 0) | kind
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        answers, self._answers = self._answers, {}
        self._send([pack_answer(kind, id) for id, kind in answers.items()])

    def _send(self, records: list[bytes]) -> None:
        if self._blocked:
            self._blocked += records
            return
        for start in range(0, len(records), MAX_ANSWERS):
            if not self._end.answer(b"".join(records[start : start + MAX_ANSWERS])):
                # The master does not read: it is stopped, or dead.  Answers wait, nothing else does.
                self._blocked = records[start:]
                self.loop.add_writer(self._end.fileno(), self._unblock)
                return

    def _unblock(self) -> None:
        while self._blocked and self._end.answer(b"".join(self._blocked[:MAX_ANSWERS])):
            del self._blocked[:MAX_ANSWERS]
        if not self._blocked:
            self.loop.remove_writer(self._end.fileno())

    # -- the ones that stay ---------------------------------------------------------------------------------------

    def keep(self, id: int, transport: HandedTransport) -> None:
        """A transport goes beyond its first turn."""
        self.kept[id] = transport

    def cut(self) -> None:
        """Abort every connection that is still open."""
        for transport in (*self._lazy, *self.kept.values()):
            transport.cut()

    def close(self) -> None:
        """Stop reading and close the channel; connections go on."""
        self.loop.remove_reader(self._end.fileno())
        self.loop.remove_writer(self._end.fileno())
        self._end.close()
