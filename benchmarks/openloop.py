"""An open-loop client: requests leave when the schedule says, whether or not earlier ones have been answered.

A latency counts from the *scheduled* arrival, so waiting for a slow server, for a connection or for this client itself
is never left out.  One thread, raw sockets, an epoll waited for through `select`, whose time-out is in microseconds
where epoll's and every event loop's is in milliseconds.  How late this client was itself is part of the result.
"""

from __future__ import annotations

import errno
import gc
import random
import select
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum, auto

from benchmarks.answer import Answer
from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.schedule import Schedule

TIMEOUT_SECONDS = 30.0
CLOSE_SECONDS = 5.0
WARM_UP_SECONDS = 30.0
#: How often requests without an answer are looked for.
LOOK_SECONDS = 0.1
READ_BYTES = 65536


@dataclass(frozen=True)
class Style:
    """How the requests of one run are asked."""

    keep_alive: bool
    method: str = "GET"
    path: str = "/work"
    #: Connections that are open before the run starts; more are opened when none is idle.
    pool: int = 64
    body: bytes = b""
    #: The body leaves so long after the head, in a segment of its own.
    body_seconds: float = 0.0
    timeout: float = TIMEOUT_SECONDS
    #: Sees at once that the server has closed an idle connection; otherwise only when it asks again over it.
    notices: bool = True

    def head(self, service: float) -> bytes:
        lines = [f"{self.method} {self.path}?ms={service * 1000:.3f} HTTP/1.1", "Host: localhost"]
        if not self.keep_alive:
            lines.append("Connection: close")
        if self.body:
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass
class Outcome:
    """What came of a run; times in seconds."""

    #: By request, in order of arrival; None where it failed.
    latencies: list[float | None]
    #: From when a request was due until it had been sent, or its connection been asked for.
    lateness: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    #: Connections that the server closed while no request was on them; a client that keeps them has to expect that.
    closed_idle: int = 0
    opened: int = 0

    @property
    def answered(self) -> list[float]:
        return [latency for latency in self.latencies if latency is not None]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class _State(Enum):
    CONNECTING = auto()
    ASKING = auto()
    IDLE = auto()
    #: Answered, and the server is to close it.
    CLOSING = auto()


