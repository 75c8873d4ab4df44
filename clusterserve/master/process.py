"""Worker processes: spawning one, and learning of its exit.

A worker is a fresh interpreter (exec, not fork), tied to the master by two inherited sockets and the kernel's
parent-death signal.  The rest of the master sees a pid, two channels and an exit; exits are learned by pidfd, and only
our own processes are waited for, because the program that embeds us has children too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..channel.board import Board
from ..channel.connection import MasterEnd, connection_channel
from ..current import SLOT_VARIABLE, STDIO_VARIABLE, VARIABLE
from ..launch import Launch
from .streams import Streams

_ENTRY: Final = str(Path(__file__).parents[1] / "worker" / "__main__.py")


@dataclass(frozen=True)
class Exit:
    """How a process ended: exactly one of them is set, or none if somebody else reaped it."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is not None:
            # Most real-time signals have no name.
            known = self.signal in set(signal.Signals)
            return f"was killed by {signal.Signals(self.signal).name if known else f'signal {self.signal}'}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended in an unknown way: another part of this program waits for all children"


def _identity(launch: Launch) -> dict[str, Any]:
    """Popen's options for `uid` and `gid`.

    Only root changes them, and then leaves nothing of root's: without a `gid` the user's own group is taken.
    """
    if launch.uid is None and launch.gid is None:
        return {}
    options: dict[str, Any] = {"user": launch.uid, "group": launch.gid}
    if os.geteuid() == 0:
        options["extra_groups"] = []
        # One that no account has is as good.
        with contextlib.suppress(KeyError):
            account = pwd.getpwuid(os.geteuid() if launch.uid is None else launch.uid)
            group = account.pw_gid if launch.gid is None else launch.gid
            options.update(group=group, extra_groups=os.getgrouplist(account.pw_name, group))
    return {name: value for name, value in options.items() if value is not None}


class WorkerProcess:
    """A running worker process.

    Owns its pidfd and, until somebody takes them, the master's ends of its channels, its board, and the epoll of the
    connections that it keeps.  `streams` are for whoever wants them.
    """

    def __init__(
        self,
        slot: int,
        loop: asyncio.AbstractEventLoop,
        on_exit: Callable[[Exit], None],
        launch: Launch = Launch(),  # noqa: B008 - frozen
        env: Sequence[tuple[str, str]] = (),
        tally: int = -1,
    ) -> None:
        """Spawn it, with `env` besides what `launch` says; raises OSError if that is impossible.

        `tally` is a descriptor that it gets a copy of: what all workers count in.

        Must be called by a thread that lives as long as the worker shall: the parent-death signal follows the thread.
        """
        # The same interpreter options as ours (-O, -W, -X …): what multiprocessing and the test runner of CPython use.
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        streams = Streams(launch)
        with contextlib.ExitStack() as undo, contextlib.closing(streams):
            undo.callback(streams.abandon)
            self.messages, their_messages = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(self.messages.close)
            # Their end is closed here; not that of the other channel, which keeps a copy for `recall`.
            with their_messages:
                self.connections: MasterEnd
                self.connections, their_connections = connection_channel()
                undo.callback(self.connections.close)
                self.board = Board.create()
                undo.callback(self.board.close)
                self.kept = select.epoll()
                undo.callback(self.kept.close)
                channels = [
                    their_messages.fileno(), their_connections.fileno(), self.board.fd, self.kept.fileno(),
                    *([] if tally < 0 else [tally]),
                ]  # fmt: skip
                lifted: list[int] = []
                if streams.extra:
                    # The numbers that `stdio` gives away may be the channels'.
                    for fd in channels:
                        lifted.append(streams.lift(fd))
                        undo.callback(os.close, lifted[-1])
                descriptors = lifted or channels
                # Ours last: nobody but a worker is one.
                environment = {
                    **os.environ,
                    **dict(launch.env),
                    **dict(env),
                    VARIABLE: ",".join(map(str, (*descriptors, os.getpid()))),
                    SLOT_VARIABLE: str(slot),
                    STDIO_VARIABLE: ",".join(f"{number}:{fd}" for number, fd in streams.extra.items()),
                }
                # The program's words mean nothing to our entry file: they are there for who reads `ps`.
                words = [launch.exec, *launch.args] if launch.exec else []
                self._popen = subprocess.Popen(
                    [sys.executable, *flags, *launch.interpreter, _ENTRY, *words],
                    env=environment,
                    pass_fds=(*descriptors, *streams.extra.values()),
                    cwd=launch.cwd,
                    **streams.standard,
                    **_identity(launch),
                )
                undo.callback(self._popen.wait)
                undo.callback(self._popen.kill)
            self._pidfd = os.pidfd_open(self._popen.pid)
            undo.pop_all()
            for fd in lifted:
                os.close(fd)
        self.streams = streams
        self.pid = self._popen.pid
        self._loop = loop
        self._on_exit = on_exit
        loop.add_reader(self._pidfd, self._exited)

    def send_signal(self, number: int) -> None:
        """Signal it; nothing happens if it has exited already (no pid is ever signalled that may be another's)."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

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
        # Popen must not wait for it again.
        self._popen.returncode = ended.code if ended.code is not None else -(ended.signal or 0)
        self._on_exit(ended)
