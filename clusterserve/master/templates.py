"""`Templates`: the template processes of a cluster, started and told what was decided; workers are forked from them.

A worker that is forked is a child of the master like any other: while one is being forked, the master takes orphans in
(subreaper.py; worker/template.py has the other half).  It needs its template no more, so what becomes of that is no
worker's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from ..channel.descriptors import MAX_DESCRIPTORS
from ..channel.message import MessageChannel
from ..core.messages import Born, Failed, Fork, Message, Prepare, Prepared, Unborn
from ..core.reconcile import Abort, Drain, Kill
from ..core.roster import Member, Roster
from ..core.templates import DismissTemplate, KillTemplate, StartTemplate, Step, Template
from ..current import TEMPLATE_VARIABLE
from ..errors import ProtocolError
from ..log_files import LogFiles
from ..settings import Settings
from .child import Child, Exit, interpreter
from .process import ENTRY, Ends, WorkerProcess
from .subreaper import SUBREAPER

logger = logging.getLogger("clusterserve")

#: Told of a worker that was ordered: its process, or why there is none, and what it has been told meanwhile.
OnFork = Callable[[WorkerProcess | OSError, list[Drain | Abort | Kill]], None]


@dataclass
class _Order:
    """A worker that is being forked."""

    member: Member
    ends: Ends
    on_exit: Callable[[Exit], None]
    on_fork: OnFork
    owed: list[Drain | Abort | Kill] = field(default_factory=list)


@dataclass
class _Place:
    """A template's record for `plan`, its process, its channel, and its orders by worker."""

    template: Template
    child: Child
    channel: MessageChannel
    #: What its forks inherit of us, and processes that are spawned now may not.
    inherited: tuple[tuple[int, int], dict[str, str]]
    orders: dict[int, _Order] = field(default_factory=dict)
    #: What it said of why it failed.
    failed: Failed | None = None

    @property
    def who(self) -> tuple[int, int]:
        """For the log: "Template %d (pid %d)"."""
        return self.template.id, self.child.pid


def _inherited() -> tuple[tuple[int, int], dict[str, str]]:
    """The directory and the variables that a process has which is started now."""
    # Not its name: it may have been removed, and made anew.
    here = os.stat(".")
    return (here.st_dev, here.st_ino), dict(os.environ)


