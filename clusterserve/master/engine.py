"""The cluster's engine: facts in, `plan` and the distributor's decisions out, on one event loop of its own.

Nothing here waits: every handler records a fact and asks `plan` again.  No user code runs on this loop; `run`,
`with Cluster` and `async with Cluster` are front ends that talk to it from outside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from ..binds import Bind
from ..channel.message import MessageChannel
from ..core.distributor import Distributor, Statistics
from ..core.lifecycle import WorkerEvent, WorkerState
from ..core.messages import Boot, Closed, Failed, Listen, Listened, Listening, Message, Online
from ..core.messages import Drain as DrainMessage
from ..core.reconcile import Drain, Kill, Limits, Member, Roster, Spawn, Stop, Target, Verdict, plan
from ..errors import BindError, BootError, ProtocolError
from ..settings import Settings
from .dispatcher import Dispatcher
from .listeners import Listener, open_listener
from .policies import policy_factory
from .process import Exit, WorkerProcess

logger = logging.getLogger("clusterserve")

#: Between SIGTERM and the closing of the listeners (seconds): clients whose handshake is done, but whose first bytes
#: are still under way, are not in the backlog yet that TCP_DEFER_ACCEPT keeps.
LISTENER_LINGER = 0.05

#: How long a listener that no worker is left on is kept for the next one, if the last crashed (seconds).
ORPHAN_TIME = 30.0


@dataclass
class Seat:
    """A worker's place in the engine: its record for `plan`, its process, its message channel."""

    member: Member
    process: WorkerProcess
    channel: MessageChannel
    listening: set[int] = field(default_factory=set)


