"""A child process of the master: signalled and waited for by pidfd, and nobody else's child is.

Workers, spawned or forked from a template, and the templates themselves are such children.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..current import OF_THE_MASTER, TO_ALL
from ..launch import Launch, account
from ..titles import room


@dataclass(frozen=True)
class Exit:
    """How a process ended: exactly one of them is set, or none if somebody else reaped it."""

    code: int | None
    signal: int | None

    @property
    def hit(self) -> bool:
        """Whether it was a signal that the whole process group may have got, this process included."""
        return self.signal in TO_ALL

    @property
    def status(self) -> int:
        """As a shell has it; 0 if nothing is known."""
        return 128 + self.signal if self.signal is not None else self.code or 0

    def __str__(self) -> str:
        if self.signal is not None:
            # Most real-time signals have no name.
            known = self.signal in set(signal.Signals)
            return f"was killed by {signal.Signals(self.signal).name if known else f'signal {self.signal}'}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended in an unknown way: another part of this program waits for all children"


class Child:
    """One, from now until `on_exit` is called.  Owns its pidfd.

    `popen` is told of the exit, lest it wait by itself.  Raises OSError if there is no pidfd to be had.
    """

    def __init__(
        self,
        pid: int,
        loop: asyncio.AbstractEventLoop,
        on_exit: Callable[[Exit], None],
        popen: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._popen = popen
        self._loop = loop
        self._on_exit = on_exit
        try:
            loop.add_reader(self._pidfd, self._exited)
        except OSError:
            os.close(self._pidfd)
            raise

    def send_signal(self, number: int) -> None:
        """Signal it; nothing happens if it has exited already (no pid is ever signalled that may be another's)."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def abandon(self) -> None:
        """SIGKILL it, and wait until it is dead; `on_exit` is not told."""
        if self._pidfd >= 0:
            self._on_exit = lambda ended: None
            self.send_signal(signal.SIGKILL)
            self._exited()

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            result = None
        os.close(self._pidfd)
        self._pidfd = -1
        if result is None:
            ended = Exit(None, None)
        elif result.si_code == os.CLD_EXITED:
            ended = Exit(result.si_status, None)
        else:
            ended = Exit(None, result.si_status)
        if self._popen is not None:
            # It must not wait for it again.
            self._popen.returncode = ended.code if ended.code is not None else -(ended.signal or 0)
        self._on_exit(ended)


def interpreter(
    launch: Launch,
    entry: str,
    words: Sequence[str],
    env: Mapping[str, str],
    pass_fds: Sequence[int],
    standard: Mapping[str, Any],
) -> subprocess.Popen[bytes]:
    """A fresh interpreter that runs the file `entry`, as `launch` says; raises OSError.

    Must be called by a thread that lives as long as the process shall: the parent-death signal follows the thread.
    """
    # The same interpreter options as ours (-O, -W, -X …): what multiprocessing and the test runner of CPython use.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, *launch.interpreter, entry, *words]
    # A mask is inherited.  Until it can say that these mean nothing to it, a Ctrl-C in the terminal would be its death:
    # it would be told as that of a worker that failed, before or after what was meant.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_MASTER)
    try:
        return subprocess.Popen(
            # Words are there for who reads `ps`, and then it has no other title.
            command if words else command + room(command),
            env=env,
            pass_fds=pass_fds,
            cwd=launch.cwd,
            **standard,
            **_identity(launch),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _identity(launch: Launch) -> dict[str, Any]:
    """Popen's options for `uid` and `gid`."""
    options = dict(zip(("user", "group", "extra_groups"), account(launch), strict=True))
    return {name: value for name, value in options.items() if value is not None}
