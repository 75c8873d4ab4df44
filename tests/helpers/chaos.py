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

In the end, master and workers hold as many descriptors of each kind as in the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from tests.helpers import proc
from tests.helpers.chaos_wire import EndedError, Question, Wire, WrongError, pieces, question
from tests.helpers.raw import fetch
from tests.helpers.server import Server
from tests.helpers.waiting import eventually

APP = "tests.helpers.apps.chaos:app"
WSGI_APP = "tests.helpers.apps.chaos_wsgi:app"
#: What the server is started with: workers that are killed all the time are to be replaced at once all the same.
OPTIONS = ("--restart-backoff", "0.05", "--restart-backoff-max", "0.2", "--no-access-log")
BOUND = 20.0
NOTICE = 1.0
SCALING = re.compile(r"Scaling from \d+ to (\d+) worker")
MOST_WORKERS = 5
#: What is done to the workers, and how often compared with the others.
EVENTS = {"HUP": 3, "TTIN": 3, "TTOU": 3, "KILL": 5, "KILL all": 1, "STOP": 6}
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

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
        for title, counter in (("met", self.met), ("done", self.events)):
            lines.append(f"{title}: {', '.join(f'{name} {count}' for name, count in sorted(counter.items()))}")
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
    ) -> None:
        self.report = Report(seed)
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
        before = self._at_rest()
        workers = len(self._server.workers)
        # A template is the master's child too.
        self._others = len(before) - 1 - workers
        self._began = time.monotonic()
        asyncio.run(self._clients_and_events())
        self._scale_back(workers)
        self._compare(before)
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
            try:
                wire = await asyncio.wait_for(Wire.connect(self._address), BOUND)
            except (WrongError, asyncio.TimeoutError) as error:
                self.fault(number, str(error) or f"not connected within {BOUND:g} s", "connecting")
                continue
            client = _Client(self, wire, chance)
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
        extra = 0
        stopped: dict[int, float] = {}
        while not self._over:
            await asyncio.sleep(chance.uniform(0.1, 0.7))
            now = time.monotonic()
            for pid in [pid for pid, until in stopped.items() if until < now]:
                del stopped[pid]
                _signal(pid, signal.SIGCONT)
            if now - self._began > self._seconds:
                self._over = True
            kind = first.pop() if first else chance.choices([*self._chosen], [*self._chosen.values()])[0]
            pids = [worker.pid for worker in self._server.workers]
            if kind == "HUP":
                self._server.signal(signal.SIGHUP)
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

    def _continue_all(self) -> None:
        for pid in self._server.processes():
            _signal(pid, signal.SIGCONT)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _scale_back(self, wanted: int) -> None:
        """As many workers as in the beginning; told one at a time, as the kernel merges equal signals."""
        sent = self.report.events["TTIN"] + self.report.events["TTOU"]
        # Fewer when some were merged; no matter, as the last line counts.
        with contextlib.suppress(AssertionError):
            eventually(lambda: len(self._server.found(SCALING)) >= sent, "every signal is heard", within=2.0)
        try:
            for _ in range(2 * MOST_WORKERS):
                lines = self._server.found(SCALING)
                target = int(lines[-1][1]) if lines else wanted
                eventually(lambda target=target: self._settled(target), f"{target} workers", within=60.0)  # type: ignore[misc]
                if target == wanted:
                    return
                self._server.signal(signal.SIGTTOU if target > wanted else signal.SIGTTIN)
                self._server.wait_for(SCALING, count=len(lines) + 1)
        except AssertionError as error:
            self.report.faults.append(Fault(str(error), "in the end"))
            return
        self.report.faults.append(Fault(f"not {wanted} workers but {self._server.workers}", "in the end"))

    def _settled(self, count: int) -> bool:
        # A worker that is to go, or has yet to listen, is a child as well.
        return len(self._server.workers) == count == len(proc.children(self._server.pid)) - self._others

    def _at_rest(self) -> list[dict[str, int]]:
        """What each process holds when every worker has served and nobody is connected."""
        for number in range(8):
            fetch(self._address, f"/plain?id=warm{number}&n=1")
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
        workers = sorted((_kinds(pid) for pid in proc.children(self._server.pid)), key=str)
        return [_kinds(self._server.pid), *workers]


