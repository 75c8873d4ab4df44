"""The cluster's engine: its parts, put together, and the orders it takes, on one event loop of its own.

Facts come in through `Facts` and `Dispatcher`; what follows from them is decided by `plan` and the distributor, and
done by `Reconciler` and `Crew`.  Nothing here waits.  No user code runs on this loop; `run`, `with Cluster` and
`async with Cluster` are front ends that talk to it from outside.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from .. import faults
from ..core.bequest import Bequest
from ..core.distributor import Distributor, Statistics
from ..core.events import (
    BecameReady,
    Event,
    Scaled,
    StartedReload,
    Stopped,
)
from ..core.handover import HandedConnection
from ..core.lateness import PATIENCE, REQUEST_PATIENCE
from ..core.lifecycle import WorkerState
from ..core.messages import Failed, Renew
from ..core.reconcile import Drain, Plan, Spawn, Stop, Target, Verdict
from ..core.roster import Limits, Roster
from ..core.templates import Templates
from ..credentials import Credentials
from ..errors import BootError, ClusterError, DesertedError, ProtocolError
from ..launch import owner
from ..log_files import LogFiles
from ..settings import Settings
from ..surroundings import Surroundings
from .answered import AnswerLog
from .certificates import Certificates
from .changes import Changes
from .crew import Crew, Environment
from .debuggers import Debuggers
from .dispatcher import Dispatcher
from .ending import Ending
from .facts import Facts
from .handles import Handles
from .health import Health
from .heritage import Heritage
from .listeners import Access
from .outbox import Outbox
from .policies import policy_factory
from .reconciler import Reconciler
from .reopening import Reopening
from .stacks import StackCollector

logger = logging.getLogger("clusterserve")

#: For so long the master waits for a signal of which others have died (seconds): they run, and die, before it reads its
#: own, and some of those who signal a whole group do it one after the other.
OUR_TURN: Final = 0.25


@dataclass
class Before:
    """What held before a reload brought something else."""

    settings: Settings
    credentials: Credentials | None
    surroundings: Surroundings
    #: How many workers were wanted, and are now.
    count: int
    adopted: int


class Engine:
    """One cluster.  All methods are for the loop's thread; `settled` and `finished` are futures of that loop.

    `emit` is told of every event, on that loop: it must not block.
    `settled` is done when every worker listens; `finished` when everything is over: its result is None after a stop, or
    the `BootError` that kept the cluster from ever serving.  `heritage` is another master's, which accepts until
    `take_over`.
    """

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        emit: Callable[[Event], None] = lambda event: None,
        heritage: Heritage | None = None,
        files: LogFiles | None = None,
    ) -> None:
        """`files`: the log's, the caller's own; without it the engine opens and closes them."""
        self.settings = settings
        self._files = files or LogFiles.of(settings)
        self._owns_files = files is None
        self._emit = emit
        self.settled: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[BootError | None] = loop.create_future()
        self._loop = loop
        #: What the program sends to workers.
        self.outbox = Outbox(loop, lambda worker: self._crew.channel(worker))
        policy = policy_factory(settings.policy, slots=max(1, settings.workers), long_lived=not settings.borrows)
        patience = REQUEST_PATIENCE if settings.borrows else PATIENCE
        self._distributor = Distributor(
            patience,
            settings.timeout_keep_alive,
            queue=settings.timeout_queue,
            head=settings.timeout_request_header,
            narrows=settings.borrows,
        )
        introductions = None
        if settings.proxy_protocol != "off":
            # Only then: what it needs takes its time.
            from .introductions import Introductions

            introductions = Introductions(settings.proxy_protocol, settings.proxy_allow_from)
        self._dispatcher = Dispatcher(
            loop,
            self._distributor,
            settings.max_pending,
            self.misbehaved,
            lambda: self._ending.queue_is_empty(),
            introductions,
        )
        self.handles = Handles(
            loop,
            self._dispatcher,
            policy,
            Access(settings.socket_mode, *owner(settings), settings.reuse_port),
            programs=bool(settings.exec),
            heritage=heritage,
            tls=settings.tls,
        )
        #: Whether there is an old master that serves, and goes on if this one does not come up.
        self._succeeds = heritage is not None
        if self._succeeds:
            self._dispatcher.hold()
        self._certificates = Certificates(loop, settings, self._renew)
        self._terms = ""
        templates = Templates(lasting=not settings.preload) if settings.templated else None
        self._roster = Roster(_limits(settings), programs=bool(settings.exec), templates=templates)
        self._stacks = StackCollector(loop)
        self._crew = Crew(loop, settings, self._roster, self._dispatcher, emit, self._files, self._certificates)
        self._reopening = Reopening(loop, self._files)
        #: Who is there, by id.
        self.seats = self._crew.seats
        self._health = Health(loop, settings, self._roster, self._pids, lambda: self._reconciler.reconcile())
        target = Target(settings.workers, manual=not settings.respawn)
        self._reconciler = Reconciler(loop, self._roster, self._crew, target, self._health.wear, self._heed)
        self._debuggers = Debuggers(loop, self._roster, self.seats)
        self._crew.ears = Facts(
            self._roster, self._crew, self._reconciler, self._dispatcher,
            self.handles, self._health, self._debuggers, self._stacks,
            self._reopening,
        )  # fmt: skip
        #: What held before a reload brought other settings, until they are proved.
        self._before: Before | None = None
        #: Who waits for the last worker's end, in a cluster whose program says how many there are.
        self._departures = Changes(loop)
        self._changes = Changes(loop)
        self._ready = False
        self._given_up: tuple[int, ...] = ()
        self._hasty, self._repeats = faults.on("disconnect-first"), faults.on("disconnect-again")
        self._generation = 1
        self._ending = Ending(loop, self._reconciler, self._roster, self._crew, self._dispatcher, self.handles, emit)
        #: Nothing could be started, and a change of the files is waited for.
        self._waiting = False
        #: While the master waits for the signal that others have had.
        self._our_turn: asyncio.TimerHandle | None = None

    # -- start and stop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the log's files and every `--bind`, and start the workers.

        Raises `SettingsError` or `BindError`; nothing is left open then.
        """
        try:
            self._files.open()
            answer_log = AnswerLog.of(self.settings, self._files.places)
            if answer_log is not None:
                self._dispatcher.on_answer = answer_log.answered
            self._certificates.start()
            self._terms = self._certificates.terms
            opened = self.handles.open_pinned(self.settings.binds, self.settings.backlog)
        except ClusterError:
            self._close()
            raise
        for listener in opened:
            logger.info("Listening on %s", listener.address)
        count, reason = self.settings.workers, self.settings.workers_source
        logger.info(
            "%s %s with %d worker%s%s, policy %s, dispatch %s, master process %d",
            "Running" if self.settings.exec else "Serving",
            self.settings.exec or self.settings.app,
            count,
            "" if count == 1 else "s",
            f" ({reason})" if reason else "",
            self.settings.policy,
            self.settings.dispatch,
            os.getpid(),
        )
        self._health.start()
        # Before it is ready, so that who hears of that finds them.
        with self._reconciler.as_one():
            for _ in range(count if self._reconciler.target.manual else 0):
                self.fork()

    def stop(self, how: Stop, *, at_once: bool = False) -> None:
        """Stop the cluster: GRACEFUL serves what was accepted, after `shutdown_delay`, QUICK does not.

        May be called again, to hurry: `at_once` ends the delay.
        """
        self._ending.stop(how, at_once=at_once, told=self._waiting)

    def leave(
        self, shared: Collection[int], continued: Collection[int], heir: Callable[[list[Bequest]], None]
    ) -> float:
        """Another master goes on: finish what the workers hold, and stop.  See `Ending.leave`."""
        return self._ending.leave(shared, continued, heir)

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop, or another master goes on."""
        return self._reconciler.stopping is not Stop.NO

    def disinherit(self) -> None:
        """The other master is gone: nobody goes on with what comes back from workers."""
        self._dispatcher.disinherit()

    def take_over(self) -> None:
        """The old master has yielded: accept from now on, and what was its is ours."""
        self._succeeds = False
        self.handles.take_over()
        self._dispatcher.release()

    def inherit(self, fd: int, handed: HandedConnection) -> None:
        """Go on with a connection that the old master hands over.  Takes `fd`."""
        listener = self.handles.taken().get(handed.listener)
        self._dispatcher.inherit(fd, handed, 0 if listener is None else listener.key)

    def scale(self, count: int) -> asyncio.Future[None]:
        """Have `count` workers from now on.  Done when it is so; fails with `BootError` as `reload` does.

        Raises `ClusterError`, as `reload` does, if the number of workers is the program's business.
        """
        self._must_not_be_manual("scale")
        self._want(count)
        return self._change()

    def _want(self, count: int) -> None:
        if count != self._reconciler.target.count and self._reconciler.stopping is Stop.NO:
            logger.info("Scaling from %d to %d workers", self._reconciler.target.count, count)
            self._emit(Scaled(count, self._reconciler.target.count))
            self._reconciler.target = dataclasses.replace(self._reconciler.target, count=count)
            self._dispatcher.resize(count)

    def scale_by(self, difference: int) -> None:
        """One more or one less; there is always one."""
        self.scale(max(1, self._reconciler.target.count + difference))

    def reload(self) -> asyncio.Future[None]:
        """Replace every worker by a fresh one, `reload_surge` at a time, each when its replacement serves.

        Done when the last has left; fails with `BootError` if a replacement cannot start, and the old ones stay.  Once
        one could, and another fails again and again, it is tried for ever, but whoever waits here hears of it.
        """
        self._must_not_be_manual("reload")
        if self._reconciler.stopping is Stop.NO:
            self._generation += 1
            logger.info("Reloading: generation %d replaces %d", self._generation, self._reconciler.target.generation)
            self._emit(StartedReload())
            self._crew.failure = None
            self._certificates.reread()
            self._keep_terms()
            self._crew.outdate_templates()
            self._reconciler.target = dataclasses.replace(self._reconciler.target, generation=self._generation)
        return self._change()

    def _renew(self, credentials: Credentials) -> None:
        """What the workers show new clients from now on."""
        for seat in self.seats.values():
            seat.channel.send(Renew(dict(credentials.to_json())))
        self._keep_terms()
        self._reconciler.reconcile()

    def _keep_terms(self) -> None:
        """Workers to come share sessions on the terms of now, not with those before."""
        before, self._terms = self._terms, self._certificates.terms
        templates = self._roster.templates
        if templates is not None and templates.lasting and self._terms != before:
            templates.outdate()

    def _must_not_be_manual(self, what: str) -> None:
        if self._reconciler.target.manual:
            raise ClusterError(f"cannot {what}: with respawn=False workers come and go by fork and disconnect only")

    def setup(self, settings: Settings) -> None:
        """Launch workers as these settings say from now on; what else they say stays as it was."""
        self._use_launch(settings)

    def _use_launch(self, settings: Settings) -> None:
        templates = self._roster.templates
        if templates is not None and templates.lasting and settings.process != self.settings.process:
            templates.outdate()
        self.settings = self._crew.settings = settings
        self._keep_terms()

    def adopt(self, settings: Settings, surroundings: Surroundings) -> None:
        """Launch workers as these settings say from now on, `rereading.FIXED` being what it was; `reload` follows.

        If none of that generation can start, what those that stay were launched with holds again, `surroundings`
        included, which are taken.  Raises `SettingsError` if the certificate has become bad, and then nothing was done.
        """
        count, credentials = self._reconciler.target.count, self._certificates.credentials
        if settings != self.settings:
            try:
                self._certificates.use(settings)
            except ClusterError:
                surroundings.restore()
                raise
        if self._before is not None and self._roster.proven < self._reconciler.target.generation:
            # What nobody has served with yet is nothing to go back to.
            surroundings.close()
        else:
            self._forget_before()
            self._before = Before(self.settings, credentials, surroundings, count, count)
        if settings.workers != self.settings.workers:
            # Together with the new generation: who starts now is of that.
            self._want(settings.workers)
            self._before.adopted = self._reconciler.target.count
        if settings != self.settings:
            self._use(settings)

    def _forget_before(self) -> None:
        if self._before is not None:
            self._before.surroundings.close()
            self._before = None

    def _use(self, settings: Settings) -> None:
        self._use_launch(settings)
        self._roster.limits = _limits(settings)
        self._health.use(settings)

    def start_debugging(self, port: str | int) -> asyncio.Future[dict[int, str]]:
        """Let debuggers attach to every worker, those to come included, at `port` (as in the setting `debug_port`).

        Done when all that are there have answered or gone, with the addresses.  A worker that has a debugger keeps it.
        """
        self._use_launch(dataclasses.replace(self.settings, debug_port=port))
        return self._debuggers.start(port)

    def debuggers(self) -> dict[int, str]:
        """Where debuggers can attach, by worker."""
        return self._debuggers.addresses()

    def fork(self, env: Environment = (), debug_port: int | None = None) -> int:
        """One worker more, now; its id.  Raises `ClusterError` if the cluster is stopping.

        `debug_port` is for this one worker, if the setting is a function.
        In a cluster that respawns, one more is wanted from now on, and a replacement inherits `env`.
        """
        if self._reconciler.stopping is not Stop.NO or self.finished.done():
            raise ClusterError("cannot fork: the cluster is stopping")
        if self._reconciler.target.manual:
            taken = {member.slot for member in self._roster.members.values()}
            slot = next(number for number in itertools.count() if number not in taken)
        else:
            slot = self._reconciler.target.count
            self._emit(Scaled(slot + 1, slot))
            self._reconciler.target = dataclasses.replace(self._reconciler.target, count=slot + 1)
            taken = set(range(slot))
        self._crew.environments[slot] = env
        self._distributor.resize(max(taken | {slot}) + 1)
        with self._reconciler.as_one():
            # At once, whatever there is to be forked from.
            action = Spawn(slot, self._reconciler.target.generation)
            return self._crew.spawn(action, self._health.wear(), debug_port, alone=True)

    def disconnect(self, worker: int) -> None:
        """Have a worker finish what it holds and leave.  Nothing happens if it leaves already, or is gone."""
        seat = self.seats.get(worker)
        if seat is not None and (seat.member.current or self._repeats):
            self._crew.perform(Drain(worker, quick=False, interrupt=False, keep=True))
            self._reconciler.reconcile()

    def destroy(self, worker: int, number: int) -> None:
        """`disconnect`, and once its channel is closed and it has not ended by itself, a signal."""
        self.disconnect(worker)
        self._crew.destroy(worker, number)

    def send_signal(self, worker: int, number: int) -> None:
        """Deliver a signal to a worker's process.  Nothing happens if it is gone."""
        self._crew.send_signal(worker, number)
        self._reconciler.reconcile()

    def disconnect_all(self) -> asyncio.Future[None]:
        """Have every worker leave; done when the last is dead.  The cluster goes on, and can fork again."""
        if not self._reconciler.target.manual:
            return self.scale(0)
        departure = self._departures.begin()
        for worker in tuple(self.seats):
            self.disconnect(worker)
        self._reconciler.reconcile()
        return departure

    def misbehaved(self, worker: int, error: ProtocolError) -> None:
        """What came of a worker's program could not be read: the worker is killed, if it is still there."""
        self._crew.broke_protocol(worker, error)

    def _change(self) -> asyncio.Future[None]:
        change = self._changes.begin()
        if self._roster.proven or self.settings.reload:
            # A fresh start for every slot: before anybody listened, who failed stays where it is, save where whoever
            # repairs it is at work.
            self._crew.failure, self._waiting = None, False
            self._roster.forgiven(self._loop.time())
        self._reconciler.reconcile()
        return change

    def _close(self) -> None:
        self._health.close()
        self._certificates.close()
        self._reopening.close()
        if self._owns_files:
            self._files.close()
        self._stacks.close()
        self.handles.close()
        self._dispatcher.close()
        self.outbox.close()
        self._crew.close()
        self._forget_before()
        self._reconciler.close()
        self._ending.close()

    # -- what has become of it ------------------------------------------------------------------------------------

    def _heed(self, current: Plan) -> None:
        self._tell_of(current.given_up)
        if not self._roster.members or self._hasty:
            self._departures.over()
        if current.verdict is Verdict.SETTLED:
            if not self._ready:
                self._ready = True
                self._emit(BecameReady())
            if not self.settled.done():
                self.settled.set_result(None)
            self._forget_before()
            self._changes.over()
        elif current.verdict is Verdict.REJECTED:
            self._reject()
        elif current.verdict is Verdict.FAILED:
            self._fail()
        elif current.verdict is Verdict.DESERTED:
            why = f"every worker has ended for good, the last one with this: {self._crew.last_exit}"
            self._finish(DesertedError(why))
        elif current.verdict is Verdict.STOPPED:
            untold = self._ending.untold
            self._finish(None if untold is None else BootError(untold.reason, untold.traceback))
        elif current.stuck and (self._changes or not self.settled.done()):
            self._give_up(current.stuck)

    def _fail(self) -> None:
        """No worker could start: that is the end, unless somebody is at work on the files, and nobody else serves."""
        if self._crew.hit:
            # A booting cluster that is stopped by a signal to all of its processes has not failed.
            if self._our_turn is None:
                self._our_turn = self._loop.call_later(OUR_TURN, self._was_not_meant)
            return
        failure = self._crew.failure or Failed(f"no worker came to listen: {self._crew.last_exit}", "")
        error = BootError(failure.reason, failure.traceback)
        if not self.settings.reload or self._succeeds:
            self._finish(error)
        elif not self._waiting:
            self._waiting = True
            logger.error("%s", error)
            logger.error("Nothing is served: waiting for a change of the files")

    def _was_not_meant(self) -> None:
        """No signal has come."""
        self._crew.hit, self._our_turn = False, None
        self._reconciler.reconcile()

    def _tell_of(self, given_up: tuple[int, ...]) -> None:
        """Slots in which restarting does not help, and those in which it has helped at last."""
        limits = self._roster.limits
        for slot in given_up:
            if slot not in self._given_up:
                logger.critical(
                    "Slot %d: more than %d restarts in a row were in vain; it is tried every %g s from now on, and "
                    "missing meanwhile",
                    slot, limits.max_restarts, limits.backoff_max,
                )  # fmt: skip
        for slot in self._given_up:
            if slot not in given_up and self._reconciler.stopping is Stop.NO:
                logger.info("Slot %d: it is not given up any more", slot)
        self._given_up = given_up

    def _reject(self) -> None:
        """The new generation cannot start: back to the one that serves."""
        failure = self._crew.why()
        reason = f"generation {self._reconciler.target.generation} cannot start: {failure.reason}"
        stays = "the old code serves on until the next change" if self.settings.reload else ""
        logger.error("Reload failed, %s; %s", reason, stays or f"generation {self._roster.proven} stays")
        error = BootError(reason, failure.traceback)
        self._reconciler.target = dataclasses.replace(self._reconciler.target, generation=self._roster.proven)
        before, self._before = self._before, None
        if before is not None:
            before.surroundings.restore()
            self._use(before.settings)
            self._certificates.go_back(before.settings, before.credentials)
            self._keep_terms()
            self._crew.outdate_templates()
            if self._reconciler.target.count == before.adopted:
                # Or else somebody has asked for another number since.
                self._want(before.count)
        self._changes.over(error)
        self._reconciler.reconcile()

    def _give_up(self, slots: tuple[int, ...]) -> None:
        """What was ordered may never be: let nobody wait for it, and go on trying."""
        failure = self._crew.why()
        where = ", ".join(map(str, slots))
        reason = f"workers die again and again before they are of use, in slot {where}: {failure.reason}"
        logger.error("Not done yet: %s; the cluster goes on trying", reason)
        if not self.settled.done():
            self.settled.set_exception(BootError(reason, failure.traceback))
            # Nobody may be waiting: a program of our own goes on with the others.
            self.settled.exception()
        self._changes.over(BootError(f"{reason}; the cluster goes on trying", failure.traceback))

    def _finish(self, error: BootError | None) -> None:
        if not self.finished.done():
            for waiting in (self._changes, self._departures):
                waiting.over(ClusterError("the cluster has stopped"))
            self._close()
            self._emit(Stopped())
            self.finished.set_result(error)

    # -- the log --------------------------------------------------------------------------------------------------

    def reopen_logs(self) -> asyncio.Future[None]:
        """Open the log's files again, under their names as they are now; the `FileHandler`s of workers do so too.

        Done when no worker writes to the old ones any more: one that holds its event loop does so later.  Fails with
        `ClusterError` if a file cannot be opened: everything goes on into the old ones then.
        """
        return self._reopening.order(self.seats)

    # -- looking in -----------------------------------------------------------------------------------------------

    def show_stacks(self) -> None:
        """Log what every thread and every task of every worker does, a block per worker, within about a second."""
        for id, seat in self.seats.items():
            who = f"Worker {id} (slot {seat.member.slot}, pid {seat.process.pid})"
            self._stacks.ask(id, who, seat.stacks, seat.channel.send, seat.process.send_signal)

    @property
    def served(self) -> bool:
        """Whether any worker ever listened."""
        return self._roster.proven > 0

    def pids(self) -> list[int]:
        """The processes of the workers that are not dead, and of their templates."""
        return self._crew.pids()

    def healthy(self, within: float) -> bool:
        """Whether some worker serves whose event loop has turned in so many seconds, or none can be expected to."""
        if not self.served or self._reconciler.stopping is not Stop.NO:
            # Starting and stopping have limits of their own.
            return True
        return self._roster.responsive(within, self._loop.time())

    def statistics(self) -> Statistics:
        """Connections by state and by worker, now."""
        return self._distributor.statistics()

    def _pids(self) -> list[tuple[int, int]]:
        return [(id, seat.process.pid) for id, seat in self.seats.items()]

    def states(self) -> list[tuple[int, int, int, WorkerState]]:
        """(id, slot, pid, state) of every worker that is not dead."""
        return [(seat.member.id, seat.member.slot, seat.process.pid, seat.member.state) for seat in self.seats.values()]


def _limits(settings: Settings) -> Limits:
    return Limits(
        boot=settings.timeout_boot,
        graceful=settings.timeout_graceful_shutdown,
        backoff=settings.restart_backoff,
        backoff_max=settings.restart_backoff_max,
        min_uptime=settings.min_uptime,
        # In development the whole of the new code is wanted at once.
        surge=max(settings.reload_surge, settings.workers) if settings.reload else settings.reload_surge,
        timeout=settings.timeout,
        max_restarts=settings.max_restarts,
        final=frozenset(settings.on_worker_exit_code),
    )
