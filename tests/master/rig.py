"""What the tests of the master share: a loop whose clock can be set forward, fake workers, real clients.

A fake worker is the other end of a real connection channel.  It reads offers and answers when its test says so, and
what it says may be nonsense.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from clusterserve.binds import Bind
from clusterserve.channel.board import UNKNOWN, Board
from clusterserve.channel.connection import MasterEnd, WorkerEnd, connection_channel
from clusterserve.core.distributor import Distributor
from clusterserve.core.lateness import PATIENCE
from clusterserve.core.policies import Policy, RoundRobin
from clusterserve.core.records import Kind, pack_answer, unpack_offers, waited
from clusterserve.core.worker import Worker
from clusterserve.errors import ProtocolError
from clusterserve.master.dispatcher import Dispatcher
from clusterserve.master.introductions import Introductions
from clusterserve.master.listeners import Listener, open_listener
from tests.helpers.waiting import DEADLINE

T = TypeVar("T")

#: How often a condition is looked at.
PAUSE = 0.002


class SkewedLoop(asyncio.SelectorEventLoop):
    """Its clock can be set forward, it counts its turns, and what its callbacks raise is kept in `faults`."""

    def __init__(self) -> None:
        self._skew = 0.0
        self._frozen: float | None = None
        self.turns = 0
        self.faults: list[dict[str, Any]] = []
        super().__init__()
        self.set_exception_handler(lambda _, context: self.faults.append(context))

    def time(self) -> float:
        return super().time() + self._skew if self._frozen is None else self._frozen

    def freeze(self) -> None:
        """From now on only `turn` and `forward` make a difference."""
        self._frozen = self.time()

    def thaw(self) -> None:
        """The clock goes on."""
        self._frozen = None

    def forward(self, seconds: float) -> None:
        """Everything that was to happen within `seconds` from now is due."""
        self._skew += seconds
        if self._frozen is not None:
            self._frozen += seconds

    def _run_once(self) -> None:
        self.turns += 1
        super()._run_once()  # type: ignore[misc]

    def until(self, predicate: Callable[[], T], what: str) -> T:
        """Run until the answer is true, and return it."""
        deadline = time.monotonic() + DEADLINE
        while not (answer := predicate()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {DEADLINE:g} s: {what} (last answer: {answer!r})")
            if self._frozen is None:
                self.run_until_complete(asyncio.sleep(PAUSE))
            else:
                # No timer comes due, and the kernel needs some time all the same.
                time.sleep(PAUSE)
                self.turn(1)
        return answer

    def turn(self, times: int = 3) -> None:
        """Let what is ready now happen, and what follows from it at once."""

        async def turns() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.run_until_complete(turns())


@dataclass
class Offer:
    """One offered connection, as its worker sees it.  Owns its copy of the descriptor."""

    id: int
    listener: int
    family: int
    port: int
    client: bytes
    server: bytes
    server_port: int
    #: How long it had waited when it was received (seconds).
    waited: float
    sock: socket.socket


class FakeWorker:
    """The worker's end of a connection channel, and what it was offered."""

    def __init__(self, rig: Rig, id: int, slot: int, send_buffer: int | None, pid: int | None) -> None:
        self.id = id
        self._rig = rig
        own, theirs = connection_channel()
        if send_buffer is not None:
            own = _with_send_buffer(own, theirs, send_buffer)
        # A copy, as the worker's process would have.
        self.socket = socket.socket(fileno=os.dup(theirs.fileno()))
        self._end = WorkerEnd(self.socket)
        self.offers: dict[int, Offer] = {}
        #: How many connections came in each message.
        self.batches: list[int] = []
        self.alive = True
        self.board = Board.create()
        self.kept = select.epoll()
        rig.dispatcher.add_worker(id, slot, own, self.board, self.kept, pid)

    @property
    def record(self) -> Worker:
        """What the distributor knows of it."""
        return self._rig.distributor.workers[self.id]

    def read(self) -> list[Offer]:
        """The offers of one message; none if there is no message now."""
        message = self._end.offers()
        if message is None:
            return []
        data, fds = message
        new = []
        for record, fd in zip(unpack_offers(data), fds, strict=True):
            _, family, _, key, id, queued, port, server_port, client, server, place = record
            wait = waited(queued, time.monotonic())
            new.append(Offer(id, key, family, port, client, server, server_port, wait, socket.socket(fileno=fd)))
            # As a worker does whose event loop serves it: the kernel is asked when it dies.
            self.board.marks[place] = UNKNOWN
        self.batches.append(len(new))
        self.offers.update({offer.id: offer for offer in new})
        return new

    def receive(self, count: int = 1) -> list[Offer]:
        """Run until `count` offers have come, and return them."""
        new: list[Offer] = []

        def read() -> bool:
            while got := self.read():
                new.extend(got)
            return len(new) >= count

        self._rig.loop.until(read, f"worker {self.id} is offered {count} connections")
        assert len(new) == count
        return new

    def answer(self, kind: int, *ids: int, held: int = 0) -> None:
        """Say the same of several connections, in one message.  What is over or refused is closed here first."""
        for id in ids:
            if kind & (Kind.CLOSED | Kind.RETURNED | Kind.REFUSED) and id in self.offers:
                self.offers.pop(id).sock.close()
        self.say(b"".join(pack_answer(kind, id, held) for id in ids))

    def say(self, data: bytes) -> None:
        self.socket.send(data)

    def accept(self, count: int = 1, held: int = 0) -> list[Offer]:
        """Receive and acknowledge."""
        offers = self.receive(count)
        self.answer(Kind.ACK, *(offer.id for offer in offers), held=held)
        return offers

    def die(self) -> None:
        """What the kernel does to the descriptors of a process that ends, and what the engine does next."""
        self.release()
        self._rig.dispatcher.remove_worker(self.id)

    def release(self) -> None:
        if self.alive:
            self.alive = False
            self._end.close()
            for offer in self.offers.values():
                offer.sock.close()


