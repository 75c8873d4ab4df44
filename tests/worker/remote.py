"""A master for a worker that runs elsewhere, in another process or in another thread: blocking, with deadlines."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from clusterserve.channel.board import Board
from clusterserve.channel.connection import MasterEnd, connection_channel
from clusterserve.core.messages import (
    Boot,
    Decoder,
    Drain,
    Listen,
    Listened,
    Listening,
    Message,
    decode,
    encode,
)
from clusterserve.core.records import NO_ADDRESS, pack_offer
from clusterserve.current import SLOT_VARIABLE, VARIABLE
from clusterserve.settings import Settings
from tests.helpers.raw import request
from tests.helpers.waiting import DEADLINE

M = TypeVar("M")

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "clusterserve" / "worker" / "__main__.py"


class Remote:
    """The master's side of one worker."""

    def __init__(self) -> None:
        #: What came with messages; ours to close.
        self.descriptors: list[int] = []
        self.channel, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channel.settimeout(DEADLINE)
        self.end: MasterEnd
        self.end, self.connections = connection_channel()
        self.board = Board.create()
        self.kept = select.epoll()
        self._decoder = Decoder()
        self._frames: list[bytes] = []
        self._ids = 0
        #: Everything that the worker has said.
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.channel.sendall(encode(message))

    def boot(self, settings: Settings, path: list[str] | None = None) -> None:
        self.send(Boot(1, 0, settings.to_json(), sys.path if path is None else path))

    def next(self) -> Message | None:
        """The next message; None at the end."""
        while not self._frames:
            data, descriptors, _, _ = socket.recv_fds(self.channel, 65536, 8)
            self.descriptors += descriptors
            if not data:
                return None
            self._frames += [body for body, _ in self._decoder.feed(data)]
        self.messages.append(decode(self._frames.pop(0)))
        return self.messages[-1]

    def expect(self, kind: type[M]) -> M:
        message = self.next()
        assert isinstance(message, kind), f"{message!r} instead of {kind.__name__}; {self.messages}"
        return message

    def answer(self, asked: Listen, key: int = 1) -> None:
        """Say yes to a listen request."""
        self.send(Listened(asked.request, key, 0, "", socket.AF_INET, ["127.0.0.1", 8000], False))

    def grant(self) -> None:
        """Say yes to the listen request that comes next, and see the worker listen."""
        self.answer(self.expect(Listen))
        self.expect(Listening)

    def hand(self, data: bytes, key: int = 1) -> socket.socket:
        """A connection on which `data` has arrived; returns the client's end."""
        copy, client = socket.socketpair()
        with copy:
            client.settimeout(DEADLINE)
            client.sendall(data)
            self._ids += 1
            assert self.end.offer(
                [pack_offer(self._ids, key, 0, NO_ADDRESS, b"", 0)], array.array("i", [copy.fileno()])
            )
        return client

    def get(self, target: str) -> Any:
        """The JSON that the worker's application answers."""
        with self.hand(request("GET", target, "Connection: close")) as client:
            head, _, body = _everything(client).partition(b"\r\n\r\n")
        assert b" 200 " in head, head
        return json.loads(body)

    def drain(self, grace: float = 10.0, *, quick: bool = False, keep: bool = False) -> None:
        self.send(Drain(grace, quick, keep))

    def goodbye(self) -> list[Message]:
        """What it says last."""
        before = len(self.messages)
        while self.next() is not None:
            pass
        return self.messages[before:]

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)
        self.channel.close()
        self.theirs.close()
        self.end.close()
        self.board.close()
        self.kept.close()


def _everything(client: socket.socket) -> bytes:
    data = bytearray()
    while part := client.recv(65536):
        data += part
    return bytes(data)


class Worker(Remote):
    """A real worker process.  Ends with the test, one way or the other."""

    def __init__(
        self, environment: Mapping[str, str] | None = None, *, master: int | None = None, cwd: Path = ROOT
    ) -> None:
        super().__init__()
        numbers = self.theirs.fileno(), self.connections.fileno(), self.board.fd, self.kept.fileno()
        own = {
            **os.environ,
            VARIABLE: ",".join(map(str, (*numbers, os.getpid() if master is None else master))),
            SLOT_VARIABLE: "0",
            **(environment or {}),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ENTRY)], env=own, pass_fds=numbers, cwd=cwd, stderr=subprocess.PIPE, text=True
        )
        self.theirs.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stacks(self) -> str:
        """What it has told of its threads: in the file that came with its first word."""
        return os.pread(self.descriptors[0], 1 << 20, 0).decode()

    def ends(self) -> tuple[int, str]:
        """Its exit code and what it has written to stderr."""
        _, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, err

    def close(self) -> None:
        super().close()
        self.process.kill()
        with contextlib.suppress(ValueError):
            self.process.communicate(timeout=DEADLINE)


@contextlib.contextmanager
def starting(environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[Worker]:
    """A worker process that waits for its Boot."""
    worker = Worker(environment, **options)
    try:
        yield worker
    finally:
        worker.close()


def settings(app: str, **values: Any) -> Settings:
    # No heartbeats between the messages that a test waits for.
    given = {"app": app, "workers": 1, "bind": "127.0.0.1:0", "access_log": False, "timeout": 0, **values}
    return Settings.create(**given)
