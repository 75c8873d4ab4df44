"""A response, however it is cut on its way."""

from __future__ import annotations

import pytest

from benchmarks.answer import Answer

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
NO_CHUNK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nconnection: Close\r\ncontent-length: 1\r\n\r\nx"
UNTIL_END = b"HTTP/1.0 200 OK\r\n\r\nhello"


@pytest.mark.parametrize(
    ("data", "status", "closes"),
    [
        (LENGTH, 200, False),
        (CHUNKED, 200, False),
        (NO_CHUNK, 200, False),
        (EMPTY, 204, False),
        (BAD_GATEWAY, 502, True),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_whole_with_its_last_byte(data: bytes, status: int, closes: bool, step: int) -> None:
    answer = Answer()
    for start in range(0, len(data), step):
        assert not answer.complete
        answer.feed(data[start : start + step])
    assert (answer.complete, answer.ended, answer.status, answer.closes) == (True, False, status, closes)


def test_a_body_that_the_end_ends() -> None:
    answer = Answer()
    answer.feed(UNTIL_END)
    assert not answer.complete
    answer.feed(b"")
    assert (answer.complete, answer.ended, answer.closes, answer.body) == (True, True, True, b"hello")


@pytest.mark.parametrize("cut", range(len(LENGTH)))
def test_an_end_too_early(cut: int) -> None:
    answer = Answer()
    answer.feed(LENGTH[:cut])
    answer.feed(b"")
    assert (answer.complete, answer.ended, answer.begun) == (False, True, cut > 0)
