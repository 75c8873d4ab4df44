"""Worker processes: the master's ends of what ties one to it, and starting one.

A worker is a fresh interpreter (exec, not fork), or forked from a template; either way it is a child of the master,
tied to it by two sockets and the kernel's parent-death signal.  The rest of the master sees a pid, two channels and an
exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ..channel.board import Board
from ..channel.connection import MasterEnd, connection_channel
from ..current import SLOT_VARIABLE, STDIO_VARIABLE, VARIABLE
from ..launch import Launch
from .child import Child, Exit, interpreter
from .streams import Streams

__all__ = ["ENTRY", "Ends", "Exit", "WorkerProcess"]

ENTRY: Final = str(Path(__file__).parents[1] / "worker" / "__main__.py")


class Ends:
    """What ties a worker that is yet to come to its master: both ends of its channels, its board, the epoll of the
    connections that it keeps, and its standard streams.  Owns them all; raises OSError if they cannot be had.

    Once a worker has its ends, `given` closes our copies of them; if there will be none, `abandon` closes everything.
    `tally`, if there is one, is what all workers count in: not ours.
    """

    def __init__(self, launch: Launch, tally: int = -1) -> None:
        self.streams = Streams(launch)
        with contextlib.ExitStack() as undo:
            undo.callback(self.streams.close)
            undo.callback(self.streams.abandon)
            self.messages, self._their_messages = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(self.messages.close)
            undo.callback(self._their_messages.close)
            self.connections: MasterEnd
            self.connections, their_connections = connection_channel()
            undo.callback(self.connections.close)
            self.board = Board.create()
            undo.callback(self.board.close)
            self.kept = select.epoll()
            undo.callback(self.kept.close)
            #: The worker's: messages, connections, board, kept, tally.
            self.theirs = (
                self._their_messages.fileno(), their_connections.fileno(), self.board.fd, self.kept.fileno(),
                *([] if tally < 0 else [tally]),
            )  # fmt: skip
            self.abandon = undo.pop_all().close

    def given(self) -> None:
        """The worker has copies of its ends.  Not closed is that of the connection channel, needed for `recall`."""
        self._their_messages.close()
        self.streams.close()


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

        `tally` as for its `Ends`.
        Must be called by a thread that lives as long as the worker shall: the parent-death signal follows the thread.
        """
        ends = Ends(launch, tally)
        streams = ends.streams
        with contextlib.ExitStack() as undo:
            undo.callback(ends.abandon)
            lifted: list[int] = []
            if streams.extra:
                # The numbers that `stdio` gives away may be the channels'.
                for fd in ends.theirs:
                    lifted.append(streams.lift(fd))
                    undo.callback(os.close, lifted[-1])
            descriptors = lifted or ends.theirs
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
            popen = interpreter(
                launch, ENTRY, words, environment, (*descriptors, *streams.extra.values()), streams.standard
            )
            undo.callback(popen.wait)
            undo.callback(popen.kill)
            self._begin(ends, Child(popen.pid, loop, on_exit, popen))
            undo.pop_all()
            for fd in lifted:
                os.close(fd)

    @classmethod
    def adopt(
        cls, ends: Ends, pid: int, loop: asyncio.AbstractEventLoop, on_exit: Callable[[Exit], None]
    ) -> WorkerProcess:
        """A child of ours that was forked from a template, and has its `ends`; raises OSError, and nothing is left."""
        process = cls.__new__(cls)
        try:
            child = Child(pid, loop, on_exit)
        except OSError:
            # Nobody but us waits for it: the pid is still its own.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ends.abandon()
            raise
        process._begin(ends, child)
        return process

    def _begin(self, ends: Ends, child: Child) -> None:
        ends.given()
        self.messages, self.connections, self.board, self.kept = ends.messages, ends.connections, ends.board, ends.kept
        self.streams = ends.streams
        self._ends = ends
        self._child = child
        self.pid = child.pid

    def abandon(self) -> None:
        """It is not to live: kill it, wait for that, and close all that ties it to us.  `on_exit` is not told."""
        self._child.abandon()
        self._ends.abandon()

    def send_signal(self, number: int) -> None:
        """Signal it; nothing happens if it has exited already (no pid is ever signalled that may be another's)."""
        self._child.send_signal(number)
