"""A worker's receiver with a master at the other end of its connection channel, both in this process and on one loop.

Real sockets throughout.  The master does what a master does: it keeps its copy of a connection until the worker says
CLOSED, so that a client sees the end when both are done.  What the receiver answers is checked for every test: each
connection is acknowledged or refused once, ended once, and in this order.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import select
import socket
import struct
import tempfile
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from clusterserve.channel.board import Board
from clusterserve.channel.connection import MasterEnd, WorkerEnd, connection_channel
from clusterserve.core.messages import Listened
from clusterserve.core.records import FREE, FULL, IPV4, IPV6, NO_ADDRESS, Kind, pack_offer, unpack_answers
from clusterserve.worker.receiver import Receiver
from clusterserve.worker.server import Entrance
from tests.helpers.loops import turns, until
from tests.helpers.waiting import DEADLINE, eventually


class Answer(NamedTuple):
    id: int
    kind: Kind
    held: int


@dataclass
class Handed:
    """One connection: the client's end, and the master's copy of the server's."""

    loop: asyncio.AbstractEventLoop
    id: int
    client: socket.socket
    copy: socket.socket
    answers: list[Kind] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """The worker has said that it is over, or that it does not want it."""
        return any(kind & (Kind.CLOSED | Kind.REFUSED) for kind in self.answers)

    @property
    def returned(self) -> bool:
        """The worker has given it back."""
        return any(kind & Kind.RETURNED for kind in self.answers)

    @property
    def over(self) -> bool:
        """The worker has nothing more to say of it."""
        return self.closed or self.returned or self.silent or Kind.DROPPED in self.answers

    @property
    def silent(self) -> bool:
        """Given back to be watched: nobody has said a word."""
        return any(kind & Kind.SILENT for kind in self.answers)

    @property
    def acked(self) -> bool:
        return any(kind & Kind.ACK for kind in self.answers)

    def arrive(self, data: bytes) -> None:
        """Send, and see it arrive at the server's end, unread as yet."""
        before = self.unread()
        self.client.sendall(data)
        eventually(lambda: self.unread() == before + len(data), "the bytes have arrived")

    def unread(self) -> int:
        """How many bytes the kernel holds for the server."""
        return int(struct.unpack("i", fcntl.ioctl(self.copy, termios.FIONREAD, b"\0" * 4))[0])

    def half_close(self) -> None:
        self.client.shutdown(socket.SHUT_WR)
        self._sees(select.POLLRDHUP)

    def reset(self) -> None:
        """The client is gone with RST."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()
        self._sees(select.POLLHUP)

    def leave(self) -> None:
        """The client is gone with FIN."""
        self.client.close()
        self._sees(select.POLLRDHUP)

    def _sees(self, event: int) -> None:
        poll = select.poll()
        poll.register(self.copy, event)
        eventually(lambda: poll.poll(0), "the server's kernel knows")

    def has(self) -> bytes:
        """What the client has received already; nothing is waited for."""
        data = bytearray()
        with contextlib.suppress(BlockingIOError):
            while part := self.client.recv(1 << 20):
                data += part
        return bytes(data)

    async def sends(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.client, data)

    async def reads(self, size: int) -> bytes:
        """The next `size` bytes."""
        data = bytearray()
        while len(data) < size:
            part = await self.loop.sock_recv(self.client, size - len(data))
            assert part, f"the connection ended after {len(data)} of {size} bytes"
            data += part
        return bytes(data)

    async def rest(self) -> bytes:
        """Everything up to the end."""
        data = bytearray()
        while part := await self.loop.sock_recv(self.client, 1 << 20):
            data += part
        return bytes(data)

    async def ends(self) -> None:
        """The worker has said that it is over."""
        await until(lambda: self.closed, f"connection {self.id} is closed")


class Master:
    """The other end of the channel, and of every connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.end: MasterEnd
        self.end, theirs = connection_channel()
        self.losses = 0
        #: What it adds to the family of every client's address.
        self.told = 0
        #: How often it was told that a thread is free again.
        self.vacancies = 0
        self.receiver = Receiver(loop, WorkerEnd(theirs.dup()), Board.create(), self._lost)
        self.connections: dict[int, Handed] = {}
        self.offered: set[int] = set()
        #: What was answered, message by message.
        self.messages: list[list[Answer]] = []
        self._files = contextlib.ExitStack()
        self.listen()

    def _lost(self) -> None:
        self.losses += 1

    # -- connections ----------------------------------------------------------------------------------------------

    def connection(self, family: str = "tcp", *, sndbuf: int | None = None) -> Handed:
        """A new one that is not offered yet; `sndbuf` is the server's."""
        if family == "socketpair":
            copy, client = socket.socketpair()
        else:
            copy, client = self._accepted(family, sndbuf)
        client.setblocking(False)
        handed = Handed(self.loop, len(self.connections) + 1, client, copy)
        self.connections[handed.id] = handed
        return handed

    def _accepted(self, family: str, sndbuf: int | None) -> tuple[socket.socket, socket.socket]:
        kinds = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}
        with socket.socket(kinds[family], socket.SOCK_STREAM) as listener, tempfile.TemporaryDirectory() as directory:
            if sndbuf is not None:
                # Inherited by what is accepted.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
            listener.bind({"tcp": ("127.0.0.1", 0), "tcp6": ("::1", 0), "unix": f"{directory}/s"}[family])
            listener.listen()
            client = socket.socket(kinds[family], socket.SOCK_STREAM)
            if sndbuf is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, sndbuf)
            client.connect(listener.getsockname())
            return listener.accept()[0], client

    def offer(self, *connections: Handed, listener: int = 1) -> None:
        """Offer them in one message."""
        records = [self._record(connection, listener) for connection in connections]
        assert self.end.offer(records, array.array("i", [connection.copy.fileno() for connection in connections]))
        self.offered.update(connection.id for connection in connections)

    def _record(self, handed: Handed, listener: int) -> bytes:
        peer = handed.copy.getpeername() if handed.client.fileno() != -1 else handed.copy.getsockname()
        if handed.copy.family == socket.AF_INET:
            address = b"\0" * 10 + b"\xff\xff" + socket.inet_pton(socket.AF_INET, peer[0])
            return pack_offer(handed.id, listener, 0, self.told | IPV4, address, peer[1], handed.copy.fileno())
        if handed.copy.family == socket.AF_INET6:
            address = socket.inet_pton(socket.AF_INET6, peer[0])
            return pack_offer(handed.id, listener, 0, IPV6, address, peer[1])
        return pack_offer(handed.id, listener, 0, NO_ADDRESS, b"", 0)

    def serve(
        self,
        factory: Callable[[], Any],
        *,
        key: int = 1,
        first: bool = True,
        family: int = socket.AF_INET,
        sockname: Any = ("127.0.0.1", 8000),
        **ssl: Any,
    ) -> Entrance:
        """Put a faux server in place."""
        name = sockname if isinstance(sockname, str) else list(sockname)
        answer = Listened(1, key, 0, "", family, name, False)
        entrance = self.receiver.servers[key] = Entrance(answer, factory, ssl, first)
        return entrance

    def hand(self, data: bytes = b"", *, family: str = "tcp", sndbuf: int | None = None) -> Handed:
        """A connection whose first bytes, if there are any, lie there unread; offered."""
        handed = self.connection(family, sndbuf=sndbuf)
        if data:
            handed.arrive(data)
        self.offer(handed)
        return handed

    def again(self, handed: Handed, data: bytes) -> Handed:
        """One that was given back, whose client has said more: offered anew, under an id of its own."""
        assert handed.returned
        new = Handed(self.loop, len(self.connections) + 1, handed.client, handed.copy)
        self.connections[new.id] = new
        new.arrive(data)
        self.offer(new)
        return new

    # -- answers --------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read answers whenever there are some."""
        self.loop.add_reader(self.end.fileno(), self.read)

    def deafen(self) -> None:
        """Read them no more."""
        self.loop.remove_reader(self.end.fileno())

    def read(self) -> bool:
        """Read one message of answers now and do what it says; False if there is none."""
        data = self.end.answers()
        if not data:
            return False
        self.messages.append([Answer(id, Kind(kind), held) for _, kind, _, held, _, id in unpack_answers(data)])
        for id, kind, _ in self.messages[-1]:
            if not id:
                assert kind == FREE
                self.vacancies += 1
                continue
            handed = self.connections[id]
            handed.answers.append(kind)
            if kind & (Kind.CLOSED | Kind.TAKEN):
                # The master's last close ends the connection, unless it is none of the master's.
                handed.copy.close()
        return True

    async def answered(self, *connections: Handed) -> None:
        """Every one has been acknowledged, refused or closed."""
        await until(lambda: all(handed.answers for handed in connections), "they are answered")

    # -- the end --------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Cut what is open, and see that every connection was told of as it should be."""
        self.receiver.drain()
        for handed in self.connections.values():
            handed.client.close()
        offered = [self.connections[id] for id in sorted(self.offered)]
        while not all(handed.over for handed in offered):
            self.receiver.cut()
            while self.read():
                pass
            await turns(1)
        # If anything is answered twice, it is by now.
        await turns(5)
        while self.read():
            pass
        for handed in offered:
            assert handed.answers in _LIVES, f"connection {handed.id} was answered {handed.answers}"
        # Nothing is remembered of those that are over.
        assert self.receiver.kept == {}
        assert self.receiver.answers.making == set()

    def close(self) -> None:
        self.deafen()
        self.receiver.close()
        self.end.close()
        for handed in self.connections.values():
            handed.client.close()
            handed.copy.close()


