"""The real command line as a subprocess: started, watched, stopped, and proved to have left nothing behind.

Everything these tests assume about the wording of the server's output stands in the patterns below.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, final

import httpx

from tests.helpers import proc
from tests.helpers.raw import Address, Client, Response, fetch
from tests.helpers.waiting import DEADLINE, eventually

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "examples.asgi_app:app"
# For connections that are idle while processes start, which on a busy machine takes longer than the usual 5 s.
KEPT = 60
KEEP = ("--timeout-keep-alive", str(KEPT))
# For tests that want exactly whose turn it is: in auto, a worker that the machine lets wait is passed over.
IN_TURN = ("--dispatch", "connection")

LISTENING_ON = re.compile(r"\bListening on ((?:unix:|https?://)[^\s,;\"]+)")
WORKER_LISTENS = re.compile(r"\bWorker (\d+) \(slot (\d+), pid (\d+)\) .*listening")
TAKES_OVER = re.compile(r"\bProcess (\d+) takes over")
# What no run may print unless its test says that it must.
NOISE = re.compile(r"Traceback \(most recent|never retrieved|never awaited|Exception ignored|\b\w+Warning:")

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MARK = "CLUSTER_E2E_MARK"
# Settings of the machine that runs the tests must not reach the servers under test.
_OURS = re.compile(r"CLUSTERSERVE_.*|WEB_CONCURRENCY|PORT|FORWARDED_ALLOW_IPS|UVICORN_.*|NO_COLOR|FORCE_COLOR|TMPDIR")


@dataclass(frozen=True)
class Line:
    stream: str
    text: str
    at: float


@dataclass(frozen=True)
class Worker:
    id: int
    slot: int
    pid: int


@dataclass(frozen=True)
class Finished:
    """A command line that has run to its end."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def lines(self, pattern: str) -> list[str]:
        """The lines, of both streams, in which `pattern` is found."""
        return [line for line in self.text.splitlines() if re.search(pattern, line)]


def environment(mark: str, extra: Mapping[str, str] | None, scratch: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not _OURS.fullmatch(name)}
    return {**env, _MARK: mark, "TMPDIR": str(scratch), **(extra or {})}


def new_mark() -> tuple[str, str]:
    """A value for the environment by which a server's processes are known, and the text to look for."""
    value = uuid.uuid4().hex
    return value, f"{_MARK}={value}"


def python(*arguments: str, interpreter: str = sys.executable) -> list[str]:
    return [interpreter, "-m", "clusterserve", *arguments]


class LeftoverError(AssertionError):
    """A server ended and something of it did not."""


def end_processes(mark: str, *, within: float) -> list[str]:
    """Wait for the processes with this mark to go; kill those that do not, and say which they were."""
    deadline = time.monotonic() + within
    with contextlib.suppress(AssertionError):
        eventually(lambda: not proc.marked(mark), "every process is gone", within=max(0.0, deadline - time.monotonic()))
    survivors = [(pid, f"process {pid} ({proc.state(pid)}) {proc.command(pid)}") for pid in proc.marked(mark)]
    for pid, _ in survivors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [name for _, name in survivors]


