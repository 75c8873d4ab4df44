"""Events as data."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from clusterserve.core.address import Address
from clusterserve.core.events import EVENTS, Event, Exited, Messaged, StartedListening, Stopped, WorkerName, arguments

KINDS = typing.get_args(Event)


def test_every_event_can_be_listened_to() -> None:
    # Messages are opened first, by who has the conversation.
    assert list(EVENTS) == [kind.name for kind in KINDS if kind is not Messaged]
    assert len(EVENTS) == len(KINDS) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_frozen_and_says_which_worker_it_is_about_first(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    assert "worker" not in names[1:]
    event = kind(*names)
    for name in names:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, name, None)


def test_its_arguments() -> None:
    worker = WorkerName(3, 1, 4711)
    assert arguments(Exited(worker, None, 9)) == (worker, None, 9)
    assert arguments(StartedListening(worker, Address("/x"))) == (worker, Address("/x"))
    assert arguments(Stopped()) == ()
    assert EVENTS["exit"] == ("worker", "code", "signal")


def test_an_address_reads_as_a_url() -> None:
    assert str(Address("/run/x")) == "unix:/run/x"
    assert str(Address("127.0.0.1", 80, 4)) == "http://127.0.0.1:80"
    assert str(Address("::1", 80, 6)) == "http://[::1]:80"
    assert str(Address("::1", 443, 6, tls=True)) == "https://[::1]:443"
    assert str(Address("/run/x", tls=True)) == "unix:/run/x"
    assert str(Address("127.0.0.1", 53, "udp4")) == "udp://127.0.0.1:53"
    assert str(Address("::", 53, "udp6")) == "udp://[::]:53"