#: What a worker may say of a connection in the course of its life.
_LIVES = (
    [Kind.ACK, Kind.CLOSED], [Kind.ACK | Kind.CLOSED], [Kind.CLOSED], [Kind.REFUSED], [Kind(FULL)],
    [Kind.ACK, Kind.RETURNED], [Kind.ACK | Kind.RETURNED], [Kind.RETURNED], [Kind.ACK | Kind.SILENT],
    [Kind.ACK, Kind.TAKEN, Kind.CLOSED], [Kind.ACK | Kind.TAKEN, Kind.CLOSED],
    [Kind.ACK | Kind.KEPT, Kind.CLOSED], [Kind.ACK | Kind.KEPT, Kind.RETURNED],
    [Kind.ACK | Kind.KEPT, Kind.DROPPED], [Kind.ACK, Kind.KEPT, Kind.CLOSED], [Kind.ACK, Kind.KEPT, Kind.RETURNED],
)  # fmt: skip


@pytest.fixture
def master(loop: asyncio.AbstractEventLoop) -> Iterator[Master]:
    master = Master(loop)
    try:
        yield master
        loop.run_until_complete(asyncio.wait_for(master.finish(), DEADLINE))
    finally:
        master.close()


# -- protocols --------------------------------------------------------------------------------------------------------


