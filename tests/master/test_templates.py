"""A template and the workers that are ordered of it: what goes wrong between the order and the fork."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.channel.tally import Tally
from clusterserve.core.reconcile import Drain, Kill
from clusterserve.core.roster import Limits, Roster
from clusterserve.core.templates import DismissTemplate, StartTemplate
from clusterserve.core.templates import Templates as Book
from clusterserve.log_files import LogFiles
from clusterserve.master.process import Exit, WorkerProcess
from clusterserve.master.templates import Templates, _inherited
from clusterserve.settings import Settings
from tests.helpers import proc
from tests.helpers.server import ROOT
from tests.helpers.waiting import eventually

from .rig import SkewedLoop, no_more_descriptors

SETTINGS = Settings.create(app="tests.helpers.apps.preloaded:app", preload=True, workers=1, bind="127.0.0.1:0")


class Nursery:
    """A template that is ready, and what became of the workers that it was to fork."""

    def __init__(self, loop: SkewedLoop) -> None:
        self.loop = loop
        self.book = Book()
        self.roster = Roster(Limits(), templates=self.book)
        self.tally = Tally.create()
        self.templates = Templates(loop, self.roster, print, lambda: None, LogFiles.of(SETTINGS), self.tally.fd)
        self.templates.perform(StartTemplate(1), SETTINGS, [str(ROOT), *sys.path])
        (self.pid,) = self.templates.pids()
        self.born: list[WorkerProcess | OSError] = []
        self.owed: list[list[object]] = []
        self.exits: list[Exit] = []
        loop.until(lambda: self.book.ready(1) is not None, "the template is ready")

    def order(self, slot: int = 0) -> int:
        """A worker; its id."""
        member = self.roster.spawned(slot, 1, self.loop.time())
        self.templates.fork(member, SETTINGS, (), self.exits.append, self._forked)
        return member.id

    def _forked(self, result: WorkerProcess | OSError, owed: list[object]) -> None:
        self.born.append(result)
        self.owed.append(owed)

    def worker(self) -> WorkerProcess:
        """The one that was forked last."""
        found = self.born[-1]
        assert isinstance(found, WorkerProcess)
        return found

    def close(self) -> None:
        living = [each for each in self.born if isinstance(each, WorkerProcess)]
        for each in living:
            # Without its channel it ends.
            each.messages.close()
            each.connections.close()
            each.board.close()
            each.kept.close()
        self.loop.until(lambda: len(self.exits) == len(living), "every worker's exit is known")
        for template in list(self.book.here.values()):
            if template.dismissed is None:
                self.templates.perform(DismissTemplate(template.id), SETTINGS, [])
        self.loop.until(lambda: not self.book.here, "the template has ended")
        self.tally.close()


@pytest.fixture
def nursery(loop: SkewedLoop) -> Iterator[Nursery]:
    nursery = Nursery(loop)
    yield nursery
    nursery.close()


def test_a_worker_that_is_told_something_while_it_is_forked_hears_of_it(nursery: Nursery, loop: SkewedLoop) -> None:
    os.kill(nursery.pid, signal.SIGSTOP)
    worker = nursery.order()
    drain = Drain(worker, quick=False, interrupt=True, keep=True)
    assert nursery.templates.owe(drain)
    assert nursery.roster.members[worker].drained is not None
    os.kill(nursery.pid, signal.SIGCONT)
    loop.until(lambda: nursery.born, "it is forked")
    assert nursery.owed == [[drain]]
    # Now it is like any other.
    assert not nursery.templates.owe(drain)
    assert proc.children(os.getpid()) == sorted([nursery.pid, nursery.worker().pid])


def test_a_template_that_does_not_fork_is_killed(nursery: Nursery, loop: SkewedLoop) -> None:
    os.kill(nursery.pid, signal.SIGSTOP)
    worker = nursery.order()
    assert nursery.templates.owe(Kill(worker, "it did not listen"))
    assert nursery.roster.members[worker].killed
    loop.until(lambda: nursery.born, "it is known that there will be no worker")
    (error,) = nursery.born
    assert isinstance(error, ChildProcessError)
    assert str(error).endswith("its template was killed by SIGKILL")
    assert nursery.book.here == {}


def test_one_that_is_dismissed_forks_what_was_ordered_before(nursery: Nursery, loop: SkewedLoop) -> None:
    os.kill(nursery.pid, signal.SIGSTOP)
    nursery.order()
    nursery.templates.perform(DismissTemplate(1), SETTINGS, [])
    os.kill(nursery.pid, signal.SIGCONT)
    loop.until(lambda: not nursery.book.here, "it has ended")
    assert proc.alive(nursery.worker().pid), nursery.exits


def test_a_template_without_descriptors_says_so_and_lives(nursery: Nursery, loop: SkewedLoop) -> None:
    before = resource.prlimit(nursery.pid, resource.RLIMIT_NOFILE)
    used = len(proc.descriptors(nursery.pid))
    highest = max(proc.descriptors(nursery.pid))
    # From none that can be received, over those for which only a pipe is missing, to enough.
    for spare in range(highest + 12 - used):
        resource.prlimit(nursery.pid, resource.RLIMIT_NOFILE, (used + spare, before[1]))
        nursery.order()
        loop.until(lambda spare=spare: len(nursery.born) == spare + 1, "the answer is known")  # type: ignore[misc]
        if isinstance(nursery.born[-1], WorkerProcess):
            break
    errors = nursery.born[:-1]
    # Four descriptors of the worker's, and the ends of two pipes.
    assert len(errors) >= 6
    assert {error.errno for error in errors if isinstance(error, OSError)} == {errno.EMFILE}
    resource.prlimit(nursery.pid, resource.RLIMIT_NOFILE, before)
    # It tells of the worker before it closes what the worker has.
    eventually(lambda: len(proc.descriptors(nursery.pid)) == used, "the template has closed everything")
    assert nursery.worker().pid in proc.children(os.getpid())


def test_a_master_without_descriptors_has_no_worker(nursery: Nursery, loop: SkewedLoop) -> None:
    """It was forked, and nobody can watch it: it is killed, and waited for."""
    os.kill(nursery.pid, signal.SIGSTOP)
    nursery.order()
    with no_more_descriptors():
        os.kill(nursery.pid, signal.SIGCONT)
        loop.until(lambda: nursery.born, "the answer is known")
    (error,) = nursery.born
    assert isinstance(error, OSError)
    assert error.errno == errno.EMFILE
    eventually(lambda: proc.children(os.getpid()) == [nursery.pid], "only the template is left")


def test_a_template_that_is_no_template(loop: SkewedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    roster = Roster(Limits(), templates=Book())
    failed: list[str] = []
    templates = Templates(
        loop, roster, lambda why, hit: failed.append(why.reason), lambda: None, LogFiles.of(SETTINGS), -1
    )
    templates.perform(StartTemplate(1), SETTINGS, [])
    assert templates.pids() == []
    assert failed == ["template 1 could not be spawned: [Errno 2] No such file or directory: '/nowhere/python'"]
    assert roster.templates is not None
    assert (roster.templates.here, roster.templates.failures) == ({}, 1)


def test_other_variables_need_another_template_if_it_was_to_last(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Spawned workers would have them."""
    # As it was when the template was started.
    monkeypatch.setenv("PYTEST_CURRENT_TEST", os.environ["PYTEST_CURRENT_TEST"].replace("(call)", "(setup)"))
    nursery.book.lasting = True
    nursery.templates.outdate()
    assert nursery.book.ready(2) is not None
    with monkeypatch.context() as changed:
        changed.chdir(tmp_path)
        nursery.book.lasting = False
        nursery.templates.outdate()
        # Of its own generation, of which nothing changes.
        assert nursery.book.ready(1) is not None
        nursery.book.lasting = True
        nursery.templates.outdate()
        assert nursery.book.ready(2) is None
    monkeypatch.setenv("SOMETHING", "else")
    for template in nursery.book.here.values():
        template.outdated = False
    nursery.templates.outdate()
    assert nursery.book.ready(2) is None


def test_a_directory_that_was_made_anew_is_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the same name; a template that was started in the old one would have its forks be nowhere."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.chdir(site)
    before = _inherited()
    site.rmdir()
    assert _inherited() == before
    # As long as anybody is in the old one, no other is taken for it.
    old = os.open(".", os.O_PATH)
    site.mkdir()
    os.chdir(site)
    assert _inherited() != before
    os.close(old)