class Templates:
    """`on_failed` is told why one could not prepare, or how it ended, and whether it was `hit`; `changed` is called
    when `plan` may have something to say.  `tally` is what all workers count in."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        roster: Roster,
        on_failed: Callable[[Failed, bool], None],
        changed: Callable[[], None],
        files: LogFiles,
        tally: int,
    ) -> None:
        assert roster.templates is not None
        self._loop = loop
        self._roster = roster
        self._book = roster.templates
        self._on_failed = on_failed
        self._changed = changed
        self._files = files
        self._tally = tally
        self._places: dict[int, _Place] = {}

    def pids(self) -> list[int]:
        """The processes of those that are not dead."""
        return [place.child.pid for place in self._places.values()]

    def perform(self, step: Step, settings: Settings, path: list[str], terms: str = "") -> None:
        """Do it, which is a fact from then on.  A new one prepares as `settings` say, with this `sys.path`.

        TLS sessions of its forks are for these `terms`.
        """
        now = self._loop.time()
        if isinstance(step, StartTemplate):
            self._start(step.generation, settings, path, terms, now)
            return
        place = self._places[step.template]
        if isinstance(step, DismissTemplate):
            self._book.dismissed(step.template, now)
            self._leave(place)
        elif isinstance(step, KillTemplate):
            logger.log(self._level, "Template %d (pid %d) is killed: %s", *place.who, step.why)
            self._on_failed(Failed(f"the template was killed: {step.why}", ""), False)
            self._kill(place)

    def _start(self, generation: int, settings: Settings, path: list[str], terms: str, now: float) -> None:
        template = self._book.started(generation, now)
        if self._roster.rejected > generation and not self._book.lasting:
            # There is no other way to get at the old code; what it does then, its log lines say.
            logger.warning(
                "Template %d starts from the files as they are now, from which generation %d could not start; "
                "repair them, and reload",
                template.id,
                self._roster.rejected,
            )
        try:
            place = self._spawn(template, settings, Prepare(template.id, generation, settings.to_json(), path, terms))
        except Exception as exc:  # noqa: BLE001 - there are others to be looked after, and it is tried again
            logger.error("Template %d could not be spawned: %s", template.id, exc)
            self._on_failed(Failed(f"template {template.id} could not be spawned: {exc}", ""), False)
            self._roster.template_gone(template.id, now)
            return
        self._places[template.id] = place
        what = settings.app if settings.preload else "what all workers need"
        logger.log(
            logging.INFO if settings.preload else logging.DEBUG, "Template %d (pid %d) loads %s", *place.who, what
        )

    def _spawn(self, template: Template, settings: Settings, order: Prepare) -> _Place:
        with contextlib.ExitStack() as undo:
            mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(mine.close)
            with its:
                environment = {
                    **os.environ, **dict(settings.env), TEMPLATE_VARIABLE: f"{its.fileno()},{os.getpid()}",
                }  # fmt: skip
                # Its standard streams are ours, whatever workers are given.
                popen = interpreter(settings, ENTRY, [], environment, (its.fileno(),), {})
            undo.callback(popen.wait)
            undo.callback(popen.kill)
            child = Child(popen.pid, self._loop, partial(self._exited, template.id), popen)
            undo.callback(child.abandon)
            channel = MessageChannel(
                self._loop, mine, partial(self._on_message, template.id), partial(self._closed, template.id)
            )
            undo.callback(channel.close)
            place = _Place(template, child, channel, _inherited())
            channel.send(order, self._files.descriptors)
            undo.pop_all()
        return place

    @property
    def _level(self) -> int:
        """Before anybody ever listened, the story is told once, when the cluster fails."""
        return logging.ERROR if self._roster.proven else logging.DEBUG

    def outdate(self) -> None:
        """A generation begins.  A lasting template that was started in another directory, or with other variables, than
        are ours by now is not for it: workers have what the configuration says, wherever they come from."""
        if self._book.lasting and any(place.inherited != _inherited() for place in self._places.values()):
            self._book.outdate()

    # -- workers --------------------------------------------------------------------------------------------------

    def fork(
        self,
        member: Member,
        settings: Settings,
        env: Iterable[tuple[str, str]],
        on_exit: Callable[[Exit], None],
        on_fork: OnFork,
    ) -> None:
        """Have a worker forked from the template of its generation, which must be ready; raises OSError.

        `on_fork` is called once, not from here; `on_exit` as by `WorkerProcess`.
        """
        template = self._book.ready(member.generation)
        assert template is not None, f"generation {member.generation} has no template"
        place = self._places[template.id]
        with contextlib.ExitStack() as undo:
            ends = Ends(settings, self._tally)
            undo.callback(ends.abandon)
            streams = {number: fd for number, fd in ends.streams.theirs.items() if fd is not None}
            descriptors = [*ends.theirs, *streams.values()]
            if len(descriptors) > MAX_DESCRIPTORS:
                raise OSError(
                    errno.E2BIG, f"more than {MAX_DESCRIPTORS - len(ends.theirs)} entries of stdio for a fork"
                )
            SUBREAPER.enter()
            undo.callback(SUBREAPER.leave)
            place.channel.send(Fork(member.id, member.slot, dict(env), list(streams)), descriptors)
            undo.pop_all()
        place.orders[member.id] = _Order(member, ends, on_exit, on_fork)

    def owe(self, action: Drain | Abort | Kill) -> bool:
        """Whether this is about a worker that is being forked.  Then it is a fact now, and the worker is told later."""
        now = self._loop.time()
        for place in self._places.values():
            order = place.orders.get(action.worker)
            if order is None:
                continue
            order.owed.append(action)
            if isinstance(action, Drain):
                self._roster.drained(action.worker, action.quick, now)
            else:
                # In all the time it had the template has not forked it: that is what is stuck.
                self._roster.killed(action.worker)
                self._kill(place)
            return True
        return False

    def _forked(self, place: _Place, worker: int, result: int | OSError) -> None:
        order = place.orders.pop(worker)
        SUBREAPER.leave()
        process: WorkerProcess | OSError
        if isinstance(result, OSError):
            order.ends.abandon()
            process = result
        else:
            try:
                process = WorkerProcess.adopt(order.ends, result, self._loop, order.on_exit)
            except OSError as exc:
                process = exc
        order.on_fork(process, order.owed)
        if place.template.dismissed is not None:
            self._leave(place)

    # -- what becomes of them -------------------------------------------------------------------------------------

    def _on_message(self, id: int, message: Message, descriptors: Iterable[int]) -> None:
        place = self._places[id]
        for fd in descriptors:
            os.close(fd)
        if isinstance(message, Prepared):
            now = self._loop.time()
            self._book.prepared(id, now)
            logger.debug("Template %d (pid %d) is ready after %.2f s", *place.who, now - place.template.started)
        elif isinstance(message, Born) and message.worker in place.orders:
            self._forked(place, message.worker, message.pid)
        elif isinstance(message, Unborn) and message.worker in place.orders:
            self._forked(place, message.worker, OSError(message.errno, os.strerror(message.errno)))
        elif isinstance(message, Failed):
            place.failed = message
        else:
            raise ProtocolError(f"the master does not expect {type(message).__name__} of a template")
        self._changed()

    def _leave(self, place: _Place) -> None:
        """Dismissed: it ends when its channel does.  One that is not ready does not listen, and has nothing to end."""
        if place.template.ready is None:
            self._kill(place)
        elif not place.orders:
            place.channel.close()

    def _kill(self, place: _Place) -> None:
        self._book.killed(place.template.id)
        place.child.send_signal(signal.SIGKILL)

    def _closed(self, id: int, error: ProtocolError | None) -> None:
        place = self._places[id]
        if error is not None:
            logger.error("Template %d (pid %d) is killed, it broke the protocol: %s", *place.who, error)
        # It ends by itself, and how it does is not changed by this any more; unless it is not what it should be.
        place.child.send_signal(signal.SIGKILL)

    def _exited(self, id: int, ended: Exit) -> None:
        place = self._places[id]
        place.channel.drain()
        place.channel.close()
        del self._places[id]
        if place.template.dismissed is None:
            self._mourn(place, ended)
        for worker in tuple(place.orders):
            self._forked(place, worker, ChildProcessError(errno.ECHILD, f"its template {ended}"))
        self._roster.template_gone(id, self._loop.time())
        self._changed()

    def _mourn(self, place: _Place, ended: Exit) -> None:
        if place.failed is not None:
            self._on_failed(place.failed, False)
            text = place.failed.traceback.rstrip()
            logger.log(self._level, "Template %d: %s%s", place.template.id, place.failed.reason, text and f"\n{text}")
            return
        if not place.template.killed:
            self._on_failed(Failed(f"the template {ended}", ""), ended.hit)
        logger.log(
            logging.ERROR if place.template.ready is not None else self._level,
            "Template %d (pid %d) %s; running workers go on without it, a new one is started for those to come",
            *place.who,
            ended,
        )
