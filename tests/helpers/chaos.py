"""Chaos: clients that never lie, while workers are reloaded, scaled, killed and stopped at random from a seed.

What a client may meet, and nothing else:

1. Every response is the one to the oldest unanswered request of its connection: its id, the checksum of the body the
   application read, and every byte.  No kept connection is told to close.
2. Only when a worker was killed since the connection last was in order (connected, or its last response complete), or
   not more than `NOTICE` seconds before that (a client reads a dead worker's response, and asks it again unknowingly):
   a. a whole `502` with `Connection: close` and an orderly end after it, or
   b. an orderly end before a response, or
   c. an orderly end within a response whose bytes so far are right, and which its framing shows to be cut.
3. Never, whatever happens: a reset, a refused connection, a `503` or `504` (no limit that gives one is reached here), a
   byte that was not asked for, the end of an idle connection without 2, no end within `BOUND` seconds.
4. A client that has half-closed gets right bytes and an orderly end, not necessarily all of its response.
5. With TLS a worker that leaves may say that a response is the last one, and ends the connection in order then, also
   before other requests that the client had sent on it; a connection that has asked nothing for `LAST_CALL` may end.
   A worker that was killed leaves no word of TLS, its kernel a reset of what it had not read, and there is no 502.
6. Once the server was told to stop: a refused connection, the end of an idle one, a last response that says so, and for
   what was asked later than that a `503`, an end or a reset.  What was asked before is answered, but for what was sent
   on the heels of another request.

In the end, master and workers hold as many descriptors of each kind as in the beginning; a server that was told to stop
has ended with exit code 0, and left nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from tests.helpers import proc
from tests.helpers.chaos_client import BOUND, Client
from tests.helpers.chaos_wire import EndedError, Question, ResetError, Wire, WrongError, introduction, question
from tests.helpers.raw import Client as Plain
from tests.helpers.raw import request
from tests.helpers.server import TAKES_OVER, Server
from tests.helpers.waiting import eventually

APP = "tests.helpers.apps.chaos:app"
WSGI_APP = "tests.helpers.apps.chaos_wsgi:app"
#: What the server is started with: workers that are killed all the time are to be replaced at once all the same.
OPTIONS = ("--restart-backoff", "0.05", "--restart-backoff-max", "0.2", "--no-access-log")
NOTICE = 1.0
UPGRADED = re.compile(r"has left everything to process|Upgrade failed")
SCALING = re.compile(r"Scaling from \d+ to (\d+) worker")
MOST_WORKERS = 5
#: What is done to the workers, and how often compared with the others.
EVENTS = {"HUP": 3, "TTIN": 3, "TTOU": 3, "KILL": 5, "KILL all": 1, "STOP": 6}
#: What is done if it is asked for.
MORE_EVENTS = {"USR2": 3}
#: How long a server may take to stop beyond its grace time (seconds).
STOPPING = 45.0
TOO_MANY_FAULTS = 1000
SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Fault:
    """One thing that is never allowed: what, and the circumstances."""

    what: str
    where: str


@dataclass
class Report:
    """What was met."""

    seed: str
    #: What is never allowed; empty when all is well.
    faults: list[Fault] = field(default_factory=list)
    #: What became of requests and connections.
    met: Counter[str] = field(default_factory=Counter)
    #: What was done to the workers.
    events: Counter[str] = field(default_factory=Counter)
    #: What the master occupied in the beginning, and in the end (KiB).
    memory: tuple[int, int] | None = None

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
        for title, counter in (("met", self.met), ("done", self.events)):
            lines.append(f"{title}: {', '.join(f'{name} {count}' for name, count in sorted(counter.items()))}")
        if self.memory is not None:
            lines.append("the master's memory: {} KiB, {} KiB in the end".format(*self.memory))
        for what, count in Counter(fault.what for fault in self.faults).most_common():
            lines.append(f"FAULT ({count} times): {what}")
            lines += [f"    {fault.where}" for fault in self.faults if fault.what == what][:SHOWN_FAULTS]
        return "\n".join(lines)


@final
class Chaos:
    """One run against a server that serves `APP`; the server is as it was when `run` returns."""

    def __init__(
        self,
        server: Server,
        seed: str,
        *,
        seconds: float,
        connections: int = 64,
        events: Mapping[str, int] = EVENTS,
        tls: ssl.SSLContext | None = None,
        proxied: bool = False,
        stop: bool = False,
    ) -> None:
        """`proxied`: each connection begins with a PROXY header.  `stop`: the server is told to, under the clients."""
        self.report = Report(seed)
        self.tls = tls
        #: When the server was told to stop.
        self.told: float | None = None
        self._proxied = proxied
        self._stop = stop
        self._server = server
        self._address = server.address
        self._seconds = seconds
        self._connections = connections
        self._chosen = dict(events)
        self._began = time.monotonic()
        self._over = False
        self._kills: list[float] = []
        self._asked = 0
        self._others = 0

    def run(self) -> Report:
        workers = len(self._server.workers)
        if "USR2" in self._chosen:
            # One that has taken over holds its sockets in another way than the first.
            self._server.upgrade()
        before = self._at_rest()
        memory = _memory(self._server.master)
        # A template is the master's child too.
        self._others = len(before) - 1 - workers
        self._began = time.monotonic()
        upgrades = len(self._server.found(TAKES_OVER))
        asyncio.run(self._clients_and_events())
        if self._stop:
            self._see_it_stop()
        else:
            self._scale_back(workers)
            self._compare(before)
            self.report.memory = memory, _memory(self._server.master)
        if "USR2" in self._chosen:
            self.report.met["upgrades"] = len(self._server.found(TAKES_OVER)) - upgrades
        return self.report

    async def _clients_and_events(self) -> None:
        clients = [asyncio.ensure_future(self._client(number)) for number in range(self._connections)]
        events = asyncio.ensure_future(self._events())
        everyone = asyncio.gather(events, *clients)
        try:
            await everyone
        finally:
            self._continue_all()
            everyone.cancel()
            await asyncio.gather(everyone, return_exceptions=True)

    # ── the clients ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self.report.seed}/{number}")
        while not self._over:
            began = time.monotonic()
            proxied = introduction(chance) if self._proxied else None
            try:
                wire = await asyncio.wait_for(Wire.connect(self._address, tls=self.tls, proxied=proxied), BOUND)
            except (WrongError, EndedError, asyncio.TimeoutError) as error:
                if self.told is not None:
                    # Nobody listens any more, or will in a moment.
                    return
                if self.tls is not None and isinstance(error, (ResetError, EndedError)) and self.killed_since(began):
                    self.report.met["handshakes cut"] += 1
                else:
                    self.fault(number, str(error) or f"not connected within {BOUND:g} s", "connecting")
                continue
            client = Client(self, wire, chance)
            try:
                await client.live(chance.choice([1, 3, 20, 100]))
            except WrongError as error:
                self.fault(number, str(error), repr(client))
            except asyncio.TimeoutError:
                self.fault(number, f"nothing more within {BOUND:g} s", repr(client))
            finally:
                wire.close()

    def next_question(self, chance: random.Random) -> Question:
        self._asked += 1
        return question(chance, f"{self._asked}-{chance.getrandbits(32):08x}")

    def killed_since(self, then: float) -> bool:
        """Whether a kill excuses what happens to a connection that was in order then."""
        return any(kill >= then - NOTICE for kill in self._kills[-20:])

    def late(self, since: float) -> bool:
        """Whether what was whole since then came when the server was told to stop already, or could have."""
        return self.told is not None and since >= self.told

    @property
    def over(self) -> bool:
        return self._over

    def fault(self, number: int, what: str, doing: str) -> None:
        at = time.monotonic() - self._began
        lately = [f"{at - (kill - self._began):.2f} s" for kill in self._kills[-3:]]
        where = f"at {at:.2f} s: client {number}, {doing}; kills {', '.join(lately) or 'none'} before"
        self.report.faults.append(Fault(what, where))
        if len(self.report.faults) >= TOO_MANY_FAULTS:
            self._over = True

    # ── the events ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _events(self) -> None:
        """One after the other; each takes effect while the next ones happen already."""
        chance = random.Random(f"{self.report.seed}/events")
        # Each once at first, in any order, so that no run is without one of them.
        first = chance.sample([*self._chosen], len(self._chosen))
        extra, master = 0, self._server.master
        stopped: dict[int, float] = {}
        while not self._over:
            await asyncio.sleep(chance.uniform(0.1, 0.7))
            now = time.monotonic()
            for pid in [pid for pid, until in stopped.items() if until < now]:
                del stopped[pid]
                _signal(pid, signal.SIGCONT)
            if now - self._began > self._seconds:
                break
            kind = first.pop() if first else chance.choices([*self._chosen], [*self._chosen.values()])[0]
            pids = [worker.pid for worker in self._server.workers]
            if self._server.master != master:
                # Its successor starts as many workers as the first one did.
                master, extra = self._server.master, 0
            if kind == "HUP":
                self._server.signal(signal.SIGHUP)
            elif kind == "USR2":
                self._server.signal(signal.SIGUSR2)
            elif kind == "TTIN" and extra < MOST_WORKERS:
                extra += 1
                self._server.signal(signal.SIGTTIN)
            elif kind == "TTOU" and extra > 0:
                extra -= 1
                self._server.signal(signal.SIGTTOU)
            elif kind.startswith("KILL") and pids:
                victims = pids if kind == "KILL all" else [chance.choice(pids)]
                self._kills.append(now)
                for pid in victims:
                    _signal(pid, signal.SIGKILL)
            elif kind == "STOP" and pids:
                pid = chance.choice(pids)
                stopped[pid] = now + chance.uniform(0.0, 1.5)
                _signal(pid, signal.SIGSTOP)
            else:
                # Not now: there is nobody to stop, or as many workers as there may be.
                if not self.report.events[kind]:
                    first.insert(0, kind)
                continue
            self.report.events[kind] += 1
        self._continue_all()
        if self._stop:
            await self._tell_to_stop()
        self._over = True

    async def _tell_to_stop(self) -> None:
        self.told = time.monotonic()
        self._server.terminate()
        with contextlib.suppress(AssertionError):
            await asyncio.to_thread(
                eventually, lambda: not proc.alive(self._server.master), "it has stopped", within=STOPPING
            )

    def _continue_all(self) -> None:
        for pid in self._server.processes():
            _signal(pid, signal.SIGCONT)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _see_it_stop(self) -> None:
        """Whether it has; `Server.close` sees that nothing is left."""
        assert self.told is not None
        if proc.alive(self._server.master):
            self.report.faults.append(Fault(f"it did not stop within {STOPPING:g} s", "in the end"))
            return
        code = self._server.wait()
        if code:
            self.report.faults.append(Fault(f"exit code {code}", "in the end"))

    def _scale_back(self, wanted: int) -> None:
        """As many workers as in the beginning; told one at a time, as the kernel merges equal signals."""
        sent = self.report.events["TTIN"] + self.report.events["TTOU"]
        # Fewer when some were merged; no matter, as the last line counts.
        with contextlib.suppress(AssertionError):
            eventually(lambda: len(self._server.found(SCALING)) >= sent, "every signal is heard", within=2.0)
        try:
            eventually(self._upgraded, "upgrades come to their end", within=60.0)
            for _ in range(2 * MOST_WORKERS):
                lines = self._scalings()
                target = int(lines[-1][1]) if lines else wanted
                eventually(lambda target=target: self._settled(target), f"{target} workers", within=60.0)  # type: ignore[misc]
                if target == wanted:
                    return
                self._server.signal(signal.SIGTTOU if target > wanted else signal.SIGTTIN)
                eventually(lambda lines=lines: len(self._scalings()) > len(lines), "it is heard")  # type: ignore[misc]
        except AssertionError as error:
            self.report.faults.append(Fault(str(error), "in the end"))
            return
        self.report.faults.append(Fault(f"not {wanted} workers but {self._server.workers}", "in the end"))

    def _upgraded(self) -> bool:
        begun, over = self._server.found("Upgrading: process"), self._server.found(UPGRADED)
        return len(begun) == len(over)

    def _scalings(self) -> list[re.Match[str]]:
        """What the master of now said about its workers' number: a new one starts with as many as the first."""
        found: list[re.Match[str]] = []
        for line in self._server.lines:
            if TAKES_OVER.search(line.text):
                found.clear()
            found += SCALING.finditer(line.text)
        return found

    def _settled(self, count: int) -> bool:
        # A worker that is to go, or has yet to listen, is a child as well.
        return len(self._server.workers) == count == len(proc.children(self._server.master)) - self._others

    def _at_rest(self) -> list[dict[str, int]]:
        """What each process holds when every worker has served and nobody is connected."""
        for number in range(8):
            with Plain(self._address, tls=self.tls) as client:
                client.send(request("GET", f"/plain?id=warm{number}&n=1", "Connection: close"))
                client.response()
        seen: list[list[dict[str, int]]] = []

        def steady() -> bool:
            seen.append(self._held())
            return len(seen) > 20 and seen[-1] == seen[-20]

        eventually(steady, "descriptors are steady")
        return seen[-1]

    def _compare(self, before: list[dict[str, int]]) -> None:
        try:
            eventually(lambda: self._held() == before, "as many descriptors as in the beginning")
        except AssertionError:
            self.report.faults.append(Fault(f"descriptors {self._held()}, in the beginning {before}", "in the end"))

    def _held(self) -> list[dict[str, int]]:
        """By process, the master first: descriptors by kind."""
        workers = sorted((_kinds(pid) for pid in proc.children(self._server.master)), key=str)
        return [_kinds(self._server.master), *workers]


def _memory(pid: int) -> int:
    """What it occupies (KiB)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        # It ended by itself meanwhile.
        return


def _kinds(pid: int) -> dict[str, int]:
    """Descriptors by kind.

    libuv opens /dev/null with its first stream, and keeps it; the master looks at a worker in /proc when that is late
    for the first time, and lets go when it is dead.
    """
    try:
        links = proc.descriptors(pid).values()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    kinds = Counter(re.sub(r":\[\d+\]$", "", link) for link in links if link != "/dev/null" and not _of_living(link))
    return dict(sorted(kinds.items()))


def _of_living(link: str) -> bool:
    found = re.match(r"/proc/(\d+)/", link)
    return found is not None and proc.alive(int(found[1]))