def _with_send_buffer(own: MasterEnd, theirs: socket.socket, size: int) -> MasterEnd:
    with socket.socket(fileno=os.dup(own.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return own


class Rig:
    """A dispatcher on a loop, with everything around it; `close` lets go of all of it."""

    def __init__(self, loop: SkewedLoop, max_pending: int = 1000, introductions: Introductions | None = None) -> None:
        self.loop = loop
        self.distributor = Distributor()
        #: (worker, error) of every fault that was reported.
        self.broken: list[tuple[int, ProtocolError]] = []
        #: How often the queue was reported empty.
        self.idle = 0
        self.dispatcher = Dispatcher(loop, self.distributor, max_pending, self._on_fault, self._on_idle, introductions)
        self._stack = contextlib.ExitStack()
        self._workers: list[FakeWorker] = []
        self._keys = 0

    def _on_fault(self, worker: int, error: ProtocolError) -> None:
        self.broken.append((worker, error))

    def _on_idle(self) -> None:
        self.idle += 1

    def listen(
        self,
        bind: str = "127.0.0.1:0",
        *,
        policy: Policy | None = None,
        client_speaks_first: bool = False,
        tls: bool = False,
    ) -> Listener:
        """A listener that the dispatcher accepts from."""
        self._keys += 1
        listener = open_listener(self._keys, Bind.parse(bind), 128, pinned=True)
        self._stack.callback(listener.close)
        self.distributor.add_handle(
            listener.key, policy or RoundRobin(), client_speaks_first=client_speaks_first, tls=tls
        )
        self.dispatcher.add_listener(listener, client_speaks_first=client_speaks_first)
        return listener

    def worker(self, *listeners: Listener, send_buffer: int | None = None, pid: int | None = None) -> FakeWorker:
        """A worker that listens on `listeners`."""
        number = len(self._workers)
        worker = FakeWorker(self, number + 1, number, send_buffer, pid)
        self._workers.append(worker)
        for listener in listeners:
            self.dispatcher.attach(worker.id, listener.key)
        return worker

    def connect(self, listener: Listener, data: bytes = b"") -> socket.socket:
        """A client that has said `data`."""
        client = self._stack.enter_context(connect(listener))
        if data:
            client.sendall(data)
        return client

    def queued(self, count: int) -> None:
        """Run until so many connections wait."""
        self.loop.until(lambda: self.distributor.queued == count, f"{count} connections are queued")

    def parked(self, count: int) -> None:
        """Run until so many connections are parked."""
        self.loop.until(lambda: len(self.distributor.parking.connections) == count, f"{count} connections are parked")

    def late(self) -> None:
        """Whoever has not said anything yet has not said anything for long."""
        self.loop.forward(PATIENCE + 0.001)
        self.loop.turn()

    def close(self) -> None:
        for worker in self._workers:
            worker.release()
            if worker.id in self.distributor.workers:
                self.dispatcher.remove_worker(worker.id)
        self.dispatcher.close()
        self._stack.close()


def connect(listener: Listener) -> socket.socket:
    """A client of `listener`."""
    client = socket.socket(listener.sock.family, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    name = listener.sock.getsockname()
    if isinstance(name, tuple):
        name = ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0]), name[1])
    try:
        client.connect(name)
    except OSError:
        client.close()
        raise
    return client


def reset(client: socket.socket) -> None:
    """End a TCP connection with RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def readable(sock: socket.socket) -> bool:
    """Whether there is something to read, the connection's end included."""
    return bool(select.select([sock], [], [], 0)[0])


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Whatever needs a new descriptor in this block fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
