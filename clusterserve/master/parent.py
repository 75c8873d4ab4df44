"""`Parent`: what is left of process 1 when another process has become the master: the container ends with process 1.

It passes signals on to whoever is the master, is told who that is, and ends as the last of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable

from .process import Exit, wait_for
from .upgrade import Upgrade


class Parent:
    """On the engine's loop.  `upgrade` is to the first of the masters; it matters when that has taken over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, upgrade: Upgrade) -> None:
        self._loop = loop
        self._upgrade = upgrade
        #: The masters, first to last, by their pidfds; -1: `upgrade` waits for the first.
        self._line = [-1]
        self._pids: list[int] = []
        upgrade.on_succeeded = self._succeeded

    def forward(self, numbers: Iterable[int]) -> None:
        """Pass these signals on from now on."""
        for number in numbers:
            self._loop.add_signal_handler(number, self._pass_on, number)

    def pids(self) -> list[int]:
        """The masters for whom nobody else waits."""
        return self._pids

    async def wait(self) -> int:
        """The exit code, once every master has ended: the last one's, or of whoever knows it."""
        code = 0
        index = 0
        while index < len(self._line):
            ended = await self._end_of(self._line[index])
            # What it said last, if it was succeeded and ended at once.
            if self._upgrade.channel is not None:
                self._upgrade.channel.read()
            if ended != Exit(None, None):
                code = ended.status
            index += 1
        return code

    async def _end_of(self, pidfd: int) -> Exit:
        if pidfd < 0:
            return await self._upgrade.end()
        gone = asyncio.Event()
        self._loop.add_reader(pidfd, gone.set)
        await gone.wait()
        self._loop.remove_reader(pidfd)
        ended = wait_for(pidfd)
        os.close(pidfd)
        return ended

    def _pass_on(self, number: int) -> None:
        pidfd = self._line[-1]
        with contextlib.suppress(ProcessLookupError):
            if pidfd < 0:
                self._upgrade.send_signal(number)
            else:
                signal.pidfd_send_signal(pidfd, number)

    def _succeeded(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._line.append(os.pidfd_open(pid))
            self._pids.append(pid)
