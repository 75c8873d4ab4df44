"""From a name to policies, and the guard around those that are not ours."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clusterserve.core.policies import TURN, Candidate, Hash, Least, Policy, RoundRobin, Waiting
from clusterserve.errors import SettingsError
from clusterserve.master.policies import GuardedPolicy, policy_factory

from .rig import Rig


@dataclass
class Person:
    """A worker as a policy sees it."""

    id: int
    slot: int = 0
    ready: bool = True
    full: bool = False
    load: int = 0


@dataclass
class Call:
    """A connection as a policy sees it."""

    id: int = 1
    client: bytes = b""


class First:
    """A policy of somebody else's: the first worker there is, whatever it does."""

    def __init__(self) -> None:
        self.workers: list[Candidate] = []

    def add(self, worker: Candidate) -> None:
        self.workers.append(worker)

    def remove(self, worker: Candidate) -> None:
        self.workers.remove(worker)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        return self.workers[0] if self.workers else None


class Raising(First):
    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        raise RuntimeError("the policy's own trouble")


class Deaf(First):
    """Does not take in that a worker has gone."""

    def remove(self, worker: Candidate) -> None:
        pass


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    caplog.set_level(logging.ERROR, logger="clusterserve.policy")
    return lambda: list(caplog.records)


Errors = Callable[[], list[logging.LogRecord]]


def make(name: str) -> Policy:
    factory = policy_factory(name, slots=2, long_lived=True)
    assert factory is not None
    return factory()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the module `alien_policy`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "alien_policy", raising=False)

    def write(source: str) -> None:
        (tmp_path / "alien_policy.py").write_text(source)

    return write


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names() -> None:
    assert isinstance(make("rr"), RoundRobin)
    assert isinstance(make("least"), Least)
    hashed = make("hash")
    assert isinstance(hashed, Hash)
    assert hashed.slots == 2
    assert policy_factory("none", slots=2, long_lived=True) is None


def test_each_listener_has_one_of_its_own() -> None:
    factory = policy_factory("rr", slots=2, long_lived=True)
    assert factory is not None
    assert factory() is not factory()


@pytest.mark.parametrize(("long_lived", "patience"), [(True, TURN), (False, 0.0)])
def test_round_robin_waits_for_a_turn_where_connections_live_long(long_lived: bool, patience: float) -> None:
    factory = policy_factory("rr", slots=2, long_lived=long_lived)
    assert factory is not None
    policy = factory()
    assert isinstance(policy, RoundRobin)
    assert policy.patience == patience


def test_a_class_of_somebody_elses(module: Callable[[str], None]) -> None:
    module("from master.test_policies import First as Mine")
    policy = make("alien_policy:Mine")
    assert isinstance(policy, GuardedPolicy)
    worker = Person(1)
    policy.add(worker)
    assert policy.pick(Call(), 0.0) is worker


# ── what cannot be used ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module_anywhere", "cannot be imported: No module named 'no_such_module_anywhere'"),
        ("raise RuntimeError('its own trouble')", "cannot be imported: RuntimeError: its own trouble"),
        ("raise AttributeError('its own trouble')", "cannot be imported: AttributeError: its own trouble"),
        ("class Mine", "cannot be imported: SyntaxError: "),
        ("class Other: pass", "the module 'alien_policy' has no policy 'Mine'"),
        ("Mine = None", "the module 'alien_policy' has no policy 'Mine'"),
        ("Mine = 7", "must be a class that needs no arguments: "),
        ("class Mine:\n def __init__(self, size): pass", "must be a class that needs no arguments: .*'size'"),
        ("class Mine:\n def __init__(self): raise OSError('no luck')", "cannot be made: OSError: no luck"),
        ("class Mine: pass", "needs the methods add, remove and pick"),
        ("class Mine:\n def add(self, worker): pass\n def pick(self): pass", "needs the methods add, remove and pick"),
    ],
)
def test_what_is_no_policy(module: Callable[[str], None], source: str, words: str) -> None:
    module(source)
    with pytest.raises(SettingsError, match=words) as caught:
        policy_factory("alien_policy:Mine", slots=1, long_lived=True)
    assert "alien_policy" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_module_anywhere:Mine", "no_such.module:Mine", ".relative:Mine", "a..b:Mine"])
def test_a_module_that_is_not_there(name: str) -> None:
    with pytest.raises(SettingsError, match=f"the policy '{name}' cannot be imported"):
        policy_factory(name, slots=1, long_lived=True)


def test_a_class_that_works_only_once(module: Callable[[str], None], errors: Errors) -> None:
    module(
        "from master.test_policies import First\n"
        "class Mine(First):\n"
        "    made = []\n"
        "    def __init__(self):\n"
        "        assert not self.made\n"
        "        self.made.append(1)\n"
        "        super().__init__()\n"
    )
    assert isinstance(make("alien_policy:Mine"), RoundRobin)
    assert [record.message for record in errors()] == [
        "Policy alien_policy:Mine cannot be made any more; connections go round robin"
    ]


# ── the guard ───────────────────────────────────────────────────────────────────────────────────────────────────────


def guarded(policy: Policy, *workers: Person) -> GuardedPolicy:
    guard = GuardedPolicy(policy, "mine:Policy")
    for worker in workers:
        guard.add(worker)
    return guard


def picked(guard: GuardedPolicy, times: int = 1) -> list[int | None]:
    """The ids of the workers it chooses."""
    found = [guard.pick(Call(number), 0.0) for number in range(times)]
    return [None if worker is None else worker.id for worker in found]


