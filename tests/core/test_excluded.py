"""Which requests `--access-log-exclude` leaves out."""

from __future__ import annotations

import pytest

from clusterserve.core.excluded import Excluded


@pytest.mark.parametrize(
    ("path", "status", "left_out"),
    [
        ("/health", 200, True),
        ("/health/live", 204, True),
        ("/healthy", 399, True),
        ("/health", 400, False),
        ("/health", 503, False),
        ("/", 200, False),
        ("/x/health", 200, False),
        ("/static/a/b.css", 200, True),
        ("/static/a/b.js", 200, False),
        ("/favicon.ico", 200, True),
        ("/favicon-ico", 200, False),
    ],
)
def test_by_path_and_status(path: str, status: int, left_out: bool) -> None:
    assert Excluded(["/health*", "/static/*.css", "/favicon.ico"])(path, status) is left_out


def test_targets_as_they_stand_in_a_line() -> None:
    excluded = Excluded(["/a b*"])
    assert excluded.of_target("/a%20b?c=d", 200)
    assert not excluded.of_target("/x?/a%20b", 200)


def test_without_patterns_nothing_is_left_out() -> None:
    assert not Excluded([])("/", 200)
    assert not Excluded([])("", 200)
