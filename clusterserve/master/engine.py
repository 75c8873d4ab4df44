"""The cluster's engine: facts in, `plan` and the distributor's decisions out, on one event loop of its own.

Nothing here waits: every handler records a fact and asks `plan` again.  No user code runs on this loop; `run`,
`with Cluster` and `async with Cluster` are front ends that talk to it from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..channel.message import MessageChannel
from ..core.connection import IllegalStep
from ..core.distributor import PATIENCE, REQUEST_PATIENCE, Distributor, Statistics
from ..core.events import (
    BecameReady,
    CameOnline,
    Disconnected,
    Event,
    Exited,
    Forked,
    Scaled,
    StartedDraining,
    StartedListening,
    StartedReload,
    StartedShutdown,
    Stopped,
    WasKilled,
    WorkerName,
)
from ..core.lifecycle import WorkerEvent, WorkerState
from ..core.messages import Beat, Boot, Closed, Failed, Leave, Listen, Listened, Listening, Message, Online
from ..core.messages import Drain as DrainMessage
from ..core.reconcile import Abort, Action, Drain, Spawn, Stop, Target, Verdict, plan
from ..core.roster import Limits, Member, Roster
from ..errors import BindError, BootError, ClusterError, ProtocolError
from ..settings import Settings
from .dispatcher import Dispatcher
from .handles import Handles
from .health import Health
from .policies import policy_factory
from .process import Exit, WorkerProcess

logger = logging.getLogger("clusterserve")

#: Between SIGTERM and the closing of the listeners (seconds): clients whose handshake is done, but whose first bytes
#: are still under way, are not in the backlog yet that TCP_DEFER_ACCEPT keeps.
LISTENER_LINGER = 0.05


@dataclass
class Seat:
    """A worker's place in the engine: its record for `plan`, its process, its message channel."""

    member: Member
    process: WorkerProcess
    channel: MessageChannel
    listening: set[int] = field(default_factory=set)


