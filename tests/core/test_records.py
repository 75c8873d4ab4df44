"""The connection channel's records: there and back, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core.records import (
    ANSWER_SIZE,
    IPV4,
    IPV6,
    MAX_MICROSECONDS,
    NO_ADDRESS,
    OFFER_SIZE,
    VERSION,
    Flag,
    Kind,
    pack_answer,
    pack_note,
    pack_offer,
    unpack_answers,
    unpack_offers,
    waited,
)
from clusterserve.errors import ProtocolError

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
ADDRESSES = st.tuples(st.sampled_from([IPV4, IPV6]), st.binary(min_size=16, max_size=16)) | st.just((NO_ADDRESS, b""))
OFFERS = st.lists(st.tuples(U64, U32, U32, ADDRESSES, U16), min_size=1, max_size=70)
ANSWERS = st.lists(st.tuples(U8, U64, U32), min_size=1, max_size=70)
QUICK = settings(deadline=None, max_examples=50)

AN_OFFER = pack_offer(1, 2, 3, NO_ADDRESS, b"", 0)
AN_ANSWER = pack_answer(Kind.ACK, 1)


@given(OFFERS)
@QUICK
def test_offers_come_back_as_they_were_packed_in_their_order(
    offers: list[tuple[int, int, int, tuple[int, bytes], int]],
) -> None:
    message = b"".join(
        pack_offer(id, listener, queued, family, client, port)
        for id, listener, queued, (family, client), port in offers
    )
    assert len(message) == len(offers) * OFFER_SIZE
    assert list(unpack_offers(message)) == [
        (VERSION, family, 0, listener, id, queued, port, 0, client or bytes(16), bytes(16), 0)
        for id, listener, queued, (family, client), port in offers
    ]


def test_an_offer_with_the_address_that_its_client_has_connected_to() -> None:
    (offer,) = unpack_offers(pack_offer(1, 2, 3, IPV4, bytes(16), 4, 5, b"\1" * 16, 443))
    assert offer == (VERSION, IPV4, 0, 2, 1, 3, 4, 443, bytes(16), b"\1" * 16, 5)


@given(ANSWERS)
@QUICK
def test_answers_come_back_as_they_were_packed_in_their_order(answers: list[tuple[int, int, int]]) -> None:
    message = b"".join(pack_answer(kind, id, held) for kind, id, held in answers)
    assert len(message) == len(answers) * ANSWER_SIZE
    assert list(unpack_answers(message)) == [(VERSION, kind, 0, held, 0, id) for kind, id, held in answers]


def test_the_sizes_on_the_wire() -> None:
    """Both ends run the same release, but a change here has to be a new `VERSION`."""
    assert (VERSION, OFFER_SIZE, ANSWER_SIZE) == (3, 60, 20)
    assert (NO_ADDRESS, IPV4, IPV6) == (0, 4, 6)
    assert bytes.fromhex("03010000 00000000 00000000 0100000000000000") == AN_ANSWER


@pytest.mark.parametrize("microseconds", [MAX_MICROSECONDS, MAX_MICROSECONDS + 1, 10**15])
def test_times_too_long_for_the_record_are_the_longest_it_can_carry(microseconds: int) -> None:
    """A worker that hung over night."""
    (answer,) = unpack_answers(pack_answer(Kind.ACK, 1, microseconds))
    assert answer[3] == MAX_MICROSECONDS


@pytest.mark.parametrize("now", [0.25, 1234.5, 4294.967295, 4294.967296, 1e9 / 3])
@pytest.mark.parametrize("seconds", [0.0, 0.000001, 0.0015, 30.0, 4000.0])
def test_how_long_an_offer_has_waited(now: float, seconds: float) -> None:
    """The clock has counted since the machine was started, and a record carries 71 minutes of it."""
    (offer,) = unpack_offers(pack_offer(1, 2, int((now - seconds) * 1e6), NO_ADDRESS, b"", 0))
    assert waited(offer[5], now) == pytest.approx(seconds, abs=2e-6)


def test_kinds_combine_and_are_one_bit_each() -> None:
    assert Kind.ACK | Kind.CLOSED == 3
    assert [kind.bit_count() for kind in Kind] == [1] * 8
    (answer,) = unpack_answers(pack_answer(Kind.ACK | Kind.RETURNED, 5))
    assert Kind(answer[1]) == Kind.ACK | Kind.RETURNED


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="empty"),
        pytest.param(AN_OFFER[:-1], id="truncated"),
        pytest.param(AN_OFFER + b"\1", id="trailing"),
        pytest.param(b"\1", id="one byte"),
        pytest.param(b"\1" + AN_OFFER[1:], id="another version"),
        pytest.param(b"\0" * OFFER_SIZE, id="zeroes"),
    ],
)
def test_what_is_no_list_of_offers_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"^a message of {len(message)} bytes on the connection channel is no list"):
        unpack_offers(message)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"", id="empty"),
        pytest.param(AN_ANSWER[:-1], id="truncated"),
        pytest.param(AN_ANSWER + b"\1", id="trailing"),
        pytest.param(b"\1", id="one byte"),
        pytest.param(b"\1" + AN_ANSWER[1:], id="another version"),
        pytest.param(b"\xff" * ANSWER_SIZE, id="noise"),
    ],
)
def test_what_is_no_list_of_answers_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"^a message of {len(message)} bytes on the connection channel is no list"):
        unpack_answers(message)


@given(st.binary(max_size=3 * OFFER_SIZE))
@QUICK
def test_noise_is_records_or_a_protocol_error(noise: bytes) -> None:
    for unpack, size in ((unpack_offers, OFFER_SIZE), (unpack_answers, ANSWER_SIZE)):
        try:
            records = list(unpack(noise))
        except ProtocolError:
            continue
        assert len(records) == len(noise) // size


@pytest.mark.parametrize("flag", Flag)
@given(id=U64)
@QUICK
def test_a_note_comes_as_an_offer_of_nothing(flag: Flag, id: int) -> None:
    message = AN_OFFER + pack_note(flag, id)
    first, note = unpack_offers(message)
    assert (first[2], first[4]) == (0, 1)
    assert (note[2], note[4]) == (flag, id)
