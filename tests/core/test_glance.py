"""What is seen of a request that nobody has read; what is no request is not made one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.core.glance import glance

WHOLE = b"POST /a%20b?c=d&e HTTP/1.1\r\nHost: x\r\nX-Request-ID:  an-id \r\nnonsense\r\n\r\nbody: no field\r\n"


def test_a_whole_head() -> None:
    assert glance(WHOLE) == {
        "type": "http",
        "method": "POST",
        "path": "/a b",
        "query_string": b"c=d&e",
        "http_version": "1.1",
        "headers": [(b"host", b"x"), (b"x-request-id", b"an-id")],
    }


@given(end=st.integers(0, len(WHOLE)))
def test_what_has_come_so_far(end: int) -> None:
    seen, whole = glance(WHOLE[:end]), glance(WHOLE)
    assert seen["method"] == ("POST" if end > WHOLE.index(b"\n") else "")
    # No field that may go on.
    assert seen["headers"] == whole["headers"][: len(seen["headers"])]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1",
        b"GET /\r\n",
        b"GET  / HTTP/1.1\r\n",
        b"GET /\x1b[31m HTTP/1.1\r\n",
        b'G"T / HTTP/1.1\r\n',
        b"GET /a b HTTP/1.1\r\n",
        b"\x16\x03\x01\x00\xa5\r\n\r\n",
        b"GET /caf\xe9 HTTP/1.1\r\n",
    ],
)
def test_what_is_no_request(data: bytes) -> None:
    assert glance(data) == {"type": "http", "method": "", "path": "", "query_string": b"", "headers": []}


@given(st.binary(max_size=200))
def test_whatever_comes_stays_in_its_line(data: bytes) -> None:
    seen = glance(data + b" HTTP/1.1\r\n")
    assert seen["method"].isprintable()
    assert seen["query_string"].decode("latin-1").isprintable()
