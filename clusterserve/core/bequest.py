"""From one distributor to another's: the connections that no worker has."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from .connection import Connection, Event
from .distributor import Distributor
from .handover import Waits


class Bequest(NamedTuple):
    """A connection that was the distributor's, what it waits for, and for how long it has (seconds)."""

    connection: Connection
    waits: Waits
    since: float


def bequeath(distributor: Distributor, listeners: Container[int], now: float) -> list[Bequest]:
    """Take out everything of these listeners that is queued or parked: what is queued first, and the longest first."""
    queued: list[Connection] = []
    for key, handle in distributor.handles.items():
        for lane in handle.lanes.values() if key in listeners else ():
            queued += lane
            lane.clear()
    distributor.queued -= len(queued)
    queued.sort(key=lambda connection: connection.ticket)
    found = [Bequest(connection, Waits.WORKER, max(0.0, now - connection.since)) for connection in queued]
    parking, parked = distributor.parking, []
    for connection in tuple(parking.connections.values()):
        if connection.listener in listeners:
            idle, since = parking.since(connection.id, now)
            parked.append(Bequest(parking.leave(connection.id), Waits.REQUEST if idle else Waits.WORD, since))
    parked.sort(key=lambda bequest: -bequest.since)
    found += parked
    for connection, _, _ in found:
        connection.step(Event.CLOSE)
    return found


def inherit(distributor: Distributor, connection: Connection, waits: Waits, since: float, now: float) -> None:
    """A connection of another master's, new here; one that waits for its client is parked."""
    connection.since = now - since
    if waits is Waits.REQUEST:
        distributor.parking.inherited(connection, now - since)
    else:
        distributor.accepted(connection, waiting=waits is Waits.WORKER)
