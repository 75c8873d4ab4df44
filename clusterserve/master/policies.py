"""From the name of a policy to one policy object per listener, and a guard around those that are not ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from importlib import import_module
from math import isfinite
from typing import Any

from ..core.policies import NAMES, TURN, Candidate, Policy, RoundRobin, Waiting, make_policy
from ..errors import SettingsError

logger = logging.getLogger("clusterserve.policy")


class GuardedPolicy:
    """A third-party policy that cannot take the cluster down: its first fault is logged, and round robin stands in."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._fallback = RoundRobin()
        self._workers: dict[int, Candidate] = {}
        self._complained = False
        self.sticky = bool(getattr(policy, "sticky", False))

    def add(self, worker: Candidate) -> None:
        self._workers[worker.id] = worker
        self._fallback.add(worker)
        self._call(self._policy.add, worker)

    def remove(self, worker: Candidate) -> None:
        self._workers.pop(worker.id, None)
        self._fallback.remove(worker)
        self._call(self._policy.remove, worker)

    def pick(self, connection: Waiting, now: float) -> Candidate | None:
        try:
            worker = self._policy.pick(connection, now)
            if worker is None:
                return None
            if self._workers.get(worker.id) is not worker:
                self._complain("chose a worker that does not listen", None)
            elif not worker.ready:
                self._complain("chose a worker that is not ready", None)
            else:
                return worker
        except Exception as exc:  # noqa: BLE001 - anything may come out of other people's code; it is logged
            self._complain("raised", exc)
        return self._fallback.pick(connection, now)

    def resize(self, slots: int) -> None:
        resize = getattr(self._policy, "resize", None)
        if resize is not None:
            self._call(resize, slots)

    def lane(self, connection: Waiting) -> Hashable:
        try:
            lane = getattr(self._policy, "lane", None)
            if lane is None:
                return None
            name: Hashable = lane(connection)
            hash(name)
        except Exception as exc:  # noqa: BLE001 - as above
            self._complain("raised", exc)
            return None
        return name

    @property
    def wake_at(self) -> float | None:
        try:
            wake: float | None = getattr(self._policy, "wake_at", None)
            if wake is None or isfinite(wake):
                return wake
            self._complain("has a wake_at that never comes", None)
        except Exception as exc:  # noqa: BLE001 - as above
            self._complain("raised", exc)
        return None

    def _call(self, method: Callable[[Any], None], argument: object) -> None:
        try:
            method(argument)
        except Exception as exc:  # noqa: BLE001 - as above
            self._complain("raised", exc)

    def _complain(self, what: str, exc: Exception | None) -> None:
        if not self._complained:
            self._complained = True
            logger.error("Policy %s %s; where it fails, connections go round robin", self._name, what, exc_info=exc)


def policy_factory(name: str, *, slots: int, long_lived: bool) -> Callable[[], Policy] | None:
    """What makes a policy for each listener; None for `none`, where the workers accept.

    `long_lived`: connections stay with their worker, so round robin waits for the one whose turn it is.  Raises
    `SettingsError` for a `package.module:Class` that cannot be used.
    """
    if name == "none":
        return None
    if name in NAMES:
        return lambda: make_policy(name, slots=slots, patience=TURN if long_lived else 0.0)
    module, _, attribute = name.partition(":")
    try:
        imported = import_module(module)
    except Exception as exc:  # as above
        reason = str(exc) if isinstance(exc, ImportError) else f"{type(exc).__name__}: {exc}"
        raise SettingsError(f"the policy {name!r} cannot be imported: {reason}") from exc
    found = getattr(imported, attribute, None)
    if found is None:
        raise SettingsError(f"the module {module!r} has no policy {attribute!r}")
    try:
        probe = found()
    except TypeError as exc:
        raise SettingsError(f"the policy {name!r} must be a class that needs no arguments: {exc}") from exc
    except Exception as exc:  # as above
        raise SettingsError(f"the policy {name!r} cannot be made: {type(exc).__name__}: {exc}") from exc
    if not isinstance(probe, Policy):
        raise SettingsError(f"the policy {name!r} needs the methods add, remove and pick (docs/policies.md)")

    def make() -> Policy:
        try:
            policy = GuardedPolicy(found(), name)
        except Exception:  # as above
            logger.exception("Policy %s cannot be made any more; connections go round robin", name)
            return RoundRobin()
        policy.resize(slots)
        return policy

    return make