class Engine:
    """One cluster.  All methods are for the loop's thread; `settled` and `finished` are futures of that loop.

    `settled` is done when every worker listens; `finished` when everything is over: its result is None after a stop, or
    the `BootError` that kept the cluster from ever serving.
    """

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self.settings = settings
        self.seats: dict[int, Seat] = {}
        self.listeners: dict[int, Listener] = {}
        self.settled: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[BootError | None] = loop.create_future()
        self._loop = loop
        self._make_policy = policy_factory(settings.policy, slots=settings.workers, long_lived=True)
        self._distributor = Distributor()
        self._dispatcher = Dispatcher(
            loop, self._distributor, settings.max_pending, self._broke_protocol, self._queue_is_empty
        )
        self._roster = Roster(
            Limits(
                boot=settings.timeout_boot,
                graceful=settings.timeout_graceful_shutdown,
                backoff=settings.restart_backoff,
                backoff_max=settings.restart_backoff_max,
            )
        )
        self._target = Target(settings.workers)
        self._stopping = Stop.NO
        self._stop_deadline = 0.0
        self._names: dict[tuple[str, int], int] = {}
        self._keys = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._planning = False
        self._failure: Failed | None = None
        self._last_exit = "no worker process could be started"

    # -- start and stop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open every `--bind` and start the workers.  Raises `BindError`; nothing is left open then."""
        counts: Counter[str] = Counter()
        try:
            for bind in self.settings.binds:
                listener = self._open(str(bind), counts[str(bind)], self.settings.backlog, pinned=True)
                counts[str(bind)] += 1
                logger.info("Listening on %s", listener.address)
        except BindError:
            self._close()
            raise
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
        self._reconcile()

    def stop(self, how: Stop) -> None:
        """Stop the cluster: GRACEFUL serves what was accepted, QUICK does not.  May be called again, to hurry."""
        if how.value <= self._stopping.value:
            return
        first, self._stopping = self._stopping is Stop.NO, how
        if first:
            self._stop_deadline = self._loop.time() + self.settings.timeout_graceful_shutdown
            logger.info("Stopping %s", "quickly" if how is Stop.QUICK else "when what was accepted is served")
        if how is Stop.QUICK or not self._roster.proven:
            self._close_listeners()
            self._stop_workers()
        elif first:
            self._dispatcher.accept_rest()
            self._loop.call_later(LISTENER_LINGER, self._close_listeners)
            self._loop.call_at(self._stop_deadline, self._stop_workers)

    def _close_listeners(self) -> None:
        if any(listener.sock.fileno() >= 0 for listener in self.listeners.values()):
            self._dispatcher.accept_rest()
            for listener in self.listeners.values():
                self._dispatcher.remove_listener(listener)
                listener.close()
            self._queue_is_empty()

    def _queue_is_empty(self) -> None:
        """Once nothing more can come and nothing waits, the workers may go."""
        closed = all(listener.sock.fileno() < 0 for listener in self.listeners.values())
        if self._stopping is not Stop.NO and closed and not self._distributor.queued:
            self._stop_workers()

    def _stop_workers(self) -> None:
        if self._target.stop.value < self._stopping.value:
            self._target = dataclasses.replace(self._target, stop=self._stopping)
            left = max(0.0, self._stop_deadline - self._loop.time())
            self._roster.limits = dataclasses.replace(self._roster.limits, graceful=left)
            self._reconcile()

    def _close(self) -> None:
        for listener in self.listeners.values():
            self._dispatcher.remove_listener(listener)
            listener.close()
        self._dispatcher.close()
        if self._deadline is not None:
            self._deadline.cancel()

    def _finish(self, error: BootError | None) -> None:
        if not self.finished.done():
            self._close()
            self.finished.set_result(error)

    # -- reconciliation -------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Do what `plan` says until it says nothing more for now."""
        if self._planning or self.finished.done():
            # An action of the loop below has become a fact; the loop asks again.
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
        if current.verdict is Verdict.SETTLED and not self.settled.done():
            self.settled.set_result(None)
        elif current.verdict is Verdict.FAILED:
            failure = self._failure
            if failure is None:
                self._finish(BootError(f"no worker came to listen: {self._last_exit}"))
            else:
                self._finish(BootError(failure.reason, failure.traceback))
        elif current.verdict is Verdict.STOPPED:
            self._finish(None)

    def _perform(self, action: Spawn | Drain | Kill, now: float) -> None:
        if isinstance(action, Spawn):
            self._spawn(action, now)
            return
        seat = self.seats[action.worker]
        if isinstance(action, Drain):
            self._roster.drained(action.worker, action.quick, now)
            self._dispatcher.distributor.drain_worker(action.worker)
            limits = self._roster.limits
            seat.channel.send(DrainMessage(limits.quick if action.quick else limits.graceful, action.quick))
            if action.interrupt:
                seat.process.send_signal(signal.SIGTERM)
        else:
            self._roster.killed(action.worker)
            logger.warning("Worker %d (pid %d) is killed: %s", action.worker, seat.process.pid, action.why)
            self._last_exit = f"worker {action.worker} was killed, {action.why}"
            seat.process.send_signal(signal.SIGKILL)

    def _spawn(self, action: Spawn, now: float) -> None:
        member = self._roster.spawned(action.slot, action.generation, now)
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
        self.seats[member.id] = Seat(member, process, channel)
        self._dispatcher.add_worker(member.id, action.slot, process.connections)
        path = list(sys.path)
        if self.settings.app_dir is not None:
            path.insert(0, os.path.abspath(self.settings.app_dir))
        channel.send(Boot(member.id, action.slot, self.settings.to_json(), path))

    # -- facts about workers --------------------------------------------------------------------------------------

    def _happened(self, worker: int, event: WorkerEvent) -> None:
        self._roster.happened(worker, event, self._loop.time())
        self._reconcile()

    def _on_message(self, worker: int, message: Message, descriptors: list[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        if isinstance(message, Listen):
            self._listen(worker, message)
        elif isinstance(message, Listening):
            self._listening(worker, message.listener)
        elif isinstance(message, Closed):
            self._leave(worker, message.listener, crashed=False)
        elif isinstance(message, Online):
            self._happened(worker, WorkerEvent.ONLINE)
        elif isinstance(message, Failed):
            self._failed(worker, message)
        else:
            raise ProtocolError(f"the master does not expect {type(message).__name__}")

    def _failed(self, worker: int, message: Failed) -> None:
        if self._failure is None:
            self._failure = message
        if self._roster.proven:
            # The cluster serves already: this one's story would not be told otherwise.
            logger.error("Worker %d: %s\n%s", worker, message.reason, message.traceback.rstrip())

    def _on_closed(self, worker: int, error: ProtocolError | None) -> None:
        if error is not None:
            self._broke_protocol(worker, error)
        self._happened(worker, WorkerEvent.DISCONNECTED)

    def _broke_protocol(self, worker: int, error: ProtocolError) -> None:
        seat = self.seats[worker]
        logger.error("Worker %d (pid %d) is killed: %s", worker, seat.process.pid, error)
        seat.process.send_signal(signal.SIGKILL)

    def _exited(self, worker: int, ended: Exit) -> None:
        seat = self.seats[worker]
        # What it said last counts: why it failed, above all.
        seat.channel.drain()
        seat.channel.close()
        del self.seats[worker]
        self._dispatcher.remove_worker(worker)
        asked = seat.member.drained is not None
        for key in tuple(self.listeners):
            self._leave(worker, key, crashed=not asked)
        self._last_exit = self._last_exit if seat.member.killed else f"worker {worker} {ended}"
        if self._roster.proven and not asked:
            logger.error("Worker %d (slot %d, pid %d) %s", worker, seat.member.slot, seat.process.pid, ended)
        else:
            logger.debug("Worker %d (slot %d, pid %d) %s", worker, seat.member.slot, seat.process.pid, ended)
        self._happened(worker, WorkerEvent.EXITED)

    # -- listeners ------------------------------------------------------------------------------------------------

    def _open(self, bind: str, index: int, backlog: int, *, pinned: bool) -> Listener:
        self._keys += 1
        listener = open_listener(self._keys, Bind.parse(bind), backlog, pinned=pinned)
        self.listeners[listener.key] = listener
        self._names[bind, index] = listener.key
        return listener

    def _listen(self, worker: int, request: Listen) -> None:
        """Give a worker a listener: the one of this name, or a new one (Node: queryServer)."""
        channel = self.seats[worker].channel
        key = self._names.get((request.bind, request.index))
        try:
            if key is None:
                if self._stopping is not Stop.NO:
                    raise BindError(errno.ESHUTDOWN, "the cluster is stopping", request.bind)
                listener = self._open(request.bind, request.index, request.backlog, pinned=False)
            else:
                listener = self.listeners[key]
                if request.backlog > listener.backlog and listener.sock.fileno() >= 0:
                    listener.listen(request.backlog)
        except BindError as exc:
            channel.send(Listened(request.request, 0, exc.errno or errno.EINVAL, str(exc), socket.AF_UNSPEC, "", False))
            return
        listener.workers.add(worker)
        shared = self._make_policy is None
        if listener.key not in self._distributor.handles and self._make_policy is not None:
            self._distributor.add_handle(
                listener.key, self._make_policy(), client_speaks_first=request.client_speaks_first
            )
            self._dispatcher.add_listener(listener, client_speaks_first=request.client_speaks_first)
        channel.send(
            Listened(request.request, listener.key, 0, "", listener.sock.family, listener.sockname, shared),
            [listener.sock.fileno()] if shared else [],
        )

    def _listening(self, worker: int, key: int) -> None:
        seat = self.seats[worker]
        listener = self.listeners.get(key)
        if listener is None or worker not in listener.workers:
            raise ProtocolError(f"it says it listens on listener {key}, which it did not ask for")
        seat.listening.add(key)
        if self._make_policy is not None:
            self._dispatcher.attach(worker, key)
        pinned = {key for key, listener in self.listeners.items() if listener.pinned}
        if pinned <= seat.listening and seat.member.listening is None:
            if seat.member.current:
                logger.info("Worker %d (slot %d, pid %d) is listening", worker, seat.member.slot, seat.process.pid)
            self._happened(worker, WorkerEvent.LISTENING)

    def _leave(self, worker: int, key: int, *, crashed: bool) -> None:
        """The worker no longer listens there; a listener that was only the workers' goes with the last of them."""
        listener = self.listeners.get(key)
        if listener is None or worker not in listener.workers:
            return
        listener.workers.discard(worker)
        if worker in self._distributor.workers and key in self._distributor.handles:
            self._distributor.detach(worker, key)
        if not listener.pinned and not listener.workers:
            if crashed:
                self._loop.call_later(ORPHAN_TIME, self._release, key)
            else:
                self._release(key)

    def _release(self, key: int) -> None:
        listener = self.listeners.get(key)
        if listener is None or listener.workers:
            return
        self._dispatcher.remove_listener(listener)
        if key in self._distributor.handles:
            self._dispatcher.forget(key)
        listener.close()
        del self.listeners[key]
        self._names = {name: number for name, number in self._names.items() if number != key}

    # -- looking in -----------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Connections by state and by worker, now."""
        return self._distributor.statistics()

    def states(self) -> list[tuple[int, int, int, WorkerState]]:
        """(id, slot, pid, state) of every worker that is not dead."""
        return [(seat.member.id, seat.member.slot, seat.process.pid, seat.member.state) for seat in self.seats.values()]
