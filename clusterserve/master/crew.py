"""`Crew`: the worker processes of a cluster, started and told what `plan` has decided.

What becomes of them is a fact, and somebody else's business (`Ears`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from .. import faults
from ..channel.descriptors import Riders
from ..channel.message import MessageChannel
from ..channel.tally import Places
from ..core.envelope import Envelope
from ..core.events import Event, Exited, Forked, StartedDraining, WasKilled, WentWrong, WorkerName
from ..core.lifecycle import WorkerEvent, WorkerState
from ..core.messages import Boot, Failed, Message, Stopping
from ..core.messages import Drain as DrainMessage
from ..core.reconcile import Abort, Drain, Kill, Spawn
from ..core.roster import Member, Roster
from ..core.templates import Step
from ..core.wear import Wear
from ..errors import ProtocolError
from ..log_files import LogFiles
from ..settings import Settings
from .certificates import Certificates
from .dispatcher import Dispatcher
from .process import Exit, WorkerProcess
from .templates import Templates

logger = logging.getLogger("clusterserve")

#: What a worker that was told to disconnect, and then to die, has to end by itself in between (seconds).
FAREWELL: Final = 0.5

#: Variables for a worker, as pairs.
Environment = tuple[tuple[str, str], ...]


@dataclass
class Seat:
    """A worker's place: its record for `plan`, its process, its message channel."""

    member: Member
    process: WorkerProcess
    channel: MessageChannel
    listening: set[int] = field(default_factory=set)
    #: Where it writes its threads' stacks; -1 until it is online.  Ours to close.
    stacks: int = -1
    #: The signal that `destroy` has left for it; 0 for none.
    farewell: int = 0
    #: Where a debugger can attach, HOST:PORT; empty: nowhere.
    debugger: str = ""

    @property
    def who(self) -> tuple[int, int, int]:
        """For the log: "Worker %d (slot %d, pid %d)"."""
        return self.member.id, self.member.slot, self.process.pid


class Ears(Protocol):
    """Who hears of the workers."""

    def on_message(self, worker: int, message: Message, descriptors: list[int]) -> None: ...
    def on_envelope(self, worker: int, envelope: Envelope, riders: Riders) -> None: ...
    def on_closed(self, worker: int, error: ProtocolError | None) -> None: ...
    def on_exit(self, worker: int, ended: Exit) -> None: ...
    def on_templates(self) -> None: ...


