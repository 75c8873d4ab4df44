"""What one chaos client does on one connection, and what it holds for right: the rules stand in `chaos`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
import time
from typing import TYPE_CHECKING, final

from tests.helpers.chaos_wire import EndedError, ResetError, Wire, WrongError, pieces

if TYPE_CHECKING:
    from tests.helpers.chaos import Chaos

#: How long anything may take (seconds).
BOUND = 20.0
#: With TLS a connection that has asked nothing for so long may be closed (seconds; the server's 5, heard of late).
LAST_CALL = 4.5


@final
class Client:
    """One connection's life."""

    def __init__(self, chaos: Chaos, wire: Wire, chance: random.Random) -> None:
        self._chaos = chaos
        self._wire = wire
        self._chance = chance
        #: When the connection last was in order.
        self._good = time.monotonic()
        #: When everything that was asked had been sent.
        self._asked = self._good
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
            # Until its last piece is sent, nothing is owed to a request.
            self._asked, idle = math.inf, False
            try:
                if kind == "abort":
                    await asyncio.wait_for(self._abort(), BOUND)
                    return
                if kind == "half" and self._chaos.tls is None:
                    await asyncio.wait_for(self._half_close(), BOUND)
                    return
                idle = True
                self._wire.idle()
                idle = False
                if kind != "idle" and not await asyncio.wait_for(self._ask(kind), BOUND):
                    return
            except EndedError as error:
                what = "cut responses" if error.begun else "ends without an answer"
                if not self._may_end(error, idle=idle):
                    raise WrongError(f"{error} ({kind}), and no worker was killed meanwhile") from None
                met["idle ends" if idle else what] += 1
                return
            except ResetError:
                # Rules 5 and 6.
                killed = self._chaos.tls is not None and self._chaos.killed_since(self._good)
                if not killed and not self._chaos.late(self._asked):
                    raise
                met["resets"] += 1
                return

    def _may_end(self, error: EndedError, *, idle: bool) -> bool:
        if self._chaos.killed_since(self._good):
            # Rule 2.
            return True
        if not error.said or error.begun:
            return False
        if self._chaos.tls is not None and time.monotonic() > self._good + LAST_CALL:
            # Rule 5.
            return True
        # Rule 6.
        return self._chaos.told is not None if idle else self._chaos.late(self._asked)

    def _may_be_last(self) -> bool:
        """Rules 5 and 6."""
        return self._chaos.tls is not None or self._chaos.told is not None

    async def _ask(self, kind: str) -> bool:
        """Ask and read what was asked; False when the connection is over, in order."""
        count = self._chance.randint(2, 6) if kind == "pipeline" else 1
        questions = [self._chaos.next_question(self._chance) for _ in range(count)]
        data = b"".join(each.data for each in questions)
        parts = pieces(self._chance, data, self._chance.randint(2, 8)) if kind == "slow" else [data]
        if kind == "pipeline" and self._chance.random() < 0.5:
            parts = pieces(self._chance, data, 2)
        writer = asyncio.ensure_future(self._write(parts, alone=count == 1))
        try:
            for number, asked in enumerate(questions):
                self._doing = f"{kind} {number + 1}/{count}: {asked}, {len(asked.data)} bytes"
                status = await self._wire.answer(asked, last_words=self._may_be_last)
                if status == 503 and self._chaos.late(self._asked):
                    self._chaos.report.met["503 at the end"] += 1
                    return False
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
                if self._wire.closed:
                    self._chaos.report.met["last answers"] += 1
                    return False
            # An early answer can be there before its request has been written.
            await writer
        finally:
            writer.cancel()
            # What went wrong in writing counts also if reading saw nothing of it.
            for result in await asyncio.gather(writer, return_exceptions=True):
                if isinstance(result, WrongError) and not self._wire.closed:
                    raise result
        return True

    async def _write(self, parts: list[bytes], *, alone: bool) -> None:
        for number, part in enumerate(parts):
            if number:
                await asyncio.sleep(self._chance.choice([0.0, 0.001, 0.005, 0.03]))
            await self._wire.send(part)
        if alone:
            # Rule 6.
            self._asked = time.monotonic()

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
        self._asked = time.monotonic()
        # The server may have closed and left by then, which is said by what it has sent.
        with contextlib.suppress(OSError):
            self._wire.socket.shutdown(socket.SHUT_WR)
        try:
            if await self._wire.answer(asked, last_words=self._may_be_last) == 200 and not self._wire.closed:
                await self._wire.end()
            self._chaos.report.met["half-closed, answered"] += 1
        except EndedError:
            self._chaos.report.met["half-closed, ended"] += 1
