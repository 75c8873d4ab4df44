"""A worker's link and its cluster loop, with a master's ends of both channels on the same loop."""

from __future__ import annotations

import array
import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from clusterserve.channel.board import Board
from clusterserve.channel.connection import MasterEnd, connection_channel
from clusterserve.channel.message import MessageChannel
from clusterserve.core.messages import Closed, Listen, Listened, Message
from clusterserve.core.records import NO_ADDRESS, Kind, pack_offer, unpack_answers
from clusterserve.errors import ProtocolError
from clusterserve.worker.link import Link
from clusterserve.worker.loop import cluster_loop
from tests.helpers.loops import running, turns, until

M = TypeVar("M")


class FakeMaster:
    """Speaks both channels.  Answers every listen request as `answers` says: by default, "yes"."""

    def __init__(self, loop_class: type[Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.end: MasterEnd
        self.end, connections = connection_channel()
        self.link = Link(theirs, connections.dup(), Board.create(), select.epoll())
        self.loop = cluster_loop(loop_class, self.link)()
        self.link.attach(self.loop)
        self.channel = MessageChannel(self.loop, ours, self._on_message, self._on_closed)
        self.loop.add_reader(self.end.fileno(), self._read)
        self.messages: list[Message] = []
        self.answers: Callable[[Listen], None] = self.grant
        self.kinds: dict[int, Kind] = {}
        self._files = contextlib.ExitStack()
        self._ids = 0
        #: The keys that this worker was given.
        self.given: set[int] = set()
        #: The listeners' keys, by name.
        self.keys: dict[tuple[str, int], int] = {}

    # -- messages -------------------------------------------------------------------------------------------------

    def _on_message(self, message: Message, descriptors: list[int]) -> None:
        assert descriptors == []
        self.messages.append(message)
        if isinstance(message, Listen):
            self.answers(message)

    def _on_closed(self, error: ProtocolError | None) -> None:
        assert error is None

    def grant(self, request: Listen, sockname: Any = None, family: int = socket.AF_INET) -> None:
        """A listener of the master's."""
        key = self._key(request)
        name = sockname or ["127.0.0.1", 8000 + key]
        self.channel.send(Listened(request.request, key, 0, "", family, name, False))

    def _key(self, request: Listen) -> int:
        """Each server of this worker has a listener of its own, until it is closed."""
        closed = {message.listener for message in self.of(Closed)}
        index = 0
        while True:
            name = request.bind, index
            key = self.keys.get(name)
            if key is None or key in closed or key not in self.given:
                self.given.add(key := self.keys.setdefault(name, len(self.keys) + 1))
                return key
            index += 1

    def refuse(self, errno: int, reason: str) -> Callable[[Listen], None]:
        return lambda request: self._send(Listened(request.request, 0, errno, reason, socket.AF_UNSPEC, "", False))

    def share(self, sock: socket.socket) -> Callable[[Listen], None]:
        """The listening socket itself: policy none."""
        name = sock.getsockname()

        def share(request: Listen) -> None:
            key = self._key(request)
            answer = Listened(
                request.request, key, 0, "", sock.family, name if isinstance(name, str) else [*name], True
            )
            self.channel.send(answer, [sock.fileno()])

        return share

    def _send(self, message: Message) -> None:
        self.channel.send(message)

    def of(self, kind: type[M]) -> list[M]:
        """The messages of this kind so far."""
        return [message for message in self.messages if isinstance(message, kind)]

    async def said(self, kind: type[M], count: int = 1) -> list[M]:
        """The worker has sent so many of them."""
        await until(lambda: len(self.of(kind)) >= count, f"{count} {kind.__name__} messages; {self.messages}")
        assert len(self.of(kind)) == count
        return self.of(kind)

    # -- connections ----------------------------------------------------------------------------------------------

    def hand(self, listener: int, *data: bytes) -> list[socket.socket]:
        """A connection, in a message of its own, for each of `data`, which has arrived; the clients' ends."""
        clients = []
        for each in data:
            copy, client = socket.socketpair()
            client.setblocking(False)
            client.send(each)
            self._ids += 1
            self._files.enter_context(client)
            record = pack_offer(self._ids, listener, 0, NO_ADDRESS, b"", 0)
            assert self.end.offer([record], array.array("i", [copy.fileno()]))
            copy.close()
            clients.append(client)
        return clients

    async def rest(self, client: socket.socket) -> bytes:
        """Everything that this client gets."""
        data = bytearray()
        while part := await self.loop.sock_recv(client, 65536):
            data += part
        return bytes(data)

    def _read(self) -> None:
        for _, kind, _, _, _, id in unpack_answers(self.end.answers()):
            self.kinds[id] = self.kinds.get(id, Kind(0)) | Kind(kind)

    async def answered(self, id: int, kind: Kind) -> None:
        await until(lambda: self.kinds.get(id, Kind(0)) & kind, f"connection {id} is answered {kind!r}")

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        for server in tuple(self.link.servers):
            server.close()
        self.loop.run_until_complete(turns(2))
        self.link.receiver.cut()

    def close(self) -> None:
        if self.link._channel is not None:
            self.link._channel.close()
        self.link.receiver.close()
        self.link.kept.close()
        self.channel.close()
        self.loop.remove_reader(self.end.fileno())
        self.end.close()
        self._files.close()


@pytest.fixture
def fake(loop_class: type[Any], complaints: list[dict[str, Any]]) -> Iterator[FakeMaster]:
    fake = FakeMaster(loop_class)
    with running(fake.loop, complaints):
        yield fake
        fake.finish()
        fake.close()
