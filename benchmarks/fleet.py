"""Servers that run: started, seen to serve from every worker, and stopped with nothing left behind.

A `Fleet` owns every process it starts. Leaving `new_fleet`, for whatever reason, stops them all. Each is a session
of its own, so the terminal's Ctrl-C reaches this program alone, which then stops them in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from benchmarks import processes
from benchmarks.errors import BenchmarkError, ServerFailedError
from benchmarks.interrupts import held
from benchmarks.servers import ROOT, Contender, Setup

START_SECONDS = 60.0
STOP_SECONDS = 10.0
KILL_SECONDS = 5.0
IO_SECONDS = 10.0
LOOK_SECONDS = 0.02
PROBE_APART_SECONDS = 0.002
SHOWN_LINES = 5


class Server:
    """One contender's process tree, listening on a free loopback port."""

    def __init__(self, contender: Contender, setup: Setup) -> None:
        self.contender = contender
        self.port = _free_port()
        self._workers = setup.workers
        self._members: dict[int, processes.Process] = {}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server, closed with it
        self._root = subprocess.Popen(
            contender.command(setup, self.port),
            cwd=ROOT,
            env=contender.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def name(self) -> str:
        return self.contender.name

    def processes(self) -> dict[int, processes.Process]:
        # The root is not waited for before the end: as a zombie it keeps its id, and its session, from being reused.
        return processes.tree(self._root.pid)

    def wait_until_serving(self) -> None:
        """Return when every worker has answered a request."""
        deadline = time.monotonic() + START_SECONDS
        answered: set[int] = set()
        # A worker that died and was replaced counts once: the tree as it is decides.
        while len(answered & (tree := self.processes()).keys()) < self._workers:
            if not any(process.alive for process in tree.values()):
                raise ServerFailedError(f"ended while starting:\n{self._last_output()}")
            if time.monotonic() > deadline:
                raise ServerFailedError(
                    f"{len(answered)} of {self._workers} workers answered within {START_SECONDS:.0f} s\n"
                    f"{self._last_output()}"
                )
            try:
                answered |= _workers_that_answer(self.port, 2 * self._workers)
            except OSError:
                time.sleep(LOOK_SECONDS)

    def wait_until_idle(self) -> None:
        """Return when no connection of an earlier round is left."""
        deadline = time.monotonic() + IO_SECONDS
        while processes.connections(self.port):
            if time.monotonic() > deadline:
                raise ServerFailedError("it kept connections whose clients had left")
            time.sleep(LOOK_SECONDS)

    def workers(self) -> list[int]:
        """The processes that serve, as far as the tree shows: its leaves, without those that only help."""
        tree = self.processes()
        parents = {process.parent for process in tree.values()}
        return [
            pid
            for pid, process in sorted(tree.items())
            if process.alive and pid not in parents and pid != self._root.pid and not processes.is_helper(pid)
        ]

    @property
    def master(self) -> int:
        """Who takes the signals: the first process, or, when that has been succeeded, the last one to have children."""
        tree = self.processes()
        if not tree[self._root.pid].alive:
            parents = {process.parent for process in tree.values() if process.alive}
            if masters := [process for process in tree.values() if process.alive and process.pid in parents]:
                return max(masters, key=lambda process: process.started).pid
        return self._root.pid

    def signal_master(self, number: signal.Signals) -> None:
        os.kill(self.master, number)

    def ask_to_stop(self) -> None:
        self._members = self.processes()
        # Not Popen.send_signal, which would wait for a root that has ended.
        self.signal_master(signal.SIGTERM)

    def wait_until_gone(self) -> set[int]:
        """Wait for the whole tree, with KILL for what outlives its time; whatever is left even then is returned."""
        for pid in self._outlive(STOP_SECONDS):
            _kill(pid)
        left = self._outlive(KILL_SECONDS)
        if not left:
            self._root.wait()
        self._output.close()
        return left

    def _outlive(self, seconds: float) -> set[int]:
        deadline = time.monotonic() + seconds
        while (left := self._living()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return left

    def _living(self) -> set[int]:
        """Who is still there, of the tree as it was and as it is; a process id in other hands has another start."""
        self._members.update(self.processes())
        now = processes.everyone()
        return {
            pid
            for pid, was in self._members.items()
            if pid in now and now[pid].started == was.started and now[pid].alive
        }

    def _last_output(self) -> str:
        self._output.seek(0)
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-SHOWN_LINES:])


class Fleet:
    def __init__(self) -> None:
        self._servers: list[Server] = []

    def start(self, contender: Contender, setup: Setup) -> Server:
        with held():
            server = Server(contender, setup)
            self._servers.append(server)
        server.wait_until_serving()
        return server

    def stop(self) -> None:
        with held():
            stopping, self._servers = self._servers, []
            for server in stopping:
                server.ask_to_stop()
            if left := {server.name: pids for server in stopping if (pids := server.wait_until_gone())}:
                raise BenchmarkError(f"these processes could not be stopped: {left}")


@contextlib.contextmanager
def new_fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    try:
        yield fleet
    finally:
        fleet.stop()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _workers_that_answer(port: int, requests: int) -> set[int]:
    """Ask for `/pid` on several connections a little apart; each answer holds its worker, so others take the rest."""
    clients: list[socket.socket] = []
    try:
        for _ in range(requests):
            client = socket.create_connection(("127.0.0.1", port), timeout=IO_SECONDS)
            clients.append(client)
            client.sendall(b"GET /pid HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            time.sleep(PROBE_APART_SECONDS)
        return {_pid_in(_read_all(client)) for client in clients}
    finally:
        for client in clients:
            client.close()


def _read_all(client: socket.socket) -> bytes:
    received = b""
    while chunk := client.recv(4096):
        received += chunk
    return received


def _pid_in(response: bytes) -> int:
    body = response.partition(b"\r\n\r\n")[2].strip()
    if not body.isdigit():
        raise ConnectionError(f"no process id in {response!r}")
    return int(body)
