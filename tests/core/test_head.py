"""How large a head may be: the same is said of it parsed, unfinished, and raw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.head import LONG_FIELD, LONG_LINE, MANY_FIELDS, NO_LIMITS, HeadLimits

LIMITS = HeadLimits(line=20, fields=3, field_size=16)
LINE = b"GET /3456789 HTTP/1."  # 20

parts = st.binary(min_size=1, max_size=24).map(lambda data: bytes(97 + byte % 26 for byte in data))


@pytest.mark.parametrize(
    ("line", "fields", "excess"),
    [
        (20, [], None),
        (21, [], LONG_LINE),
        (20, [(b"a", b"b")] * 3, None),
        (20, [(b"a", b"b")] * 4, MANY_FIELDS),
        # "name: valueee\r\n"
        (20, [(b"name", b"valueeee")], None),
        (20, [(b"a", b"b"), (b"name", b"valueeeee")], LONG_FIELD),
        (21, [(b"name", b"valueeeee")] * 4, LONG_LINE),
    ],
)
def test_what_is_too_large(line: int, fields: list[tuple[bytes, bytes]], excess: object) -> None:
    assert LIMITS.excess(line, fields) is excess
    assert NO_LIMITS.excess(line, fields) is None


def test_the_answers_are_whole() -> None:
    for excess, status in ((LONG_LINE, b"414 URI Too Long"), (MANY_FIELDS, b"431 "), (LONG_FIELD, b"431 ")):
        head, _, body = excess.answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        assert f"content-length: {len(body)}".encode() in head.split(b"\r\n")
        assert b"connection: close" in head.split(b"\r\n")


@given(target=parts, fields=st.lists(st.tuples(parts, parts), max_size=5))
def test_raw_and_parsed_agree(target: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    line = b"GET /" + target
    raw = b"\r\n".join([line, *(name + b": " + value for name, value in fields), b""])
    assert LIMITS.excess_of_raw(raw) is LIMITS.excess(len(line), fields)


@given(target=parts, fields=st.lists(st.tuples(parts, parts), max_size=5), data=st.data())
def test_what_was_too_large_stays_so_and_is_seen_as_it_comes(
    target: bytes, fields: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    """No more is ever buffered than what the limits allow, and a byte."""
    raw = b"\r\n".join([b"GET /" + target, *(name + b": " + value for name, value in fields), b""])
    end = data.draw(st.integers(0, len(raw)))
    if LIMITS.excess_of_raw(raw[:end]) is not None:
        assert LIMITS.excess_of_raw(raw) is not None
    elif LIMITS.excess_of_raw(raw) is None:
        assert end <= len(raw) <= 20 + 2 + 3 * 16


@pytest.mark.parametrize(
    ("line", "fields", "last", "excess"),
    [(20, 3, 16, None), (21, 0, 0, LONG_LINE), (20, 4, 0, MANY_FIELDS), (20, 0, 17, LONG_FIELD)],
)
def test_an_unfinished_one(line: int, fields: int, last: int, excess: object) -> None:
    assert LIMITS.excess_so_far(line, fields, last) is excess
    assert NO_LIMITS.excess_so_far(line, fields, last) is None


def test_so_few_bytes_are_harmless() -> None:
    assert (LIMITS.harmless, LIMITS.most_fields) == (16, 3)
    assert NO_LIMITS.harmless > 1 << 40
    assert HeadLimits(line=5).harmless == 5
