"""`Facts`: what workers say, and that they end, as facts for the roster and for whoever is concerned.

Nothing waits here, and nothing is decided: what follows is `plan`'s business.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import socket

from .. import faults
from ..channel.descriptors import Riders
from ..core.connection import IllegalStep
from ..core.envelope import Envelope
from ..core.events import CameOnline, Disconnected, Exited, Messaged, StartedListening
from ..core.lifecycle import WorkerEvent, WorkerState
from ..core.messages import (
    Beat,
    Closed,
    Debugged,
    Failed,
    Leave,
    Listen,
    Listened,
    Listening,
    Message,
    Online,
    Reopened,
    Stacks,
)
from ..core.reconcile import Drain, Stop
from ..core.roster import Roster
from ..errors import BindError, ProtocolError
from .crew import Crew
from .debuggers import Debuggers
from .dispatcher import Dispatcher
from .handles import Handles
from .health import Health
from .process import Exit
from .reconciler import Reconciler
from .reopening import Reopening
from .stacks import StackCollector

logger = logging.getLogger("clusterserve")


class Facts:
    """The crew's `Ears`, on the engine's loop; all parts are the engine's."""

    def __init__(
        self,
        roster: Roster,
        crew: Crew,
        reconciler: Reconciler,
        dispatcher: Dispatcher,
        handles: Handles,
        health: Health,
        debuggers: Debuggers,
        stacks: StackCollector,
        reopening: Reopening,
    ) -> None:
        self._roster = roster
        self._crew = crew
        self._reconciler = reconciler
        self._dispatcher = dispatcher
        self._handles = handles
        self._health = health
        self._debuggers = debuggers
        self._stacks = stacks
        self._reopening = reopening

    # -- what it says ---------------------------------------------------------------------------------------------

    def on_envelope(self, worker: int, envelope: Envelope, riders: Riders) -> None:
        """A message of its program, for the master's."""
        self._crew.tell(self._crew.seats[worker], Messaged, envelope, riders)

    def on_message(self, worker: int, message: Message, descriptors: list[int]) -> None:
        """A message of ours, with descriptors, which are ours to close.  Raises `ProtocolError` if it cannot be."""
        seat = self._crew.seats[worker]
        if isinstance(message, Online) and descriptors and seat.stacks < 0:
            seat.stacks = descriptors.pop(0)
        for fd in descriptors:
            os.close(fd)
        if isinstance(message, Listen):
            self._listen(worker, message)
        elif isinstance(message, Listening):
            self._listening(worker, message.listener)
        elif isinstance(message, Closed):
            self._handles.leave(worker, message.listener, crashed=False)
        elif isinstance(message, Online):
            with self._reconciler.as_one():
                self._says(worker, WorkerEvent.ONLINE)
                self._crew.tell(seat, CameOnline)
        elif isinstance(message, Beat):
            self._health.heard(worker, message.served, stuck=message.stuck)
        elif isinstance(message, Debugged):
            self._debuggers.answered(worker, message)
        elif isinstance(message, Stacks):
            self._stacks.answered(worker, message)
        elif isinstance(message, Reopened):
            self._reopening.answered(worker, message)
        elif isinstance(message, Leave):
            self._leave(worker)
        elif isinstance(message, Failed):
            self._failed(worker, message)
        else:
            raise ProtocolError(f"the master does not expect {type(message).__name__}")

    def _says(self, worker: int, event: WorkerEvent) -> None:
        """What a worker says of itself; what cannot be is its fault."""
        try:
            self._reconciler.happened(worker, event)
        except IllegalStep as exc:
            raise ProtocolError(str(exc)) from None

    def _listen(self, worker: int, request: Listen) -> None:
        """Give a worker a listener: the one of this name, or a new one (Node: queryServer)."""
        channel = self._crew.seats[worker].channel
        try:
            listener = self._handles.listen(worker, request)
        except BindError as exc:
            if faults.on("mute-errors"):
                return
            code = exc.errno or errno.EINVAL
            channel.send(Listened(request.request, 0, code, str(exc), socket.AF_UNSPEC, "", False))
            return
        shared = self._handles.is_shared(listener.datagram)
        answer = Listened(request.request, listener.key, 0, "", listener.family, listener.sockname, shared)
        channel.send(
            dataclasses.replace(answer, backlog=listener.backlog, data=listener.data),
            [listener.sock.fileno()] if shared else [],
        )

    def _listening(self, worker: int, key: int) -> None:
        seat = self._crew.seats[worker]
        with self._reconciler.as_one():
            self._handles.attach(worker, key)
            seat.listening.add(key)
            if seat.member.current:
                self._crew.tell(seat, StartedListening, self._handles.address(key))
            if seat.member.state is WorkerState.LISTENING:
                return
            if self._roster.programs or self._handles.pinned <= seat.listening:
                if seat.member.current:
                    logger.info("Worker %d (slot %d, pid %d) is listening", *seat.who)
                self._says(worker, WorkerEvent.LISTENING)

    def _leave(self, worker: int) -> None:
        """Somebody sent it SIGTERM: drain and replace it, unless all go anyway, each in its time."""
        seat = self._crew.seats[worker]
        if self._reconciler.stopping is Stop.NO and seat.member.current:
            logger.info("Worker %d (slot %d, pid %d) was told to go", *seat.who)
            self._crew.perform(Drain(worker, quick=False, interrupt=False, keep=True))
            self._reconciler.reconcile()

    def _failed(self, worker: int, message: Failed) -> None:
        known, self._crew.failure = self._crew.failure, self._crew.failure or message
        if self._roster.proven or self._reconciler.target.manual:
            # The cluster serves already: this one's story would not be told otherwise.
            if message == known and self._crew.settings.reload:
                # All of them started at once, from the same files.
                logger.error("Worker %d: %s, as said before", worker, message.reason)
            else:
                logger.error("Worker %d: %s\n%s", worker, message.reason, message.traceback.rstrip())

    def on_templates(self) -> None:
        """Something has become of a template, or of a worker that one was to fork."""
        self._reconciler.reconcile()

    # -- its end --------------------------------------------------------------------------------------------------

    def on_closed(self, worker: int, error: ProtocolError | None) -> None:
        """Its message channel is at its end, or has said what no worker says."""
        if error is not None:
            self._crew.broke_protocol(worker, error)
        # Its process may live on for a while, but it is not ours to rely on any more.
        self._dispatcher.distributor.drain_worker(worker)
        seat = self._crew.seats[worker]
        self._crew.tell(seat, Disconnected)
        self._crew.bid_farewell(seat)
        self._reconciler.happened(worker, WorkerEvent.DISCONNECTED)

    def on_exit(self, worker: int, ended: Exit) -> None:
        """Its process is dead."""
        seat = self._crew.seats[worker]
        with self._reconciler.as_one():
            # What it said last counts: why it failed, above all.
            seat.channel.drain()
            seat.channel.close()
            if seat.member.state is not WorkerState.DISCONNECTED:
                self._crew.tell(seat, Disconnected)
            self._crew.tell(seat, Exited, ended.code, ended.signal)
            self._dispatcher.remove_worker(worker, hung=seat.member.aborted is not None)
            self._stacks.gone(worker)
            self._reopening.gone(worker)
            if seat.stacks >= 0:
                self._stacks.crashed("Worker {} (slot {}, pid {})".format(*seat.who), seat.stacks)
                os.close(seat.stacks)
            self._crew.dead(worker)
            self._debuggers.settle(worker)
            asked = seat.member.drained is not None
            self._handles.leave_all(worker, crashed=not asked)
            self._crew.last_exit = self._crew.last_exit if seat.member.doomed else f"worker {worker} {ended}"
            known = self._roster.proven or self._reconciler.target.manual
            self._crew.hit = self._crew.hit or (ended.hit and not known)
            level = logging.ERROR if known and not asked else logging.DEBUG
            logger.log(level, "Worker %d (slot %d, pid %d) %s", *seat.who, ended)
            if self._roster.ended(worker, ended.code):
                logger.warning("Slot %d stays empty: exit code %d means no restart", seat.member.slot, ended.code)
            self._reconciler.happened(worker, WorkerEvent.EXITED)
