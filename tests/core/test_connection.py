"""A connection's states: every (state, event) pair, against design.md's picture and not the module's own table."""

from __future__ import annotations

import pytest

from clusterserve.core.connection import TRANSITIONS, Connection, Event, IllegalStep, State

ALLOWED = {
    (State.PARKED, Event.READABLE): State.QUEUED,
    (State.PARKED, Event.CLOSE): State.GONE,
    (State.QUEUED, Event.OFFER): State.OFFERED,
    (State.QUEUED, Event.CLOSE): State.GONE,
    (State.OFFERED, Event.ACK): State.BORROWED,
    (State.OFFERED, Event.BACK): State.QUEUED,
    (State.OFFERED, Event.RETURN): State.PARKED,
    (State.OFFERED, Event.CLOSE): State.GONE,
    (State.OFFERED, Event.TAKE): State.GONE,
    (State.OFFERED, Event.KEEP): State.KEPT,
    (State.BORROWED, Event.BACK): State.QUEUED,
    (State.BORROWED, Event.RETURN): State.PARKED,
    (State.BORROWED, Event.CLOSE): State.GONE,
    (State.BORROWED, Event.TAKE): State.GONE,
    (State.BORROWED, Event.KEEP): State.KEPT,
    (State.KEPT, Event.BACK): State.QUEUED,
    (State.KEPT, Event.RETURN): State.PARKED,
    (State.KEPT, Event.CLOSE): State.GONE,
    (State.KEPT, Event.TAKE): State.GONE,
}
PAIRS = [pytest.param(state, event, id=f"{state.name}-{event.name}") for state in State for event in Event]

# The shortest way into each state.
WAYS = {
    State.PARKED: (),
    State.QUEUED: (Event.READABLE,),
    State.OFFERED: (Event.READABLE, Event.OFFER),
    State.BORROWED: (Event.READABLE, Event.OFFER, Event.ACK),
    State.KEPT: (Event.READABLE, Event.OFFER, Event.KEEP),
    State.GONE: (Event.CLOSE,),
}


def connection_in(state: State) -> Connection:
    connection = Connection(7, 12, 3, client=bytes(15) + b"\1", port=4711, family=6, since=2.5)
    connection.worker = 9
    connection.ticket = 4
    for event in WAYS[state]:
        connection.step(event)
    return connection


def everything(connection: Connection) -> dict[str, object]:
    return {name: getattr(connection, name) for name in Connection.__slots__}


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_step_is_the_one_of_the_table_or_changes_nothing(state: State, event: Event) -> None:
    connection = connection_in(state)
    assert connection.state is state
    before = everything(connection)

    target = ALLOWED.get((state, event))
    if target is None:
        with pytest.raises(IllegalStep, match=rf"^connection 7 is {state.name}: it cannot {event.name}$"):
            connection.step(event)
        assert everything(connection) == before
    else:
        connection.step(event)
        assert everything(connection) == {**before, "state": target}


def test_the_published_table_is_the_one_that_is_used_and_cannot_be_changed() -> None:
    published = {(state, event): target for state, row in TRANSITIONS.items() for event, target in row.items()}
    assert published == ALLOWED
    with pytest.raises(TypeError):
        TRANSITIONS[State.GONE] = {}  # type: ignore[index]


def test_gone_is_the_end() -> None:
    assert TRANSITIONS[State.GONE] == {}


def test_a_new_connection_is_parked_and_nobody_has_it() -> None:
    connection = Connection(1, 5, 2)
    assert everything(connection) == {
        "id": 1, "fd": 5, "listener": 2, "client": b"", "port": 0, "family": 0, "since": 0.0,
        "state": State.PARKED, "ticket": 0, "worker": 0, "handle": -1, "relics": 0, "server": b"", "server_port": 0,
        "unknown": False,
    }  # fmt: skip


def test_the_repr_is_a_status_line() -> None:
    connection = Connection(41, 5, 2)
    assert repr(connection) == "<Connection 41 PARKED>"
    connection.step(Event.READABLE)
    connection.step(Event.OFFER)
    connection.worker = 3
    assert repr(connection) == "<Connection 41 OFFERED, worker 3>"
