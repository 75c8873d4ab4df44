"""What two masters say to each other: there and back, from other versions, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.handover import (
    MAX_MESSAGE,
    MAX_RIDERS,
    PROTOCOL,
    Estate,
    HandedConnection,
    HeldListener,
    Hello,
    Left,
    Message,
    Passed,
    Ready,
    Succeeded,
    Waits,
    Yielded,
    decode,
    encode,
)
from clusterserve.errors import ProtocolError

INTS = st.integers(-(2**63), 2**63)
TEXTS = st.text(max_size=30)
SECONDS = st.floats(0, 1e6)
FILES = st.none() | st.tuples(TEXTS, INTS, INTS)
LISTENERS = st.builds(HeldListener, INTS, TEXTS, st.booleans(), st.booleans(), st.booleans(), FILES)
CONNECTIONS = st.builds(
    HandedConnection, INTS, st.sampled_from(Waits), SECONDS, st.binary(max_size=16), INTS, st.integers(0, 10)
)
KEYS = st.lists(INTS, max_size=4).map(tuple)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Estate, st.lists(LISTENERS, max_size=4).map(tuple), TEXTS, st.booleans()),
    st.builds(Hello, SECONDS),
    st.builds(Ready, KEYS, KEYS, KEYS),
    st.builds(Yielded, SECONDS),
    st.builds(Passed, st.lists(CONNECTIONS, max_size=4).map(tuple)),
    st.just(Left()),
    st.builds(Succeeded, INTS),
)


@given(MESSAGES)
def test_there_and_back(message: Message) -> None:
    assert decode(encode(message)) == message


def test_as_many_connections_as_ride_together_fit() -> None:
    one = HandedConnection(2**31, Waits.REQUEST, 123456.789012, b"\xff" * 16, 65535, 10)
    assert len(encode(Passed((one,) * MAX_RIDERS))) < MAX_MESSAGE
    held = HeldListener(2**31, "unix:/" + "x" * 300, True, False, True, ("/" + "y" * 300, 2**63, 2**63))
    assert len(encode(Estate((held,) * MAX_RIDERS, "z" * 4096))) < MAX_MESSAGE
    with pytest.raises(ProtocolError, match="over the limit"):
        encode(Estate((), "x" * MAX_MESSAGE))


def test_another_version_may_say_more_or_less() -> None:
    more = {"message": "Yielded", "protocol": PROTOCOL, "grace": 3, "colour": "blue"}
    assert decode(json.dumps(more).encode()) == Yielded(3.0)
    less = {"message": "Estate", "protocol": PROTOCOL, "listeners": [{"key": 1, "bind": "127.0.0.1:80", "new": []}]}
    assert decode(json.dumps(less).encode()) == Estate((HeldListener(1, "127.0.0.1:80"),))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"protocol": PROTOCOL + 1}, f"it speaks protocol {PROTOCOL + 1}, and this version {PROTOCOL}"),
        ({"protocol": None}, "it speaks protocol None"),
        ({"message": "Yield"}, "the message 'Yield' is not known"),
        ({"message": ["Yielded"]}, "is not known"),
        ({"message": "Succeeded"}, "a Succeeded without its pid"),
        ({"message": "Succeeded", "pid": "1"}, "a Succeeded with '1' for its pid"),
        ({"message": "Succeeded", "pid": True}, "a Succeeded with True for its pid"),
        ({"message": "Hello", "patience": "long"}, "a Hello with 'long' for its patience"),
        ({"message": "Ready", "taken": 3}, "a Ready with 3 for its taken"),
        ({"message": "Ready", "taken": [[]]}, "for its taken"),
        ({"message": "Passed", "connections": [1]}, "a HandedConnection is an object, not 1"),
        ({"message": "Passed", "connections": [{"listener": 1, "waits": "long", "since": 1}]}, "for its waits"),
        (
            {"message": "Passed", "connections": [{"listener": 1, "waits": "word", "since": 1, "client": "xy"}]},
            "'xy' for its client",
        ),
        ({"message": "Estate", "listeners": [{"key": 1, "bind": "x", "file": ["y", 1]}]}, "for its file"),
        ({"message": "Estate", "listeners": [{"key": 1, "bind": "x", "file": 7}]}, "for its file"),
    ],
)
def test_what_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(json.dumps({"protocol": PROTOCOL, "message": "Yielded", **values}).encode())
    assert reason in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 10_000, b"[]", b"3"])
def test_what_is_no_message_at_all(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)
