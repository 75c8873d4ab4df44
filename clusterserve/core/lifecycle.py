"""A worker process's states and transitions, as a table.

    none -online-> online -listening-> listening -drain-> draining -disconnected-> disconnected -exited-> dead

Any of them may be cut short by `exited`: a process can die at every moment.  Only `step` answers what follows what; an
illegal event raises `IllegalStep` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Final

from .connection import IllegalStep


class WorkerState(Enum):
    #: Spawned; nothing heard of it yet.
    NONE = "none"
    #: Its message channel speaks; it is importing the application.
    ONLINE = "online"
    #: It listens on every address it was told to.
    LISTENING = "listening"
    #: Told to finish what it holds and leave.
    DRAINING = "draining"
    #: Its message channel is closed, its process not yet gone.
    DISCONNECTED = "disconnected"
    DEAD = "dead"


class WorkerEvent(Enum):
    ONLINE = "online"
    LISTENING = "listening"
    DRAIN = "drain"
    DISCONNECTED = "disconnected"
    EXITED = "exited"


_S, _E = WorkerState, WorkerEvent

TRANSITIONS: Final[Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]]] = MappingProxyType(
    {
        _S.NONE: {
            _E.ONLINE: _S.ONLINE,
            _E.DRAIN: _S.DRAINING,
            _E.DISCONNECTED: _S.DISCONNECTED,
            _E.EXITED: _S.DEAD,
        },
        _S.ONLINE: {
            _E.LISTENING: _S.LISTENING,
            _E.DRAIN: _S.DRAINING,
            _E.DISCONNECTED: _S.DISCONNECTED,
            _E.EXITED: _S.DEAD,
        },
        _S.LISTENING: {
            # A second server of the same worker.
            _E.LISTENING: _S.LISTENING,
            _E.DRAIN: _S.DRAINING,
            _E.DISCONNECTED: _S.DISCONNECTED,
            _E.EXITED: _S.DEAD,
        },
        _S.DRAINING: {
            # Told to go while it booted: what it had already sent arrives late and changes nothing.
            _E.ONLINE: _S.DRAINING,
            _E.LISTENING: _S.DRAINING,
            # From graceful to quick.
            _E.DRAIN: _S.DRAINING,
            _E.DISCONNECTED: _S.DISCONNECTED,
            _E.EXITED: _S.DEAD,
        },
        _S.DISCONNECTED: {_E.DRAIN: _S.DISCONNECTED, _E.EXITED: _S.DEAD},
        _S.DEAD: {},
    }
)


def step(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state after `event`; raises `IllegalStep` if it cannot happen in `state`."""
    target = TRANSITIONS[state].get(event)
    if target is None:
        raise IllegalStep(f"a worker that is {state.value} cannot go {event.value}")
    return target
