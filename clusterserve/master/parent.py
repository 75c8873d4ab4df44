"""`Parent`: what is left of process 1 when another process has become the master: the container ends with process 1.

It passes signals on to whoever is the master, is told who that is, and ends as the last of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from .child import Child, Exit
from .upgrade import Upgrade


class Parent:
    """On the engine's loop.  `upgrade` is to the first of the masters; it matters when that has taken over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, upgrade: Upgrade) -> None:
        self._loop = loop
        self._upgrade = upgrade
        #: The masters behind the first, for whom nobody else waits, and how each has ended.
        self._line: list[tuple[Child, asyncio.Future[Exit]]] = []
        upgrade.on_succeeded = self._succeeded

    def forward(self, numbers: Iterable[int]) -> None:
        """Pass these signals on from now on."""
        for number in numbers:
            self._loop.add_signal_handler(number, self._pass_on, number)

    def pids(self) -> list[int]:
        """The masters for whom nobody else waits."""
        return [child.pid for child, ended in self._line if not ended.done()]

    async def wait(self) -> int:
        """The exit code, once every master has ended: the last one's, or of whoever knows it."""
        code = (await self._upgrade.end()).status
        index = 0
        while True:
            # What it said last, if it was succeeded and ended at once.
            if self._upgrade.channel is not None:
                self._upgrade.channel.read()
            if index == len(self._line):
                return code
            ended = await self._line[index][1]
            if ended != Exit(None, None):
                # Else it has died before who started it, and that one knows.
                code = ended.status
            index += 1

    def _pass_on(self, number: int) -> None:
        if self._line:
            self._line[-1][0].send_signal(number)
        else:
            self._upgrade.send_signal(number)

    def _succeeded(self, pid: int) -> None:
        ended: asyncio.Future[Exit] = self._loop.create_future()
        # It may be dead already.
        with contextlib.suppress(OSError):
            self._line.append((Child(pid, self._loop, ended.set_result), ended))