def test_a_good_policy_is_asked_and_nobody_else(errors: Errors) -> None:
    workers = [Person(1), Person(2)]
    guard = guarded(First(), *workers)
    assert picked(guard, 3) == [1, 1, 1]
    guard.remove(workers[0])
    assert picked(guard) == [2]
    guard.remove(workers[1])
    assert picked(guard) == [None]
    assert errors() == []


def test_what_it_raises_is_told_once_and_round_robin_stands_in(errors: Errors) -> None:
    guard = guarded(Raising(), Person(1), Person(2), Person(3))
    assert picked(guard, 5) == [1, 2, 3, 1, 2]
    (record,) = errors()
    assert record.message == "Policy mine:Policy raised; where it fails, connections go round robin"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the policy's own trouble"


def test_a_worker_that_is_not_ready(errors: Errors) -> None:
    guard = guarded(First(), Person(1, ready=False), Person(2), Person(3))
    assert picked(guard, 3) == [2, 3, 2]
    (record,) = errors()
    expected = "Policy mine:Policy chose a worker that is not ready; where it fails, connections go round robin"
    assert record.message == expected


def test_nobody_is_ready() -> None:
    guard = guarded(Raising(), Person(1, ready=False))
    assert picked(guard) == [None]


def test_it_may_do_right_again(errors: Errors) -> None:
    first = Person(1, ready=False)
    guard = guarded(First(), first, Person(2))
    assert picked(guard) == [2]
    first.ready = True
    assert picked(guard, 2) == [1, 1]
    assert len(errors()) == 1


def test_a_worker_that_has_left(errors: Errors) -> None:
    gone, here = Person(1), Person(2)
    guard = guarded(Deaf(), gone, here)
    guard.remove(gone)
    assert picked(guard) == [2]
    assert "does not listen" in errors()[0].message


@pytest.mark.parametrize("chosen", [Person(1), Person(9), "worker 1", 7])
def test_what_is_no_worker_of_ours(errors: Errors, chosen: Any) -> None:
    policy = First()
    policy.pick = lambda connection, now: chosen  # type: ignore[method-assign]
    guard = guarded(policy, Person(1, slot=5), Person(2))
    assert picked(guard, 2) == [1, 2]
    assert len(errors()) == 1


@pytest.mark.parametrize("method", ["add", "remove"])
def test_what_add_and_remove_raise(errors: Errors, method: str) -> None:
    policy = First()

    def fail(worker: Candidate) -> None:
        raise ValueError(worker.id)

    setattr(policy, method, fail)
    worker = Person(1)
    guard = guarded(policy, worker)
    guard.remove(worker)
    guard.add(Person(2))
    guard.remove(Person(2))
    assert len(errors()) == 1


def test_wake_at_is_passed_on(errors: Errors) -> None:
    policy: Any = First()
    guard = guarded(policy)
    assert [guard.wake_at] == [None]
    policy.wake_at = 12.5
    assert [guard.wake_at] == [12.5]
    assert errors() == []


@pytest.mark.parametrize("wake", [float("nan"), float("inf"), "soon", 10**400])
def test_a_wake_at_that_is_no_time(errors: Errors, wake: Any) -> None:
    policy: Any = First()
    policy.wake_at = wake
    guard = guarded(policy)
    assert guard.wake_at is None
    assert guard.wake_at is None
    assert len(errors()) == 1


def test_lanes_are_passed_on(errors: Errors) -> None:
    policy: Any = First()
    guard = guarded(policy)
    assert guard.lane(Call(5)) is None
    policy.lane = lambda connection: connection.id % 3
    assert guard.lane(Call(5)) == 2
    assert errors() == []


def _raise(connection: Waiting) -> Hashable:
    raise KeyError(connection.id)


@pytest.mark.parametrize("lane", [_raise, lambda connection: [], lambda: 1, 7])
def test_lanes_that_are_none(errors: Errors, lane: Any) -> None:
    policy: Any = First()
    policy.lane = lane
    guard = guarded(policy)
    assert guard.lane(Call()) is None
    assert guard.lane(Call()) is None
    assert len(errors()) == 1


def test_a_broken_policy_in_the_dispatcher(rig: Rig, errors: Errors) -> None:
    listener = rig.listen(policy=GuardedPolicy(Deaf(), "mine:Deaf"))
    deserter, loyal = rig.worker(listener), rig.worker(listener)
    # It closes its server, lives on, and is still that policy's favourite.
    rig.distributor.detach(deserter.id, listener.key)
    for _ in range(3):
        rig.connect(listener)
    assert len(loyal.receive(3)) == 3
    assert len(errors()) == 1


class Sized(First):
    """Wants to know how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def resize(self, slots: int) -> None:
        self.sizes.append(slots)
        if slots > 8:
            raise RuntimeError("too many for me")


def test_a_guarded_policy_learns_how_many_slots_there_are(caplog: pytest.LogCaptureFixture) -> None:
    policy = Sized()
    guard = GuardedPolicy(policy, "package.module:Sized")
    for slots in (2, 3, 9):
        guard.resize(slots)
    assert policy.sizes == [2, 3, 9]
    # What it raises is its own trouble.
    (record,) = caplog.records
    assert "package.module:Sized raised" in record.getMessage()
    # Who does not want to know is not asked.
    GuardedPolicy(First(), "package.module:First").resize(4)
