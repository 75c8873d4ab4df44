"""The program's messages, pure: sealed, cut into frames, put together again, and replies matched to requests."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core import envelope as module
from clusterserve.core.envelope import CHUNK, Assembler, Envelope, Kind, Requests, cut, declined, seal, unseal
from clusterserve.core.messages import HEADER_SIZE, MAX_USER_FRAME, Decoder, Online, encode
from clusterserve.errors import ProtocolError

QUICK = settings(max_examples=100, deadline=None)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ENVELOPES = st.builds(
    Envelope,
    kind=st.sampled_from(Kind),
    number=st.integers(0, 2**64 - 1),
    pickled=st.booleans(),
    body=st.integers(0, 3).flatmap(lambda size: st.binary(min_size=size, max_size=40))
    | st.just(b"x" * (2 * CHUNK + 1)),
)


def assembled(frames: list[tuple[int, bytes, int]]) -> list[Envelope]:
    assembler = Assembler()
    return [whole for kind, body, _ in frames if (whole := assembler.add(kind, body)) is not None]


def read(stream: bytes, step: int) -> list[tuple[int, bytes, int]]:
    decoder = Decoder()
    return [frame for start in range(0, len(stream), step) for frame in decoder.frames(stream[start : start + step])]


class TestSealing:
    @given(JSON)
    @QUICK
    def test_json_there_and_back(self, content: Any) -> None:
        assert unseal(seal(Kind.SEND, 0, content, False), False) == content

    def test_what_refers_to_itself_is_pickled(self) -> None:
        ring: list[Any] = [1]
        ring.append(ring)
        there = unseal(seal(Kind.SEND, 0, ring, True), True)
        assert there[0] == 1
        assert there[1] is there
        with pytest.raises(ValueError, match="Circular"):
            seal(Kind.SEND, 0, ring, False)

    @pytest.mark.parametrize("content", [object(), {1: object()}, b"bytes", {1, 2}])
    def test_what_is_no_json_is_the_senders_mistake(self, content: Any) -> None:
        with pytest.raises(TypeError):
            seal(Kind.SEND, 0, content, False)

    def test_what_is_too_long_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_USER_BODY", 100)
        assert len(seal(Kind.SEND, 0, "x" * 98, False).body) == 100
        with pytest.raises(ValueError, match=r"^a message of 101 bytes is over the limit of 100$"):
            seal(Kind.SEND, 0, "x" * 99, False)

    @pytest.mark.parametrize("pickled", [False, True])
    def test_only_what_was_agreed_upon_is_opened(self, pickled: bool) -> None:
        sealed = seal(Kind.SEND, 0, [1], pickled)
        with pytest.raises(ProtocolError, match="was agreed upon"):
            unseal(sealed, not pickled)

    @given(st.binary(max_size=50))
    @QUICK
    def test_noise_is_json_or_a_protocol_error(self, noise: bytes) -> None:
        try:
            unseal(Envelope(Kind.SEND, 0, False, noise), False)
        except ProtocolError as exc:
            assert str(exc) == f"a message of {len(noise)} bytes is not JSON"  # noqa: PT017 - noise may be JSON


class TestFrames:
    @given(st.lists(ENVELOPES, max_size=4), st.sampled_from([1, 7, 4096, 1 << 20]))
    @settings(max_examples=25, deadline=None)
    def test_there_and_back_however_it_is_read(self, envelopes: list[Envelope], step: int) -> None:
        stream = b"".join(frame for each in envelopes for frame in cut(each))
        assert assembled(read(stream, max(step, len(stream) // 2000))) == envelopes

    @pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
    def test_no_frame_is_longer_than_it_may_be(self, size: int) -> None:
        frames = list(cut(Envelope(Kind.SEND, 7, False, b"x" * size)))
        assert len(frames) == max(1, -(-size // CHUNK))
        assert all(len(frame) <= HEADER_SIZE + MAX_USER_FRAME for frame in frames)

    def test_descriptors_ride_with_the_first(self) -> None:
        frames = read(b"".join(cut(Envelope(Kind.SEND, 0, False, b"x" * (3 * CHUNK)), 5)), 1 << 20)
        assert [descriptors for _, _, descriptors in frames] == [5, 0, 0]

    def test_ours_may_be_between_two_of_them(self) -> None:
        first, second = cut(Envelope(Kind.SEND, 0, False, b"x" * (CHUNK + 1)))
        frames = read(first + encode(Online(1)) + second, 999)
        assert [kind == 0 for kind, _, _ in frames] == [False, True, False]
        (whole,) = assembled([frame for frame in frames if frame[0]])
        assert len(whole.body) == CHUNK + 1

    def test_a_frame_that_is_too_long_is_known_by_its_header(self) -> None:
        frame = next(cut(Envelope(Kind.SEND, 0, False, b"x" * CHUNK)))
        header = (MAX_USER_FRAME + 1).to_bytes(4, "little") + frame[4:HEADER_SIZE]
        with pytest.raises(ProtocolError, match="cannot be"):
            list(Decoder().frames(header))

    def test_a_message_that_never_ends_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_USER_BODY", 3 * CHUNK)
        assembler = Assembler()
        pieces = read(b"".join(cut(Envelope(Kind.SEND, 0, False, b"x" * 5 * CHUNK))), 1 << 20)
        for kind, body, _ in pieces[:3]:
            assert assembler.add(kind, body) is None
        with pytest.raises(ProtocolError, match="a message of more than"):
            assembler.add(*pieces[3][:2])

    @given(st.lists(st.tuples(st.integers(1, 255), st.binary(max_size=20)), max_size=8))
    @QUICK
    def test_noise_is_messages_or_a_protocol_error(self, frames: list[tuple[int, bytes]]) -> None:
        assembler = Assembler()
        size = 0
        try:
            for kind, body in frames:
                whole = assembler.add(kind, body)
                size += len(whole.body) if whole else 0
        except ProtocolError:
            return
        assert size <= sum(len(body) for _, body in frames)

    @pytest.mark.parametrize("kind", [0x05, 0x0F, 0x20, 0x41, 0xC1, 0x31])
    def test_a_kind_that_cannot_be_first(self, kind: int) -> None:
        with pytest.raises(ProtocolError, match="cannot be"):
            Assembler().add(kind, b"x" * 20)

    @pytest.mark.parametrize("kind", [0x01, 0x81, 0x42, 0x51])
    def test_a_kind_that_cannot_be_next(self, kind: int) -> None:
        assembler = Assembler()
        assembler.add(0x81, b"x" * 20)
        with pytest.raises(ProtocolError, match="in the midst"):
            assembler.add(kind, b"x" * 20)


class TestRequests:
    @given(st.lists(st.sampled_from(["ask", "answer", "give up"]), max_size=30), st.randoms(use_true_random=False))
    @QUICK
    def test_every_asker_hears_once_at_most(self, steps: list[str], random: Any) -> None:
        requests: Requests[int] = Requests()
        asked: list[int] = []
        heard: list[int] = []
        for step in steps:
            if step == "ask":
                number = requests.open(len(asked))
                assert number not in asked
                asked.append(number)
            elif asked:
                number = random.choice(asked)
                asker = requests.answered(number) if step == "answer" else requests.give_up(number)
                if asker is not None:
                    assert asked[asker] == number
                    heard.append(number)
        heard += [asked[asker] for asker in requests.give_up_all()]
        assert sorted(heard) == sorted(asked)
        assert len(requests) == 0

    @pytest.mark.parametrize("number", [0, 3, 2**64 - 1])
    def test_an_answer_to_what_nobody_asked(self, number: int) -> None:
        requests: Requests[str] = Requests()
        requests.open("a")
        requests.open("b")
        with pytest.raises(ProtocolError, match=f"^an answer to request {number}, which was never sent$"):
            requests.answered(number)

    @given(st.integers(1, 2**64 - 1), st.booleans(), JSON)
    @QUICK
    def test_where_no_program_is_a_request_is_answered_all_the_same(
        self, number: int, pickled: bool, content: Any
    ) -> None:
        answer = declined(seal(Kind.REQUEST, number, content, pickled))
        assert (answer.kind, answer.number, answer.pickled) == (Kind.FAILURE, number, pickled)
        assert unseal(answer, pickled).startswith("nobody answers requests there")

    def test_an_answer_that_comes_too_late_is_none(self) -> None:
        requests: Requests[str] = Requests()
        number = requests.open("a")
        assert requests.give_up(number) == "a"
        assert requests.give_up(number) is None
        assert requests.answered(number) is None


def test_the_number_survives() -> None:
    sealed = seal(Kind.FAILURE, 2**40, "no", True)
    (whole,) = assembled(read(b"".join(cut(sealed)), 3))
    assert (whole.kind, whole.number, pickle.loads(whole.body)) == (Kind.FAILURE, 2**40, "no")


def test_an_assembler_is_between_messages_until_a_part_has_come() -> None:
    envelope = Envelope(Kind.SEND, 0, False, b"x" * (CHUNK + 1))
    assert envelope.size == CHUNK + 1
    assembler = Assembler()
    seen = []
    for kind, body, _ in read(b"".join(cut(envelope)), 1 << 20):
        seen.append(assembler.between)
        assembler.add(kind, body)
    assert (*seen, assembler.between) == (True, False, True)