class Crew:
    """Every worker that is not dead, by id.  `settings` are for those to come; `ears` hear of all of them, and must be
    there before the first is started."""

    ears: Ears

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        roster: Roster,
        dispatcher: Dispatcher,
        emit: Callable[[Event], None],
        files: LogFiles,
        certificates: Certificates,
    ) -> None:
        self.settings = settings
        self.seats: dict[int, Seat] = {}
        #: What `fork` was given, by slot: replacements inherit it.
        self.environments: dict[int, Environment] = {}
        #: Whether the cluster was told to stop, and those that start all the same are to know it.
        self.stopping = False
        #: How the last one ended that was not told to.
        self.last_exit = "no worker process could be started"
        #: Whether one that could not start had a signal that the master may have got as well, and not acted on yet.
        self.hit = False
        #: What the first said, since this was last None, that could not start.
        self.failure: Failed | None = None
        self._tally = Places()
        self._loop = loop
        self._roster = roster
        self._dispatcher = dispatcher
        self._emit = emit
        self._files = files
        self._certificates = certificates
        #: The working directory, or what it was called before it was removed.
        self._directory = ""
        #: What workers are forked from; None: they are spawned.
        self._templates: Templates | None = None
        if roster.templates is not None:
            self._templates = Templates(
                loop, roster, self._template_failed, lambda: self.ears.on_templates(), files, self._tally.fd
            )

    def pids(self) -> list[int]:
        """The processes of the workers that are not dead, and of the templates."""
        templates = [] if self._templates is None else self._templates.pids()
        return [*(seat.process.pid for seat in self.seats.values()), *templates]

    def outdate_templates(self) -> None:
        """A generation begins: see `Templates.outdate`."""
        if self._templates is not None:
            self._templates.outdate()

    def _template_failed(self, failed: Failed, hit: bool) -> None:
        self.hit = self.hit or hit
        if self.failure is None:
            self.failure = failed

    def why(self) -> Failed:
        """Why workers cannot start."""
        return self.failure or Failed(self.last_exit, "")

    def channel(self, worker: int) -> MessageChannel | None:
        """Its message channel; None if it is gone."""
        seat = self.seats.get(worker)
        return None if seat is None else seat.channel

    def tell(self, seat: Seat, kind: Callable[..., Event], *details: Any) -> None:
        """Emit an event about this worker."""
        self._emit(kind(WorkerName(*seat.who), *details))

    # -- starting -------------------------------------------------------------------------------------------------

    def spawn(self, action: Spawn, wear: Wear, debug_port: int | None = None, *, alone: bool = False) -> int:
        """Start one; the id of the worker that was started, or could not be.

        Where there are templates it is forked from one, unless it is to be `alone`.
        """
        member = self._roster.spawned(action.slot, action.generation, self._loop.time(), wear)
        self._say_why(action, member)
        self._tally.take(member.id)
        env = self.environments.get(action.slot, ())
        on_exit = partial(self.ears.on_exit, member.id)
        try:
            if self._templates is not None and not alone:
                born = partial(self._forked, member, debug_port)
                self._templates.fork(member, self.settings, env, on_exit, born)
            else:
                process = WorkerProcess(action.slot, self._loop, on_exit, self.settings, env, self._tally.fd)
                self._seat(member, process, debug_port)
        except Exception as exc:  # noqa: BLE001 - whatever keeps this one from living is no reason not to look after others
            self._stillborn(member, exc)
        return member.id

    def _forked(
        self, member: Member, debug_port: int | None, result: WorkerProcess | OSError, owed: list[Drain | Abort | Kill]
    ) -> None:
        """What became of a worker that a template was to fork, and what it was told meanwhile."""
        if isinstance(result, OSError):
            self._stillborn(member, result)
            return
        try:
            seat = self._seat(member, result, debug_port)
        except Exception as exc:  # noqa: BLE001 - as in `spawn`
            self._stillborn(member, exc)
            return
        if member.drained is not None:
            self.tell(seat, StartedDraining)
        for action in owed:
            self.perform(action)

    def _seat(self, member: Member, process: WorkerProcess, debug_port: int | None) -> Seat:
        """Give it its place and its orders.  Whatever goes wrong: then there is neither process nor place, and nobody
        has heard of it."""
        with contextlib.ExitStack() as undo:
            undo.callback(process.abandon)
            channel = MessageChannel(
                self._loop,
                process.messages,
                partial(self.ears.on_message, member.id),
                partial(self.ears.on_closed, member.id),
                partial(self.ears.on_envelope, member.id),
            )
            undo.callback(channel.close)
            # A program says itself where it logs.
            channel.send(self._boot(member, debug_port), () if self.settings.exec else self._files.descriptors)
            if self.stopping:
                channel.send(Stopping())
            # Last: it takes what ties the worker to us.
            self._dispatcher.add_worker(
                member.id,
                member.slot,
                process.connections,
                process.board,
                process.kept,
                process.pid,
                self.settings.worker_connections,
            )
            undo.pop_all()
        seat = self.seats[member.id] = Seat(member, process, channel)
        self.tell(seat, Forked)
        return seat

    def _stillborn(self, member: Member, error: Exception) -> None:
        self._tally.free(member.id)
        self.last_exit = f"worker {member.id} could not be spawned: {error}"
        # What neither the system nor a value refuses is a mistake of ours: then it matters where.
        unexpected = not isinstance(error, OSError | ValueError)
        logger.error(
            "Worker %d (slot %d) could not be spawned: %s",
            member.id,
            member.slot,
            error,
            exc_info=error if unexpected else None,
        )
        name = WorkerName(member.id, member.slot, 0)
        self._emit(WentWrong(name, error))
        if not faults.on("no-exit-of-the-unborn"):
            self._emit(Exited(name, None, None))
        self._roster.happened(member.id, WorkerEvent.EXITED, self._loop.time())

    def _path(self) -> list[str]:
        """Where workers look for the application."""
        # Python overlooks what is no text there, a Path for one; so do we.
        entries: list[object] = [*sys.path]
        path = [entry for entry in entries if isinstance(entry, str)]
        if self.settings.app_dir is not None and [first := self._absolute(self.settings.app_dir)] != path[:1]:
            path.insert(0, first)
        return path

    def _absolute(self, path: str) -> str:
        # A directory that was removed has no name any more; another that is made in its place will have the old one.
        with contextlib.suppress(FileNotFoundError):
            self._directory = os.getcwd()
        return os.path.normpath(os.path.join(self._directory, path))

    def _boot(self, member: Member, debug_port: int | None) -> Boot:
        launch = self.settings.to_worker()
        if debug_port is not None:
            launch["debug_port"] = debug_port
        if launch["debug_port"] is not None:
            self._roster.debugging(member.id)
        credentials = self._certificates.credentials
        tls = {} if credentials is None else dict(credentials.to_json())
        place = self._tally.places[member.id]
        return Boot(member.id, member.slot, self.settings.to_json(), self._path(), launch, tls, place)

    def _say_why(self, action: Spawn, member: Member) -> None:
        if action.worn:
            who = (member.id, action.worn, action.slot, self.seats[action.worn].process.pid)
            logger.info("Worker %d is to replace worker %d (slot %d, pid %d), which %s", *who, action.why)
        templates = self._roster.templates
        if self._roster.rejected > action.generation and (templates is None or templates.lasting):
            # There is no other way to get at the old code; what it does then, its log lines say.
            logger.warning(
                "Worker %d starts from the files as they are now, from which generation %d could not start; "
                "repair them, and reload",
                member.id,
                self._roster.rejected,
            )

    def dead(self, worker: int) -> None:
        """Its process has ended: what it had in progress is over."""
        del self.seats[worker]
        self._tally.free(worker)

    def close(self) -> None:
        """Let go of what the workers shared; they are dead."""
        self._tally.close()

    # -- ending ---------------------------------------------------------------------------------------------------

    def perform(self, action: Drain | Abort | Kill | Step) -> None:
        """Do it, which is a fact from then on."""
        if isinstance(action, Step):
            assert self._templates is not None
            self._templates.perform(action, self.settings, self._path(), self._certificates.terms)
            return
        if self._templates is not None and self._templates.owe(action):
            return
        seat, now = self.seats[action.worker], self._loop.time()
        if isinstance(action, Drain):
            self._drain(seat, action, now)
        elif isinstance(action, Abort):
            self._roster.aborted(action.worker, now)
            self._dispatcher.distributor.drain_worker(action.worker)
            logger.error(
                "Worker %d (slot %d, pid %d) is hung: %s; its stacks follow, it is replaced", *seat.who, action.why
            )
            self.last_exit = f"worker {action.worker} was hung, {action.why}"
            seat.process.send_signal(signal.SIGABRT)
        else:
            # Before anybody ever listened, the story is told once, when the cluster fails.
            self._kill(seat, action.why, logging.WARNING if self._roster.proven else logging.DEBUG, ", ")

    def _drain(self, seat: Seat, action: Drain, now: float) -> None:
        if seat.member.drained is None:
            self.tell(seat, StartedDraining)
        self._roster.drained(action.worker, action.quick, now)
        self._dispatcher.distributor.drain_worker(action.worker)
        limits = self._roster.limits
        grace = limits.quick if action.quick else limits.graceful
        # Behind the program's messages, so that they arrive; an order to hurry goes first.
        send = seat.channel.send if action.quick else seat.channel.send_in_line
        send(DrainMessage(grace, action.quick, action.keep))
        if action.interrupt:
            seat.process.send_signal(signal.SIGTERM)

    def announce_stop(self) -> None:
        """Let every worker know that the cluster was told to stop, those to come included."""
        self.stopping = True
        for seat in self.seats.values():
            seat.channel.send(Stopping())

    def broke_protocol(self, worker: int, error: ProtocolError) -> None:
        """What came of it could not be read, and no honest sender sends that: it costs it its life."""
        seat = self.seats.get(worker)
        if seat is not None and not seat.member.killed:
            # Or else it goes on talking until it is dead.
            self._dispatcher.distributor.drain_worker(worker)
            self._kill(seat, str(error), logging.ERROR, ": ")

    def _kill(self, seat: Seat, why: str, level: int, joint: str) -> None:
        self._roster.killed(seat.member.id)
        logger.log(level, "Worker %d (pid %d) is killed: %s", seat.member.id, seat.process.pid, why)
        self.last_exit = f"worker {seat.member.id} was killed{joint}{why}"
        self.tell(seat, WasKilled, why)
        seat.process.send_signal(signal.SIGKILL)

    def destroy(self, worker: int, number: int) -> None:
        """Send a signal to one that was told to disconnect, once it has and does not end by itself."""
        seat = self.seats.get(worker)
        if seat is not None:
            seat.farewell = number
            if seat.member.state is WorkerState.DISCONNECTED:
                self.bid_farewell(seat)

    def bid_farewell(self, seat: Seat) -> None:
        """Its channel is closed: what `destroy` has left for it comes soon."""
        if seat.farewell:
            self._loop.call_later(FAREWELL, seat.process.send_signal, seat.farewell)

    def send_signal(self, worker: int, number: int) -> None:
        """Deliver a signal to a worker's process.  Nothing happens if it is gone."""
        seat = self.seats.get(worker)
        if seat is not None:
            seat.process.send_signal(number)
            if number == signal.SIGTERM and not self._roster.programs:
                self._roster.terminated(worker, self._loop.time())
