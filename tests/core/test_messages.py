"""The message channel's frames: there and back, cut anywhere, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core import messages
from clusterserve.core.messages import (
    HEADER_SIZE,
    MAX_BODY,
    Beat,
    Boot,
    Born,
    Closed,
    Debug,
    Debugged,
    Decoder,
    Drain,
    Failed,
    Fork,
    Leave,
    Listen,
    Listened,
    Listening,
    Message,
    Online,
    Prepare,
    Prepared,
    Renew,
    Reopen,
    Reopened,
    ShowStacks,
    Stacks,
    Stopping,
    Unborn,
    decode,
    encode,
)
from clusterserve.errors import ProtocolError

QUICK = settings(deadline=None, max_examples=60)

INTS = st.integers(-(2**63), 2**64)
SECONDS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | INTS | SECONDS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=4)
SOCKNAMES = st.lists(TEXTS | INTS, max_size=4) | TEXTS

MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Boot, INTS, INTS, OBJECTS, st.lists(TEXTS, max_size=4), OBJECTS),
    st.builds(Online, INTS),
    st.builds(Listen, INTS, TEXTS, INTS, st.booleans(), st.booleans(), v6only=st.booleans(), data=TEXTS),
    st.builds(Listened, INTS, INTS, INTS, TEXTS, INTS, SOCKNAMES, st.booleans()),
    st.builds(Listening, INTS),
    st.builds(Closed, INTS),
    st.builds(Failed, TEXTS, TEXTS),
    st.builds(Beat, INTS, st.booleans()),
    st.just(Leave()),
    st.builds(Debug, TEXTS | INTS),
    st.builds(Debugged, TEXTS, TEXTS, TEXTS),
    st.just(ShowStacks()),
    st.builds(Stacks, OBJECTS, TEXTS),
    st.builds(Renew, OBJECTS),
    st.builds(Drain, SECONDS, st.booleans()),
    st.builds(Prepare, INTS, INTS, OBJECTS, st.lists(TEXTS), TEXTS),
    st.just(Prepared()),
    st.builds(Fork, INTS, INTS, OBJECTS, st.lists(INTS)),
    st.builds(Born, INTS, INTS),
    st.builds(Unborn, INTS, INTS),
    st.just(Stopping()),
)
FRAMES = st.lists(st.tuples(MESSAGES, st.integers(0, 255)), max_size=5)

EXAMPLES: list[Message] = [
    Boot(1, 0, {"app": "module:app"}, ["", "/srv"], {"exec": "", "args": []}),
    Online(4711),
    Listen(1, "127.0.0.1:0", 2048, True, False),
    Listened(1, 3, 0, "", 2, ["127.0.0.1", 8000], False),
    Listening(3),
    Closed(3),
    Failed("ImportError: no module named 'app'", "Traceback …"),
    Beat(150),
    Leave(),
    Debug("127.0.0.1:5678"),
    Debugged("127.0.0.1:5678", "", ""),
    ShowStacks(),
    Reopen(2),
    Reopened(2, ""),
    Stacks({"00007f0a000b9b80": "MainThread"}, "Task-1\n  File"),
    Renew({"chain": "-----BEGIN …", "key": "", "trusted": ""}),
    Drain(30.0, False, True),
    Prepare(1, 1, {"app": "module:app"}, ["", "/srv"]),
    Prepared(),
    Fork(1, 0, {"NAME": "value"}, [1, 2]),
    Born(1, 4711),
    Unborn(1, 11),
    Stopping(),
]


def frames(chunks: Iterable[bytes]) -> list[tuple[bytes, int]]:
    decoder = Decoder()
    return [frame for chunk in chunks for frame in decoder.feed(chunk)]


def body_of(message: Message) -> bytes:
    return encode(message)[HEADER_SIZE:]


class TestRoundTrips:
    @given(MESSAGES)
    @QUICK
    def test_a_message_comes_back_equal(self, message: Message) -> None:
        assert decode(body_of(message)) == message

    @pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
    def test_every_kind_comes_back_as_itself(self, message: Message) -> None:
        again = decode(body_of(message))
        assert again == message
        assert type(again) is type(message)

    def test_no_kind_is_missing_here(self) -> None:
        kinds = {kind for kind in vars(messages).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
        assert {type(message) for message in EXAMPLES} == kinds

    @pytest.mark.parametrize("message", [message for message in EXAMPLES if dataclasses.fields(message)])
    def test_what_was_said_cannot_be_changed(self, message: Message) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, dataclasses.fields(message)[0].name, 0)

    def test_a_whole_number_of_seconds_is_a_number_of_seconds(self) -> None:
        assert decode(b'["Drain",30,false,true]') == Drain(30, False, True)


class TestTheDecoder:
    @given(FRAMES, st.binary(max_size=HEADER_SIZE - 1), st.data())
    @QUICK
    def test_however_the_stream_is_cut_the_frames_are_the_same(
        self, wanted: list[tuple[Message, int]], trailing: bytes, data: st.DataObject
    ) -> None:
        stream = b"".join(encode(message, descriptors) for message, descriptors in wanted)
        bodies = [(body_of(message), descriptors) for message, descriptors in wanted]

        assert frames([stream]) == bodies
        assert frames(bytes([byte]) for byte in stream) == bodies
        assert frames([stream + trailing]) == bodies

        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
        assert frames(stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)) == bodies

    def test_a_frame_that_is_not_complete_is_kept(self) -> None:
        decoder = Decoder()
        frame = encode(Online(1), 2)
        assert list(decoder.feed(frame + frame[:-1])) == [(body_of(Online(1)), 2)]
        assert list(decoder.feed(b"")) == []
        assert list(decoder.feed(frame[-1:])) == [(body_of(Online(1)), 2)]

    def test_who_stops_reading_in_the_middle_finds_the_rest_later(self) -> None:
        decoder = Decoder()
        first = next(decoder.feed(encode(Online(1)) + encode(Online(2))))
        assert decode(first[0]) == Online(1)
        assert [decode(body) for body, _ in decoder.feed(b"")] == [Online(2)]

    def test_an_empty_body_is_a_frame_though_no_message(self) -> None:
        assert frames([pack("<IBB", 0, 0, 3)]) == [(b"", 3)]
        with pytest.raises(ProtocolError):
            decode(b"")

    def test_the_longest_body_passes(self) -> None:
        body = b" " * MAX_BODY
        assert frames([pack("<IBB", MAX_BODY, 0, 0) + body]) == [(body, 0)]

    @pytest.mark.parametrize(
        "header",
        [
            pytest.param(pack("<IBB", MAX_BODY + 1, 0, 0), id="too long"),
            pytest.param(pack("<IBB", 2**32 - 1, 0, 0), id="as long as it can say"),
            pytest.param(pack("<IBB", 3, 1, 0), id="another kind"),
            pytest.param(b"GET / ", id="not ours"),
        ],
    )
    def test_a_header_that_cannot_be_ends_the_stream(self, header: bytes) -> None:
        decoder = Decoder()
        stream = decoder.feed(encode(Online(1)) + header)
        # What came before it still counts.
        assert next(stream) == (body_of(Online(1)), 0)
        with pytest.raises(ProtocolError, match=r"^a frame of kind \d+ and \d+ bytes cannot be$"):
            next(stream)
        # Nothing after it does.
        with pytest.raises(ProtocolError):
            list(decoder.feed(encode(Online(2))))

    @given(st.lists(st.binary(max_size=40), max_size=6))
    @QUICK
    def test_noise_is_frames_or_a_protocol_error(self, noise: list[bytes]) -> None:
        try:
            got = frames(noise)
        except ProtocolError:
            return
        assert sum(HEADER_SIZE + len(body) for body, _ in got) <= sum(map(len, noise))


class TestBounds:
    def test_a_message_that_is_too_long_is_not_sent(self) -> None:
        with pytest.raises(ProtocolError, match=r"^a Failed message of \d+ bytes is over the limit of 1048576$"):
            encode(Failed("too long", "x" * MAX_BODY))

    def test_the_longest_that_may_be_sent_arrives(self) -> None:
        overhead = len(body_of(Failed("", "")))
        message = Failed("", "x" * (MAX_BODY - overhead))
        ((body, _),) = frames([encode(message)])
        assert len(body) == MAX_BODY
        assert decode(body) == message


# For each annotation of a field: JSON values that are none of its type.  `true` must not pass for 1.
WRONG: dict[str, list[Any]] = {
    "int": [True, False, 1.5, "1", None, [], {}],
    "float": [True, "1.0", None, [1.0], {}],
    "str": [1, True, None, ["x"], {}],
    "bool": [0, 1, "true", None, []],
    "dict[str, Any]": [[], None, "{}", 1, True],
    "list[str]": ["x", None, {}, 1, True, [1], ["x", None], [["x"]]],
    "list[int]": ["x", None, {}, 1, True, ["x"], [1, None], [True], [[1]]],
    "list[Any] | str": [None, 1, True, {}],
    "str | int": [None, True, 1.5, [], {}],
}
BAD_FIELDS = [
    pytest.param(message, number, value, id=f"{type(message).__name__}.{field.name}={value!r}")
    for message in EXAMPLES
    for number, field in enumerate(dataclasses.fields(message))
    for value in WRONG[str(field.type)]
]


class TestHostileBodies:
    @pytest.mark.parametrize(("message", "number", "value"), BAD_FIELDS)
    def test_a_field_of_the_wrong_type(self, message: Message, number: int, value: object) -> None:
        values = json.loads(body_of(message))
        values[number + 1] = value
        with pytest.raises(ProtocolError, match=f"^a {values[0]} message with .* for its "):
            decode(json.dumps(values).encode())

    @pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
    def test_a_field_too_many(self, message: Message) -> None:
        with pytest.raises(ProtocolError, match=rf"^a {type(message).__name__} message with \d+ fields instead of "):
            decode(body_of(message)[:-1] + b",0]")

    @pytest.mark.parametrize("kind", [type(message) for message in EXAMPLES if dataclasses.fields(message)])
    def test_no_fields_where_there_should_be_some(self, kind: type) -> None:
        wanted = len(dataclasses.fields(kind))
        with pytest.raises(ProtocolError, match=f"^a {kind.__name__} message with 0 fields instead of {wanted}$"):
            decode(json.dumps([kind.__name__]).encode())

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"{", id="half"),
            pytest.param(b'["Online",1]x', id="trailing"),
            pytest.param(b"\xff\xfe\xfd", id="no text"),
            pytest.param(b"[" * 100_000, id="deep"),
            pytest.param(b'["Online",' + b"1" * 10_000 + b"]", id="a number too long to read"),
        ],
    )
    def test_what_is_not_json(self, body: bytes) -> None:
        with pytest.raises(ProtocolError, match=f"^a frame of {len(body)} bytes is not JSON$"):
            decode(body)

    @pytest.mark.parametrize("body", [b"null", b"1", b'"Online"', b"{}", b"[]", b"[1]", b"[null]", b'[["Online"],1]'])
    def test_what_is_no_message(self, body: bytes) -> None:
        with pytest.raises(ProtocolError, match=r"^a frame is not a message$"):
            decode(body)

    @pytest.mark.parametrize("name", ["", "online", "Message", "Decoder", "__class__"])
    def test_an_unknown_message(self, name: str) -> None:
        with pytest.raises(ProtocolError, match=f"^unknown message '{name}'$"):
            decode(json.dumps([name, 1]).encode())

    @pytest.mark.parametrize(
        "body", [json.dumps(["x" * 100_000]).encode(), json.dumps(["Online", "x" * 100_000]).encode()]
    )
    def test_what_a_worker_sent_does_not_fill_the_log(self, body: bytes) -> None:
        with pytest.raises(ProtocolError) as caught:
            decode(body)
        assert len(str(caught.value)) < 200

    @given(st.binary(max_size=60) | st.lists(JSON).map(lambda values: json.dumps(values).encode()))
    @QUICK
    def test_noise_is_a_message_or_a_protocol_error(self, body: bytes) -> None:
        try:
            message = decode(body)
        except ProtocolError:
            return
        assert isinstance(message, Message)

    @given(st.sampled_from([type(message).__name__ for message in EXAMPLES]), st.lists(JSON, max_size=7))
    @QUICK
    def test_random_fields_are_a_message_or_a_protocol_error(self, name: str, values: list[Any]) -> None:
        try:
            message = decode(json.dumps([name, *values]).encode())
        except ProtocolError:
            return
        assert [type(message).__name__, *dataclasses.astuple(message)] == [name, *values]
