"""`FirstSignals`: what signals mean as long as no loop has them (`Signals`).

Between a master's pid file and its loop there is code of others, hooks and policies, which may take long.  What orders
the end ends the program as it would any other, with the same exit code, but what was done so far is undone: else the
pid file stays.  Orders to one that serves wait until it can hear them: who reads the pid file may send them at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Final

_ENDS: Final = (signal.SIGTERM, signal.SIGQUIT)
_WAITS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPWR)


class Ended(BaseException):
    """A signal ends the program.  `code` is what it exits with."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


class FirstSignals:
    """In the place of the defaults, from now on; never of what somebody else has said.  Who makes it puts them back.

    `own`: the process is ours (cli.py has a handler for SIGTERM in the place of the default, if that is process 1).
    Raises `Ended`, wherever the main thread is.
    """

    def __init__(self, *, own: bool) -> None:
        self._came: list[int] = []
        for number in _ENDS:
            self._hear(number, self._end, own=own and number == signal.SIGTERM)
        for number in _WAITS:
            self._hear(number, self._keep)

    def _hear(self, number: int, handler: Callable[[int, FrameType | None], None], *, own: bool = False) -> None:
        if own or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        # Nothing is to come between now and the end: what is half undone would stay.
        for each in (*_ENDS, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def pass_on(self) -> None:
        """The loop has them from now on: what came, it hears.  Also the end, if it was caught on its way to us."""
        for number in self._came:
            os.kill(os.getpid(), number)
        self._came.clear()
