"""The memory that a worker and its master share."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from clusterserve.channel.board import IDLE, RESPONDING, UNKNOWN, UNTOUCHED, Board


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    yield board
    board.close()


def test_what_one_end_writes_the_other_reads(board: Board) -> None:
    theirs = Board(os.dup(board.fd))
    theirs.marks[7] = RESPONDING
    theirs.counters[0] = 2**32 - 1
    theirs.counters[1] = 3
    assert board.mark(7) == RESPONDING
    assert list(board.counters[:2]) == [2**32 - 1, 3]
    board.marks[7] = IDLE
    assert theirs.mark(7) == IDLE
    theirs.close()


def test_a_new_one_says_nothing(board: Board) -> None:
    assert list(board.counters[:2]) == [0, 0]
    assert {board.mark(place) for place in range(100)} == {UNTOUCHED}


def test_every_descriptor_of_this_process_has_a_place(board: Board) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert board.places == min(hard, 1 << 20) if hard != resource.RLIM_INFINITY else 1 << 20


def test_who_has_no_place_shares_one_of_which_nothing_is_known(board: Board) -> None:
    board.marks[board.places] = IDLE
    assert board.mark(board.places) == UNKNOWN
    assert board.mark(board.places + 1000) == UNKNOWN


def test_it_takes_no_memory_that_is_not_used(board: Board) -> None:
    board.marks[board.places] = IDLE
    assert os.fstat(board.fd).st_blocks * 512 <= 2 * resource.getpagesize()


def test_closing_it_closes_its_descriptor() -> None:
    board = Board.create()
    fd = board.fd
    board.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
