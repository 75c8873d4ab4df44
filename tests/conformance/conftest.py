"""What the conformance tests share: the mark `races` (see races.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.helpers import Scene
from tests.conformance.races import turns


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "races(times): a race, run so many times (use tests.conformance.races.races)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("races")
    if mark is not None:
        # No argument of the test's own: it need not know which turn it is.
        metafunc.fixturenames.append("_turn")
        count = turns(mark)
        metafunc.parametrize("_turn", range(count), ids=[f"turn{number}of{count}" for number in range(1, count + 1)])


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Clusters of plain scripts (helpers.py)."""
    return Scene(tmp_path)
