"""`@races()`: this test is a race, and one run proves little.

It runs so many times in a row in an ordinary run (CI's too), and as often as CLUSTERSERVE_TEST_RACES says in
`tox -e stress`, which selects these tests by their mark.
"""

from __future__ import annotations

import os
from typing import Final

import pytest

VARIABLE: Final = "CLUSTERSERVE_TEST_RACES"


def races(times: int = 2) -> pytest.MarkDecorator:
    """The mark; conftest.py repeats what carries it.  Also for a class or, as `pytestmark`, a whole module."""
    return pytest.mark.races(times)


def turns(mark: pytest.Mark) -> int:
    """How often the test that carries `mark` runs now."""
    stressed = os.environ.get(VARIABLE, "")
    return int(stressed) if stressed else int(mark.args[0])