@final
class _Client:
    """One connection's life."""

    def __init__(self, chaos: Chaos, wire: Wire, chance: random.Random) -> None:
        self._chaos = chaos
        self._wire = wire
        self._chance = chance
        #: When the connection last was in order.
        self._good = time.monotonic()
        self._answers = 0
        self._doing = ""

    def __repr__(self) -> str:
        excused = "" if self._chaos.killed_since(self._good) else "no "
        return f"{self._wire.name}, {self._answers} answers, {self._doing}, {excused}worker killed since the last"

    async def live(self, rounds: int) -> None:
        """So many rounds at most; raises WrongError for what is never allowed."""
        met = self._chaos.report.met
        for _ in range(rounds):
            if self._chaos.over:
                return
            kind = self._chance.choices(["one", "pipeline", "slow", "idle", "abort", "half"], [20, 6, 6, 6, 2, 1])[0]
            self._doing = kind
            if kind == "idle":
                await asyncio.sleep(self._chance.uniform(0.0, 0.4))
            elif kind == "abort":
                await asyncio.wait_for(self._abort(), BOUND)
                return
            elif kind == "half":
                await asyncio.wait_for(self._half_close(), BOUND)
                return
            try:
                self._wire.idle()
                if kind != "idle" and not await asyncio.wait_for(self._ask(kind), BOUND):
                    return
            except EndedError as error:
                # Rule 2: nothing but a killed worker excuses it.
                what = "cut responses" if error.begun else "ends without an answer"
                if not self._chaos.killed_since(self._good):
                    raise WrongError(f"{error} ({kind}), and no worker was killed meanwhile") from None
                met["idle ends" if kind == "idle" else what] += 1
                return

    async def _ask(self, kind: str) -> bool:
        """Ask and read what was asked; False when the connection is over, in order."""
        count = self._chance.randint(2, 6) if kind == "pipeline" else 1
        questions = [self._chaos.next_question(self._chance) for _ in range(count)]
        data = b"".join(each.data for each in questions)
        parts = pieces(self._chance, data, self._chance.randint(2, 8)) if kind == "slow" else [data]
        if kind == "pipeline" and self._chance.random() < 0.5:
            parts = pieces(self._chance, data, 2)
        writer = asyncio.ensure_future(self._write(parts))
        try:
            for number, asked in enumerate(questions):
                self._doing = f"{kind} {number + 1}/{count}: {asked}, {len(asked.data)} bytes"
                status = await self._wire.answer(asked)
                if status != 200:
                    if status != 502:
                        raise WrongError(f"a {status}, and no limit for it was reached")
                    if not self._chaos.killed_since(self._good):
                        raise WrongError("a 502, and no worker was killed meanwhile")
                    self._chaos.report.met["clean 502"] += 1
                    return False
                self._good = time.monotonic()
                self._answers += 1
                self._chaos.report.met["answers"] += 1
            # An early answer can be there before its request has been written.
            await writer
        finally:
            writer.cancel()
            # What went wrong in writing counts also if reading saw nothing of it.
            for result in await asyncio.gather(writer, return_exceptions=True):
                if isinstance(result, WrongError):
                    raise result
        return True

    async def _write(self, parts: list[bytes]) -> None:
        for number, part in enumerate(parts):
            if number:
                await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.005, 0.03]))
            await self._wire.send(part)

    async def _abort(self) -> None:
        """Leave at a bad moment, one way or the other."""
        data = self._chaos.next_question(self._chance).data
        try:
            await self._wire.send(data if self._chance.random() < 0.5 else data[: self._chance.randrange(len(data))])
            await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.01, 0.05]))
        finally:
            if self._chance.random() < 0.5:
                self._wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._chaos.report.met["aborts"] += 1

    async def _half_close(self) -> None:
        asked = self._chaos.next_question(self._chance)
        await self._wire.send(asked.data)
        self._wire.socket.shutdown(socket.SHUT_WR)
        try:
            if await self._wire.answer(asked) == 200:
                await self._wire.end()
            self._chaos.report.met["half-closed, answered"] += 1
        except EndedError:
            self._chaos.report.met["half-closed, ended"] += 1


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
