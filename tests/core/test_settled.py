"""When a change is one."""

from __future__ import annotations

import pytest

from clusterserve.core.settled import Settled


@pytest.mark.parametrize(
    ("seen", "changes"),
    [
        ("aaaa", []),
        # At rest at the second look.
        ("abb", [2]),
        ("abbb", [2]),
        ("abcdd", [4]),
        # There and back again, without rest.
        ("abaa", []),
        ("abbaa", [2, 4]),
    ],
)
def test_a_change_is_told_once_it_has_come_to_rest(seen: str, changes: list[int]) -> None:
    settled = Settled("a")
    assert [number for number, each in enumerate(seen) if settled.look(each)] == changes


def test_what_is_known_is_no_change() -> None:
    settled = Settled("a")
    assert not settled.look("b")
    settled.heed("b")
    assert not settled.look("b")
    assert not settled.look("a")
    assert settled.look("a")