class Recorder(asyncio.Protocol):
    """Writes down what its transport tells it.  What it does about it is up to the test: `Recorders`."""

    transport: Any = None

    def __init__(self, recorders: Recorders) -> None:
        self._recorders = recorders
        self.calls: list[str] = []
        self.data = bytearray()
        self.lost: list[Exception | None] = []
        #: The transport's phase at each call.
        self.phases: list[str] = []

    def _called(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        self.phases.append(phase(self.transport))
        does = self._recorders.does.get(name)
        return does(self, *arguments) if does is not None else None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._called("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._called("data", data)

    def eof_received(self) -> Any:
        return self._called("eof")

    def pause_writing(self) -> None:
        self._called("pause")

    def resume_writing(self) -> None:
        self._called("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self._called("lost", exc)

    @property
    def flow(self) -> list[str]:
        """The calls of flow control."""
        return [call for call in self.calls if call in ("pause", "resume")]


class Recorders:
    """A factory of recorders, each of which does the same: `on(data=…)` names what, for a call by its name."""

    def __init__(self) -> None:
        self.all: list[Recorder] = []
        self.does: dict[str, Callable[..., Any]] = {}

    def on(self, **does: Callable[..., Any]) -> Recorders:
        self.does.update(does)
        return self

    def __call__(self) -> Recorder:
        self.all.append(Recorder(self))
        return self.all[-1]

    @property
    def only(self) -> Recorder:
        assert len(self.all) == 1, f"{len(self.all)} protocols were made"
        return self.all[0]

    async def made(self) -> Recorder:
        await until(lambda: self.all and self.all[0].calls, "the protocol has its connection")
        return self.only


@pytest.fixture
def recorders() -> Recorders:
    return Recorders()


def phase(transport: Any) -> str:
    """LAZY, PENDING, REAL or CLOSED, as its repr has it."""
    return repr(transport).rpartition(" ")[2].rstrip(">")


async def reaches(transport: Any, wanted: str) -> None:
    await until(lambda: phase(transport) == wanted, f"{transport!r} is {wanted}")


def was_real(transport: Any) -> bool:
    """Whether the event loop ever had it: only the loop's own transport has a socket object to show."""
    return transport.get_extra_info("socket") is not None