class _Connection:
    __slots__ = ("answer", "deadline", "number", "pending", "socket", "state")

    def __init__(self, port: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.state = _State.CONNECTING
        self.number = -1
        self.pending = b""
        self.answer = Answer()
        self.deadline = 0.0
        if (code := self.socket.connect_ex(("127.0.0.1", port))) not in (0, errno.EINPROGRESS):
            self.socket.close()
            raise OSError(code, "connect")

    def fileno(self) -> int:
        return self.socket.fileno()


def run(port: int, schedule: Schedule, style: Style, seed: str) -> Outcome:
    """Ask everything on the schedule; returns when each request has its answer or has failed."""
    client = _Client(port, schedule, style, seed)
    # A collection in the midst of the run would be the server's latency.
    gc.collect()
    gc.disable()
    try:
        client.open_pool()
        client.run()
    finally:
        gc.enable()
        client.close()
    return client.outcome


class _Client:
    def __init__(self, port: int, schedule: Schedule, style: Style, seed: str) -> None:
        self.outcome = Outcome([None] * len(schedule))
        self._port = port
        self._schedule = schedule
        self._style = style
        self._chance = random.Random(seed)
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._bodies: deque[tuple[float, int, int]] = deque()
        self._unanswered = len(schedule)
        self._start = 0.0

    # ── before the run ──────────────────────────────────────────────────────────────────────────────────────────────

    def open_pool(self) -> None:
        """Connect all at once, and have one request answered on each: a pool as it is after a busy moment."""
        if not self._style.keep_alive:
            return
        clients = [self._connect() for _ in range(self._style.pool)]
        for client in clients:
            client.socket.settimeout(WARM_UP_SECONDS)
        try:
            for client in clients:
                client.socket.sendall(self._style.head(0.0) + self._style.body)
            for client in clients:
                while not client.answer.complete:
                    client.answer.feed(client.socket.recv(READ_BYTES))
                    if client.answer.ended and not client.answer.complete:
                        raise ServerFailedError("it closed a connection of the pool before the run")
                if client.answer.status != 200 or client.answer.closes:
                    raise ServerFailedError(f"it answered {client.answer.status} before the run, or does not keep")
                client.socket.setblocking(False)
                self._becomes_idle(client)
        except OSError as error:
            raise ServerFailedError(f"it did not serve a pool of connections: {error}") from error

    def _connect(self) -> _Connection:
        connection = _Connection(self._port)
        self.outcome.opened += 1
        self._connections[connection.fileno()] = connection
        self._epoll.register(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return connection

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        arrivals = self._schedule.arrivals
        count, following = len(arrivals), 0
        self._start = time.perf_counter()
        look_at = self._start + LOOK_SECONDS
        while self._unanswered or any(each.state is _State.CLOSING for each in self._connections.values()):
            now = time.perf_counter()
            while following < count and self._start + arrivals[following] <= now:
                self._ask(following)
                following += 1
                now = time.perf_counter()
            while self._bodies and self._bodies[0][0] <= now:
                self._send_body(*self._bodies.popleft()[1:])
            if look_at <= now:
                self._give_up(now)
                look_at = now + LOOK_SECONDS
            wake_at = look_at
            if following < count:
                wake_at = min(wake_at, self._start + arrivals[following])
            if self._bodies:
                wake_at = min(wake_at, self._bodies[0][0])
            wait = wake_at - time.perf_counter()
            if select.select([self._epoll], [], [], max(wait, 0.0))[0]:
                for fd, _ in self._epoll.poll(0):
                    if connection := self._connections.get(fd):
                        self._ready(connection)

    def _ask(self, number: int) -> None:
        due = self._start + self._schedule.arrivals[number]
        connection = None
        if self._idle:
            # Any of them: the last one takes the place of the one that goes.
            place = self._chance.randrange(len(self._idle))
            self._idle[place], self._idle[-1] = self._idle[-1], self._idle[place]
            connection = self._idle.pop()
            if not self._style.notices:
                self._epoll.register(connection.fileno(), select.EPOLLIN)
        else:
            try:
                connection = self._connect()
            except OSError as error:
                self._failed(number, _kind(error))
        if connection is not None:
            connection.number = number
            connection.deadline = due + self._style.timeout
            connection.answer = Answer()
            connection.pending = self._style.head(self._schedule.services[number])
            if self._style.body and not self._style.body_seconds:
                connection.pending += self._style.body
            # On loopback a connection is mostly there when `connect` returns.
            self._send(connection)
        self.outcome.lateness.append(time.perf_counter() - due)

    def _send(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.pending)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(connection, error)
            return
        if sent != len(connection.pending):
            raise BenchmarkError("a request did not fit into the socket's buffer")
        connection.pending = b""
        if connection.state is _State.CONNECTING:
            self._epoll.modify(connection.fileno(), select.EPOLLIN)
        connection.state = _State.ASKING
        if self._style.body_seconds:
            at = time.perf_counter() + self._style.body_seconds
            self._bodies.append((at, connection.fileno(), connection.number))

    def _send_body(self, fd: int, number: int) -> None:
        connection = self._connections.get(fd)
        # It may have failed meanwhile, and its number be another's.
        if connection is None or connection.number != number or connection.state is not _State.ASKING:
            return
        try:
            connection.socket.send(self._style.body)
        except OSError as error:
            self._lost(connection, error)

    def _ready(self, connection: _Connection) -> None:
        if connection.state is _State.CONNECTING:
            self._send(connection)
            return
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(connection, error)
            return
        if connection.state is _State.IDLE:
            self._idle.remove(connection)
            self._forget(connection)
            self.outcome.closed_idle += 1
            if data:
                self.outcome.failures["spoke unasked"] += 1
        elif connection.state is _State.CLOSING:
            self._forget(connection)
            if data:
                self.outcome.failures["more than the response"] += 1
            elif connection.answer.status == 502:
                self.outcome.failures["clean 502"] += 1
        else:
            connection.answer.feed(data)
            if connection.answer.complete:
                self._answered(connection)
            elif connection.answer.ended:
                self._failed(connection.number, "partial response" if connection.answer.begun else "early EOF")
                self._forget(connection)

    def _answered(self, connection: _Connection) -> None:
        answer, number = connection.answer, connection.number
        now = time.perf_counter()
        closing = answer.closes or not self._style.keep_alive
        if answer.status == 200:
            self.outcome.latencies[number] = now - self._start - self._schedule.arrivals[number]
            self._unanswered -= 1
        elif answer.status == 502 and closing and not answer.ended:
            # Counted when the connection has ended in order, or in which way it did not.
            self._unanswered -= 1
        else:
            self._failed(number, "clean 502" if answer.status == 502 else f"status {answer.status}")
        connection.number = -1
        if answer.ended:
            self._forget(connection)
        elif closing:
            connection.state = _State.CLOSING
            connection.deadline = now + CLOSE_SECONDS
        else:
            self._becomes_idle(connection)

    def _becomes_idle(self, connection: _Connection) -> None:
        if not self._style.notices:
            self._epoll.unregister(connection.fileno())
        elif connection.state is _State.CONNECTING:
            self._epoll.modify(connection.fileno(), select.EPOLLIN)
        connection.state = _State.IDLE
        self._idle.append(connection)

    # ── what goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────

    def _lost(self, connection: _Connection, error: OSError) -> None:
        if connection.state is _State.IDLE:
            self._idle.remove(connection)
            self.outcome.closed_idle += 1
        elif connection.state is _State.CLOSING:
            self.outcome.failures[f"{_kind(error)} after status {connection.answer.status}"] += 1
        else:
            self._failed(connection.number, _kind(error))
        self._forget(connection)

    def _give_up(self, now: float) -> None:
        for connection in [each for each in self._connections.values() if each.state is not _State.IDLE]:
            if connection.deadline < now:
                if connection.state is _State.CLOSING:
                    self.outcome.failures["not closed"] += 1
                else:
                    self._failed(connection.number, "timeout")
                self._forget(connection)

    def _failed(self, number: int, kind: str) -> None:
        self.outcome.failures[kind] += 1
        self._unanswered -= 1

    def _forget(self, connection: _Connection) -> None:
        del self._connections[connection.fileno()]
        connection.socket.close()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.socket.close()
        self._epoll.close()


def _kind(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError) or error.errno == errno.ECONNREFUSED:
        return "refused"
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return "reset"
    return errno.errorcode.get(error.errno or 0, "error")
