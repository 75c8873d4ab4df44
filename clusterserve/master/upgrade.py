"""`Upgrade`: a new master beside this one, from SIGUSR2 until it has taken over, or failed and nothing has happened.

The new one is this program started again as it was started: the same command line, directory, environment and umask,
other code and configuration if they have changed.  The step that counts is `_yield`: before it this master serves, and
whatever goes wrong costs only the new one; after it the new one does, and this one has only its workers to wait for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from enum import Enum
from typing import Final

from ..activation import passed
from ..channel.handover import HandoverChannel
from ..core.bequest import Bequest
from ..core.handover import (
    MAX_RIDERS,
    Estate,
    HandedConnection,
    HeldListener,
    Hello,
    Left,
    Message,
    Passed,
    Ready,
    Succeeded,
    Yielded,
)
from ..errors import ProtocolError
from ..succession import VARIABLE, beginning
from .child import Child, Exit
from .engine import Engine
from .notify import Notifier
from .succession import Succession

logger = logging.getLogger("clusterserve")

#: How long the new master may take until it can speak (seconds): a Python that starts, and reads its configuration.
FIRST_WORD: Final = 60.0

#: What it may take on top of its workers' own limit (seconds).
_MARGIN: Final = 5.0

#: From SIGTERM to SIGKILL for one that is not wanted (seconds); it has served nobody.
_LAST_CHANCE: Final = 10.0


class Step(Enum):
    """How far it has come."""

    NONE = "no other master"
    STARTING = "the new master starts"
    ENDING = "the new master is not wanted, and has not ended yet"
    YIELDED = "the new master serves"


class Upgrade:
    """On the engine's loop.  Owns our end of the socket to it.

    `pid_file` is the path of this master's pid file, and `succession` how it came to be the master, if it was not the
    first.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        teller: Notifier,
        pid_file: str = "",
        succession: Succession | None = None,
    ) -> None:
        self.step = Step.NONE
        #: The new master, while there is one.
        self.pid = 0
        #: How it has ended, once it has yielded itself or died.
        self.ended: Exit | None = None
        self.channel: HandoverChannel | None = None
        self._loop = loop
        self._engine = engine
        self._teller = teller
        self._pid_file = pid_file
        self._succession = succession
        #: A process 1 that has stayed for our sake: it hears who is next.
        self._parent = None if succession is None else succession.parent
        #: Called when the new master is about to serve.
        self.on_yield: Callable[[], None] = lambda: None
        #: Called with the process id of the new master's own successor.
        self.on_succeeded: Callable[[int], None] = lambda pid: None
        self._child: Child | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why = ""
        self._gone: list[asyncio.Future[None]] = []

    @property
    def yielded(self) -> bool:
        """Whether the new master has taken over."""
        return self.step is Step.YIELDED

    @property
    def exit_code(self) -> int:
        """What to exit with behind the new master: its own code, if it has ended meanwhile."""
        return 0 if self.ended is None else self.ended.status

    def pids(self) -> list[int]:
        """The new master, as long as nobody has waited for it."""
        return [] if self._child is None else [self.pid]

    # -- starting it ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a new master; the log says what has come of it."""
        if self._engine.stopping:
            logger.warning("SIGUSR2: nothing was done, this master is stopping")
            return
        if self._succession is not None and not self._succession.alone:
            logger.warning("SIGUSR2: nothing was done, the old master has not left yet")
            return
        if self.step is not Step.NONE:
            logger.warning("SIGUSR2: nothing was done, the new master (process %d) is there already", self.pid)
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._start(theirs)
            except OSError as error:
                ours.close()
                self._failed(f"the new master could not be started: {error}")
                return
        self.step = Step.STARTING
        self._teller.send(status=f"Upgrading: process {self.pid} is to take over")
        logger.info("Upgrading: process %d is to take over from process %d", self.pid, os.getpid())
        self.channel = HandoverChannel(self._loop, ours, self._heard, self._hung_up)
        self._send_estate()
        self._allow(FIRST_WORD)

    def _start(self, theirs: socket.socket) -> None:
        start = beginning()
        parent = -1 if self._parent is None else self._parent.fileno()
        # What systemd has passed, and what --bind names by its number, it must find where this one has.
        inherited = {*passed(), *(bind.fd for bind in self._engine.settings.binds if bind.kind == "fd")}
        process = subprocess.Popen(
            start.command,
            cwd=start.directory,
            umask=start.umask,
            env={**start.environment, VARIABLE: f"{theirs.fileno()},{os.getpid()},{parent}"},
            pass_fds=(theirs.fileno(), *inherited, *([] if parent < 0 else [parent])),
        )
        try:
            self._child = Child(process.pid, self._loop, self._exited, process)
        except OSError:
            process.kill()
            process.wait()
            raise
        self.pid = process.pid

    def _send_estate(self) -> None:
        assert self.channel is not None
        held = self._engine.handles.held()
        for start in range(0, max(1, len(held)), MAX_RIDERS):
            some = held[start : start + MAX_RIDERS]
            listeners: tuple[HeldListener, ...] = tuple(listener for listener, _ in some)
            more = start + MAX_RIDERS < len(held)
            self.channel.send(Estate(listeners, self._pid_file, more), [os.dup(sock.fileno()) for _, sock in some])

    def _allow(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.abandon, f"it did not come up within {seconds:g} s")

    # -- what it says ---------------------------------------------------------------------------------------------

    def _heard(self, message: Message, descriptors: list[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        if self.step is Step.STARTING:
            if isinstance(message, Hello):
                self._allow(message.patience + _MARGIN)
            elif isinstance(message, Ready) and not self._engine.stopping:
                self._yield(message)
        elif self.step is Step.YIELDED and isinstance(message, Succeeded):
            self.on_succeeded(message.pid)

    def _hung_up(self, error: ProtocolError | None) -> None:
        """It says nothing any more: most likely it has died, of which its pidfd tells."""
        if self.step is Step.YIELDED:
            self._engine.disinherit()
        elif error is not None:
            self.abandon(str(error))

    def _yield(self, ready: Ready) -> None:
        assert self.channel is not None
        assert self._timer is not None
        self._timer.cancel()
        self.step = Step.YIELDED
        logger.info("Process %d takes over; process %d leaves when its workers have finished", self.pid, os.getpid())
        # First: systemd listens only to whom it takes for the main process.
        self._teller.pass_on(self.pid)
        if self._parent is not None:
            self._parent.send(Succeeded(self.pid))
        self.on_yield()
        self.channel.send(Yielded(self._engine.settings.timeout_graceful_shutdown))
        self._engine.leave({*ready.taken, *ready.kept}, ready.continued, self._bequeath)

    def _bequeath(self, bequests: list[Bequest]) -> None:
        assert self.channel is not None
        for start in range(0, len(bequests), MAX_RIDERS):
            some = bequests[start : start + MAX_RIDERS]
            self.channel.send(Passed(tuple(map(handed, some))), [each.fd for each, _, _ in some])

    # -- its end --------------------------------------------------------------------------------------------------

    def abandon(self, why: str = "") -> None:
        """It is not wanted any more, if it has not taken over: `why` is for the log."""
        if self.step is Step.STARTING:
            self.step, self._why = Step.ENDING, why
            self.send_signal(signal.SIGTERM)
            self._close()
            self._timer = self._loop.call_later(_LAST_CHANCE, self.send_signal, signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Signal the new master; nothing happens if it has ended."""
        if self._child is not None:
            self._child.send_signal(number)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _exited(self, ended: Exit) -> None:
        self._child = None
        if self.step is Step.YIELDED:
            self.ended = ended
            if ended.signal is not None:
                # Whatever else it ended of, it has said itself.
                logger.critical("The new master (process %d) %s: nothing new is served any more", self.pid, ended)
        else:
            pid, why = self.pid, self._why or f"it {ended}"
            self._close()
            self.step, self.pid, self._why = Step.NONE, 0, ""
            if not self._engine.stopping:
                self._failed(f"the new master (process {pid}) failed: {why}")
        for waiting in self._gone:
            if not waiting.done():
                waiting.set_result(None)
        self._gone.clear()

    def _failed(self, why: str) -> None:
        logger.error("Upgrade failed, %s; process %d serves on as before", why, os.getpid())
        self._teller.ready(f"The last upgrade failed, and process {os.getpid()} stays: {why}")

    async def over(self) -> None:
        """Our engine has finished.  Return when no new master is left that has not taken over, and one that has knows
        everything."""
        if self.step is Step.YIELDED:
            if self.channel is not None:
                self.channel.send(Left())
                await self.channel.flush()
        elif self.step is not Step.NONE:
            self.abandon()
            await self._gone_with()

    async def end(self) -> Exit:
        """How the new master has ended, when it has."""
        if self.ended is None:
            await self._gone_with()
        assert self.ended is not None
        return self.ended

    async def _gone_with(self) -> None:
        gone = self._loop.create_future()
        self._gone.append(gone)
        await gone


def handed(bequest: Bequest) -> HandedConnection:
    """What the new master is told of it; its descriptor rides along."""
    each, waits, since = bequest
    told = (each.client, each.port, each.family, each.server, each.server_port, each.unknown)
    return HandedConnection(each.listener, waits, since, *told)