@final
class Server:
    """One running master and its workers.

    Made by the `serve` fixture, which closes it: `close` asks a running server to stop, wants exit code 0 then, and in
    any case wants no process, no socket file, no temporary file and no unexpected traceback.
    """

    def __init__(
        self,
        *options: str,
        app: str = EXAMPLE,
        workers: int | None = 1,
        bind: str | Sequence[str] | None = "127.0.0.1:0",
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        noise: bool = False,
        open_files: int | None = None,
        linger: float = 0.0,
        prefix: Sequence[str] = (),
        interpreter: str = sys.executable,
    ) -> None:
        binds = [bind] if isinstance(bind, str) else list(bind or ())
        arguments = [app, *(part for each in binds for part in ("--bind", each)), *options]
        if workers is not None:
            arguments += ["--workers", str(workers)]
        self.wanted_workers = workers or 1
        self.wanted_addresses = max(1, len(binds))
        self.noise = noise
        #: How long processes may outlive the master (seconds): those of a debugger do.
        self.linger = linger
        self.killed = False
        mark, self._mark = new_mark()
        self._scratch = tempfile.TemporaryDirectory(prefix="clusterserve-e2e-")
        # Short, since a unix socket's path must fit into 107 bytes.
        self.scratch = Path(self._scratch.name)
        self._lines: list[Line] = []
        self._more = threading.Condition()
        self._open_streams = 2
        self.command = [*prefix, *python(*arguments, interpreter=interpreter)]
        if open_files is not None:
            self.command = ["sh", "-c", f'ulimit -Sn {open_files}; exec "$@"', "sh", *self.command]
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment(mark, env, self.scratch),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            # A group of its own: the terminal's Ctrl-C at the tests must not look like one at the server.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._threads = [
            threading.Thread(target=self._collect, args=(name, stream), daemon=True)
            for name, stream in (("out", self._process.stdout), ("err", self._process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    # ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _collect(self, name: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._more:
                    self._lines.append(Line(name, _COLOURS.sub("", line.rstrip("\n")), time.monotonic()))
                    self._more.notify_all()
        with self._more:
            self._open_streams -= 1
            self._more.notify_all()

    @property
    def lines(self) -> list[Line]:
        with self._more:
            return list(self._lines)

    @property
    def output(self) -> str:
        return "\n".join(f"{line.stream}| {line.text}" for line in self.lines)

    def found(self, pattern: str | re.Pattern[str]) -> list[re.Match[str]]:
        """Every match so far, at most one a line."""
        return [match for line in self.lines if (match := re.search(pattern, line.text))]

    def times(self, pattern: str | re.Pattern[str]) -> list[float]:
        """When the lines in which `pattern` is found were read."""
        return [line.at for line in self.lines if re.search(pattern, line.text)]

    def wait_for(
        self, pattern: str | re.Pattern[str], *, count: int = 1, within: float = DEADLINE
    ) -> list[re.Match[str]]:
        """Wait until `pattern` was found in `count` lines, those printed before the call included."""
        deadline = time.monotonic() + within
        with self._more:
            while True:
                matches = [match for line in self._lines if (match := re.search(pattern, line.text))]
                if len(matches) >= count:
                    return matches
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._open_streams:
                    why = "the output has ended" if not self._open_streams else f"not within {within:g} s"
                    break
                self._more.wait(remaining)
        raise AssertionError(f"{len(matches)} of {count} lines with {pattern!r}: {why}\n{self.output}")

    def wait_ready(self) -> Server:
        self.wait_for(LISTENING_ON, count=self.wanted_addresses)
        self.wait_for(WORKER_LISTENS, count=self.wanted_workers)
        return self

    # ── what it serves ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def addresses(self) -> list[Address]:
        return [Address.parse(match[1]) for match in self.found(LISTENING_ON)]

    @property
    def address(self) -> Address:
        return self.addresses[0]

    @property
    def url(self) -> str:
        return self.address.url

    def client(self, source: str | None = None) -> httpx.Client:
        """An httpx client with one pool; keep-alive as httpx does it."""
        uds = self.address.sockaddr if isinstance(self.address.sockaddr, str) else None
        transport = httpx.HTTPTransport(uds=uds, local_address=source)
        return httpx.Client(base_url=self.url, transport=transport, timeout=DEADLINE, trust_env=False)

    def connect(self, *, source: str | None = None, receive_buffer: int | None = None) -> Client:
        return Client(self.address, source=source, receive_buffer=receive_buffer)

    def get(self, target: str, *, source: str | None = None) -> Response:
        """One request on a connection of its own."""
        return fetch(self.address, target, source=source)

    def ask_id(self, *, source: str | None = None) -> int:
        """The id of the worker that gets a new connection."""
        worker_id = self.get("/whoami", source=source).json()["id"]
        assert isinstance(worker_id, int)
        return worker_id

    def warm(self) -> Server:
        """Wait until every living worker takes its turn.

        A worker's first request costs it more time (first imports, first pages) than rr waits for it on a busy machine.
        """
        wanted = {worker.id for worker in self.workers}
        eventually(lambda: {self.ask_id() for _ in wanted} == wanted, f"{sorted(wanted)} take turns")
        return self

    # ── its processes ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def master(self) -> int:
        """The process that is the master now: the first one, or, behind upgrades, the last that took over."""
        found = self.found(TAKES_OVER)
        return int(found[-1][1]) if found else self.pid

    def upgrade(self) -> int:
        """Have another master take over, and the one before it leave; its process id."""
        before, count = self.master, len(self.found(TAKES_OVER)) + 1
        self.signal(signal.SIGUSR2)
        self.wait_for(TAKES_OVER, count=count)
        self.wait_for("has left everything to process", count=count)
        if before != 1:
            eventually(lambda: not proc.alive(before), "the old master is gone")
        return self.master

    @property
    def announced(self) -> list[Worker]:
        """Every worker that ever said it listens, in that order."""
        return [Worker(int(m[1]), int(m[2]), int(m[3])) for m in self.found(WORKER_LISTENS)]

    @property
    def workers(self) -> list[Worker]:
        """The announced workers that are alive, by slot."""
        return sorted((each for each in self.announced if proc.alive(each.pid)), key=lambda each: each.slot)

    def processes(self) -> list[int]:
        """Every living process of this server, found by its environment."""
        return proc.marked(self._mark)

    @property
    def running(self) -> bool:
        """Whether the master has not ended."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        if self.master == self.pid:
            self._process.send_signal(number)
        else:
            os.kill(self.master, number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL for the master, which then cannot clean up."""
        self.killed = True
        self.signal(signal.SIGKILL)

    def wait(self, within: float = DEADLINE) -> int:
        """The exit code, once there is one."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within:g} s\n{self.output}") from None

    def stop(self) -> int:
        """Stop by SIGTERM; the exit code, of the first master if there were several."""
        self.terminate()
        eventually(lambda: self.master == self.pid or not proc.alive(self.master), "the last master is gone")
        return self.wait()

    @contextlib.contextmanager
    def stopped_workers(self) -> Iterator[list[Worker]]:
        """The workers cannot run inside this block: SIGSTOP, and SIGCONT at its end."""
        workers = self.workers
        try:
            for worker in workers:
                os.kill(worker.pid, signal.SIGSTOP)
            for worker in workers:
                eventually(lambda pid=worker.pid: proc.state(pid) == "T", f"{worker} is stopped")  # type: ignore[misc]
            yield workers
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGCONT)

    def accepted_by_master(self, client: Client) -> bool:
        """Whether the server's end of this connection is a descriptor of the master."""
        inode = proc.accepted_inodes(self.address.port, [client.port]).get(client.port)
        return inode in proc.socket_inodes(self.pid)

    def sockets(self) -> int:
        """How many sockets the master and its workers hold in all."""
        return sum(len(proc.socket_inodes(pid)) for pid in self.processes())

    def no_listener_left(self) -> bool:
        """Whether nothing listens any more where this server did; learned from the kernel, not by connecting."""
        return all(
            not (
                proc.unix_inodes(each.sockaddr.replace("\0", "@"))
                if isinstance(each.sockaddr, str)
                else proc.listening_inodes(each.port)
            )
            for each in self.addresses
        )

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        faults: list[str] = []
        try:
            if self._process.poll() is None or (self.master != self.pid and proc.alive(self.master)):
                code = self.stop()
                if code != 0:
                    faults.append(f"exit code {code} on SIGTERM")
        except AssertionError as error:
            faults.append(str(error).partition("\n")[0])
        finally:
            # A master that ends in order has waited for its workers; only after SIGKILL they need a moment.
            faults += end_processes(self._mark, within=max(self.linger, DEADLINE if self.killed else 0.0))
            self._process.wait()
            for thread in self._threads:
                thread.join(DEADLINE)
        if not self.killed:
            faults += [f"file {path}" for path in self.scratch.iterdir()]
            faults += [
                f"socket file {each.sockaddr}"
                for each in self.addresses
                if isinstance(each.sockaddr, str)
                and not each.sockaddr.startswith("\0")
                and os.path.exists(each.sockaddr)
            ]
        self._scratch.cleanup()
        if not self.noise:
            faults += [f"unexpected in the output: {line.text}" for line in self.lines if NOISE.search(line.text)]
        if faults:
            raise LeftoverError("\n".join([*faults, "── output ──", self.output]))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Starts a server, waits until it listens, and closes it when the fixture's scope ends.
Serve = Callable[..., Server]


@contextlib.contextmanager
def serving() -> Iterator[Serve]:
    """A factory of servers, all of which are closed at the end of the block."""
    with contextlib.ExitStack() as stack:

        def serve(*options: str, ready: bool = True, **settings: object) -> Server:
            server = stack.enter_context(Server(*options, **settings))  # type: ignore[arg-type]
            return server.wait_ready() if ready else server

        yield serve


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    within: float = DEADLINE,
    cwd: Path = ROOT,
) -> Finished:
    """A command line that must end by itself, and leave nothing."""
    value, mark = new_mark()
    with tempfile.TemporaryDirectory(prefix="clusterserve-e2e-") as scratch:
        process = subprocess.Popen(
            python(*arguments),
            cwd=cwd,
            env=environment(value, env, Path(scratch)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            end_processes(mark, within=0.0)
            out, err = process.communicate()
            raise AssertionError(f"did not end by itself within {within:g} s:\n{out}{err}") from None
        left = end_processes(mark, within=0.0) + [f"file {path}" for path in Path(scratch).iterdir()]
    finished = Finished(process.returncode, _COLOURS.sub("", out), _COLOURS.sub("", err))
    if left:
        raise LeftoverError("\n".join([*left, "── output ──", finished.text]))
    return finished