class Engine:
    """One cluster.  All methods are for the loop's thread; `settled` and `finished` are futures of that loop.

    `emit` is told of every event, on that loop: it must not block.
    `settled` is done when every worker listens; `finished` when everything is over: its result is None after a stop, or
    the `BootError` that kept the cluster from ever serving.
    """

    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, emit: Callable[[Event], None] = lambda event: None
    ) -> None:
        self.settings = settings
        self._emit = emit
        self.seats: dict[int, Seat] = {}
        self.settled: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[BootError | None] = loop.create_future()
        self._loop = loop
        policy = policy_factory(settings.policy, slots=settings.workers, long_lived=not settings.borrows)
        patience = REQUEST_PATIENCE if settings.borrows else PATIENCE
        self._distributor = Distributor(
            patience,
            settings.timeout_keep_alive,
            queue=settings.timeout_queue,
            head=settings.timeout_request_header,
            narrows=settings.borrows,
        )
        self._dispatcher = Dispatcher(
            loop, self._distributor, settings.max_pending, self._broke_protocol, self._queue_is_empty
        )
        self.handles = Handles(loop, self._dispatcher, policy)
        self._roster = Roster(
            Limits(
                boot=settings.timeout_boot,
                graceful=settings.timeout_graceful_shutdown,
                backoff=settings.restart_backoff,
                backoff_max=settings.restart_backoff_max,
                surge=settings.reload_surge,
                timeout=settings.timeout,
            )
        )
        self._health = Health(loop, settings, self._roster, self._pids, self._reconcile)
        self._target = Target(settings.workers)
        self._generation = 1
        self._changes: list[asyncio.Future[None]] = []
        self._stopping = Stop.NO
        self._stop_deadline = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._planning = False
        self._failure: Failed | None = None
        #: The one that nobody was told of when the stop was ordered: the others were still booting.
        self._untold: Failed | None = None
        self._last_exit = "no worker process could be started"

    # -- start and stop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open every `--bind` and start the workers.  Raises `BindError`; nothing is left open then."""
        try:
            opened = self.handles.open_pinned(self.settings.binds, self.settings.backlog)
        except BindError:
            self._close()
            raise
        for listener in opened:
            logger.info("Listening on %s", listener.address)
        count, reason = self.settings.workers, self.settings.workers_source
        logger.info(
            "Serving %s with %d worker%s%s, policy %s, dispatch %s, master process %d",
            self.settings.app,
            count,
            "" if count == 1 else "s",
            f" ({reason})" if reason else "",
            self.settings.policy,
            self.settings.dispatch,
            os.getpid(),
        )
        self._health.start()
        self._reconcile()

    def stop(self, how: Stop) -> None:
        """Stop the cluster: GRACEFUL serves what was accepted, QUICK does not.  May be called again, to hurry."""
        if how.value <= self._stopping.value:
            return
        first, self._stopping = self._stopping is Stop.NO, how
        if first:
            self._emit(StartedShutdown())
            # What a worker says from now on may come of being interrupted.
            self._untold = None if self.served else self._failure
            self._stop_deadline = self._loop.time() + self.settings.timeout_graceful_shutdown
            logger.info("Stopping %s", "quickly" if how is Stop.QUICK else "when what was accepted is served")
        if how is Stop.QUICK or not self._roster.proven:
            self._close_listeners()
            self._stop_workers()
        elif first:
            self._dispatcher.accept_rest()
            self._loop.call_later(LISTENER_LINGER, self._close_listeners)
            self._loop.call_at(self._stop_deadline, self._stop_workers)

    def scale(self, count: int) -> asyncio.Future[None]:
        """Have `count` workers from now on.  Done when it is so; fails with `BootError` as `reload` does."""
        if count != self._target.count and self._stopping is Stop.NO:
            logger.info("Scaling from %d to %d workers", self._target.count, count)
            self._emit(Scaled(count, self._target.count))
            self._target = dataclasses.replace(self._target, count=count)
            self._dispatcher.resize(count)
        return self._change()

    def scale_by(self, difference: int) -> None:
        """One more or one less; there is always one."""
        self.scale(max(1, self._target.count + difference))

    def reload(self) -> asyncio.Future[None]:
        """Replace every worker by a fresh one, `reload_surge` at a time, each when its replacement listens.

        Done when the last has left; fails with `BootError` if a replacement cannot start, and the old ones stay.  Once
        one could, and another fails again and again, it is tried for ever, but whoever waits here hears of it.
        """
        if self._stopping is Stop.NO:
            self._generation += 1
            logger.info("Reloading: generation %d replaces %d", self._generation, self._target.generation)
            self._emit(StartedReload())
            self._failure = None
            self._target = dataclasses.replace(self._target, generation=self._generation)
        return self._change()

    def _change(self) -> asyncio.Future[None]:
        change: asyncio.Future[None] = self._loop.create_future()
        self._changes.append(change)
        if self._roster.proven:
            # A fresh start for every slot: before anybody listened, who failed stays where it is.
            self._failure = None
            self._roster.forgiven(self._loop.time())
        self._reconcile()
        return change

    def _changed(self, error: ClusterError | None) -> None:
        changes, self._changes = self._changes, []
        for change in changes:
            if change.cancelled():
                continue
            if error is None:
                change.set_result(None)
            else:
                change.set_exception(error)
                # Nobody may be waiting: a signal asked for it, and the log has told.
                change.exception()

    def _reject(self) -> None:
        """The new generation cannot start: back to the one that serves."""
        failure = self._failure or Failed(self._last_exit, "")
        reason = f"generation {self._target.generation} cannot start: {failure.reason}"
        logger.error("Reload failed, %s; generation %d stays", reason, self._roster.proven)
        error = BootError(reason, failure.traceback)
        self._target = dataclasses.replace(self._target, generation=self._roster.proven)
        self._changed(error)
        self._reconcile()

    def _give_up(self, slots: tuple[int, ...]) -> None:
        """What was ordered may never be: let nobody wait for it, and go on trying."""
        failure = self._failure or Failed(self._last_exit, "")
        reason = (
            f"workers die again and again before they are of use, in slot {', '.join(map(str, slots))}: "
            f"{failure.reason}; the cluster goes on trying"
        )
        logger.error("Not done yet: %s", reason)
        self._changed(BootError(reason, failure.traceback))

    def _close_listeners(self) -> None:
        if self.handles.open:
            self._dispatcher.accept_rest()
            self.handles.close()
            self._dispatcher.end_idle()
            self._queue_is_empty()

    def _queue_is_empty(self) -> None:
        """Once nothing more can come and nothing waits, the workers may go."""
        if self._stopping is not Stop.NO and not self.handles.open and not self._distributor.queued:
            self._stop_workers()

    def _stop_workers(self) -> None:
        if self._target.stop.value < self._stopping.value:
            self._target = dataclasses.replace(self._target, stop=self._stopping)
            left = max(0.0, self._stop_deadline - self._loop.time())
            self._roster.limits = dataclasses.replace(self._roster.limits, graceful=left)
            self._reconcile()

    def _close(self) -> None:
        self._health.close()
        self.handles.close()
        self._dispatcher.close()
        if self._deadline is not None:
            self._deadline.cancel()

    def _finish(self, error: BootError | None) -> None:
        if not self.finished.done():
            self._changed(ClusterError("the cluster has stopped"))
            self._close()
            self._emit(Stopped())
            self.finished.set_result(error)

    # -- reconciliation -------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Do what `plan` says until it says nothing more for now."""
        if self._planning or self.finished.done():
            # An action of the loop below has become a fact, or a fact is not whole yet; it is asked again.
            return
        self._planning = True
        while True:
            now = self._loop.time()
            current = plan(self._target, self._roster, now)
            for action in current.actions:
                self._perform(action, now)
            if not current.actions:
                break
        self._planning = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if current.deadline is not None:
            self._deadline = self._loop.call_at(current.deadline, self._reconcile)
        if current.verdict is Verdict.SETTLED:
            if not self.settled.done():
                self.settled.set_result(None)
                self._emit(BecameReady())
            self._changed(None)
        elif current.verdict is Verdict.REJECTED:
            self._reject()
        elif current.verdict is Verdict.FAILED:
            failure = self._failure
            if failure is None:
                self._finish(BootError(f"no worker came to listen: {self._last_exit}"))
            else:
                self._finish(BootError(failure.reason, failure.traceback))
        elif current.verdict is Verdict.STOPPED:
            untold = self._untold
            self._finish(None if untold is None else BootError(untold.reason, untold.traceback))
        elif current.stuck and self._changes:
            self._give_up(current.stuck)

    @contextlib.contextmanager
    def _as_one(self) -> Iterator[None]:
        """What happens in this block is one fact: a plan made in the midst of it would count on a dead worker, or take
        one that listens for one that boots."""
        planning, self._planning = self._planning, True
        try:
            yield
        finally:
            self._planning = planning
        self._reconcile()

    def _perform(self, action: Action, now: float) -> None:
        if isinstance(action, Spawn):
            self._spawn(action, now)
            return
        seat = self.seats[action.worker]
        if isinstance(action, Drain):
            if seat.member.drained is None:
                self._tell(seat, StartedDraining)
            self._roster.drained(action.worker, action.quick, now)
            self._dispatcher.distributor.drain_worker(action.worker)
            limits = self._roster.limits
            grace = limits.quick if action.quick else limits.graceful
            seat.channel.send(DrainMessage(grace, action.quick, action.keep))
            if action.interrupt:
                seat.process.send_signal(signal.SIGTERM)
        elif isinstance(action, Abort):
            self._roster.aborted(action.worker, now)
            self._dispatcher.distributor.drain_worker(action.worker)
            who = (action.worker, seat.member.slot, seat.process.pid)
            logger.error("Worker %d (slot %d, pid %d) is hung: %s; its stacks follow, it is replaced", *who, action.why)
            self._last_exit = f"worker {action.worker} was hung, {action.why}"
            seat.process.send_signal(signal.SIGABRT)
        else:
            self._roster.killed(action.worker)
            # Before anybody ever listened, the story is told once, when the cluster fails.
            level = logging.WARNING if self._roster.proven else logging.DEBUG
            logger.log(level, "Worker %d (pid %d) is killed: %s", action.worker, seat.process.pid, action.why)
            self._last_exit = f"worker {action.worker} was killed, {action.why}"
            self._tell(seat, WasKilled, action.why)
            seat.process.send_signal(signal.SIGKILL)

    def _spawn(self, action: Spawn, now: float) -> None:
        member = self._roster.spawned(action.slot, action.generation, now, self._health.wear())
        self._tell_why(action, member)
        try:
            process = WorkerProcess(action.slot, self._loop, partial(self._exited, member.id))
        except OSError as exc:
            self._last_exit = f"worker {member.id} could not be spawned: {exc}"
            logger.error("Worker %d (slot %d) could not be spawned: %s", member.id, member.slot, exc)
            self._roster.happened(member.id, WorkerEvent.EXITED, now)
            return
        channel = MessageChannel(
            self._loop, process.messages, partial(self._on_message, member.id), partial(self._on_closed, member.id)
        )
        seat = self.seats[member.id] = Seat(member, process, channel)
        self._tell(seat, Forked)
        self._dispatcher.add_worker(
            member.id, action.slot, process.connections, process.board, process.kept, process.pid
        )
        # Python overlooks what is no text there, a Path for one; so do we.
        entries: list[object] = [*sys.path]
        path = [entry for entry in entries if isinstance(entry, str)]
        if self.settings.app_dir is not None and [first := os.path.abspath(self.settings.app_dir)] != path[:1]:
            path.insert(0, first)
        channel.send(Boot(member.id, action.slot, self.settings.to_json(), path))

    def _tell_why(self, action: Spawn, member: Member) -> None:
        if action.worn:
            who = (member.id, action.worn, action.slot, self.seats[action.worn].process.pid)
            logger.info("Worker %d is to replace worker %d (slot %d, pid %d), which %s", *who, action.why)
        if self._roster.rejected > action.generation:
            # There is no other way to get at the old code; what it does then, its log lines say.
            logger.warning(
                "Worker %d starts from the files as they are now, from which generation %d could not start; "
                "repair them, and reload",
                member.id,
                self._roster.rejected,
            )

    # -- facts about workers --------------------------------------------------------------------------------------

    def _happened(self, worker: int, event: WorkerEvent) -> None:
        self._roster.happened(worker, event, self._loop.time())
        self._reconcile()

    def _tell(self, seat: Seat, kind: Callable[..., Event], *details: Any) -> None:
        """Emit an event about this worker."""
        self._emit(kind(WorkerName(seat.member.id, seat.member.slot, seat.process.pid), *details))

    def _says(self, worker: int, event: WorkerEvent) -> None:
        """What a worker says of itself; what cannot be is its fault."""
        try:
            self._happened(worker, event)
        except IllegalStep as exc:
            raise ProtocolError(str(exc)) from None

    def _on_message(self, worker: int, message: Message, descriptors: list[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        if isinstance(message, Listen):
            self._listen(worker, message)
        elif isinstance(message, Listening):
            self._listening(worker, message.listener)
        elif isinstance(message, Closed):
            self.handles.leave(worker, message.listener, crashed=False)
        elif isinstance(message, Online):
            self._says(worker, WorkerEvent.ONLINE)
            if self.seats[worker].member.current:
                self._tell(self.seats[worker], CameOnline)
        elif isinstance(message, Beat):
            self._health.heard(worker, message.served)
        elif isinstance(message, Leave):
            self._leave(worker)
        elif isinstance(message, Failed):
            self._failed(worker, message)
        else:
            raise ProtocolError(f"the master does not expect {type(message).__name__}")

    def _leave(self, worker: int) -> None:
        """Somebody sent it SIGTERM: drain and replace it, unless all go anyway, each in its time."""
        seat = self.seats[worker]
        if self._stopping is Stop.NO and seat.member.current:
            logger.info("Worker %d (slot %d, pid %d) was told to go", worker, seat.member.slot, seat.process.pid)
            self._perform(Drain(worker, quick=False, interrupt=False, keep=True), self._loop.time())
            self._reconcile()

    def _failed(self, worker: int, message: Failed) -> None:
        if self._failure is None:
            self._failure = message
        if self._roster.proven:
            # The cluster serves already: this one's story would not be told otherwise.
            logger.error("Worker %d: %s\n%s", worker, message.reason, message.traceback.rstrip())

    def _on_closed(self, worker: int, error: ProtocolError | None) -> None:
        if error is not None:
            self._broke_protocol(worker, error)
        # Its process may live on for a while, but it is not ours to rely on any more.
        self._distributor.drain_worker(worker)
        self._tell(self.seats[worker], Disconnected)
        self._happened(worker, WorkerEvent.DISCONNECTED)

    def _broke_protocol(self, worker: int, error: ProtocolError) -> None:
        seat = self.seats[worker]
        if seat.member.killed:
            # It goes on talking until it is dead.
            return
        self._roster.killed(worker)
        logger.error("Worker %d (pid %d) is killed: %s", worker, seat.process.pid, error)
        self._last_exit = f"worker {worker} was killed: {error}"
        self._tell(seat, WasKilled, str(error))
        self._dispatcher.distributor.drain_worker(worker)
        seat.process.send_signal(signal.SIGKILL)

    def _exited(self, worker: int, ended: Exit) -> None:
        seat = self.seats[worker]
        with self._as_one():
            # What it said last counts: why it failed, above all.
            seat.channel.drain()
            seat.channel.close()
            if seat.member.state is not WorkerState.DISCONNECTED:
                self._tell(seat, Disconnected)
            self._tell(seat, Exited, ended.code, ended.signal)
            self._dispatcher.remove_worker(worker, hung=seat.member.aborted is not None)
            del self.seats[worker]
            asked = seat.member.drained is not None
            self.handles.leave_all(worker, crashed=not asked)
            self._last_exit = self._last_exit if seat.member.doomed else f"worker {worker} {ended}"
            level = logging.ERROR if self._roster.proven and not asked else logging.DEBUG
            logger.log(level, "Worker %d (slot %d, pid %d) %s", worker, seat.member.slot, seat.process.pid, ended)
            self._happened(worker, WorkerEvent.EXITED)

    # -- listeners ------------------------------------------------------------------------------------------------

    def _listen(self, worker: int, request: Listen) -> None:
        """Give a worker a listener: the one of this name, or a new one (Node: queryServer)."""
        channel = self.seats[worker].channel
        try:
            listener = self.handles.listen(worker, request)
        except BindError as exc:
            code = exc.errno or errno.EINVAL
            channel.send(Listened(request.request, 0, code, str(exc), socket.AF_UNSPEC, "", False))
            return
        shared = self.handles.shared
        channel.send(
            Listened(request.request, listener.key, 0, "", listener.family, listener.sockname, shared),
            [listener.sock.fileno()] if shared else [],
        )

    def _listening(self, worker: int, key: int) -> None:
        seat = self.seats[worker]
        with self._as_one():
            self.handles.attach(worker, key)
            seat.listening.add(key)
            if seat.member.current:
                self._tell(seat, StartedListening, self.handles.address(key))
            if self.handles.pinned <= seat.listening and seat.member.listening is None:
                if seat.member.current:
                    logger.info("Worker %d (slot %d, pid %d) is listening", worker, seat.member.slot, seat.process.pid)
                self._says(worker, WorkerEvent.LISTENING)

    # -- looking in -----------------------------------------------------------------------------------------------

    @property
    def served(self) -> bool:
        """Whether any worker ever listened."""
        return self._roster.proven > 0

    def statistics(self) -> Statistics:
        """Connections by state and by worker, now."""
        return self._distributor.statistics()

    def _pids(self) -> list[tuple[int, int]]:
        return [(id, seat.process.pid) for id, seat in self.seats.items()]

    def states(self) -> list[tuple[int, int, int, WorkerState]]:
        """(id, slot, pid, state) of every worker that is not dead."""
        return [(seat.member.id, seat.member.slot, seat.process.pid, seat.member.state) for seat in self.seats.values()]
