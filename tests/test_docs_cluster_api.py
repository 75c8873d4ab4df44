"""docs/cluster-api.md: its examples do what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.docs import Example, examples

EXAMPLES = examples("cluster-api.md")

#: By title; the others are run by a test of their own, or should be.
PRINTING = [example for example in EXAMPLES.values() if example.output is not None]


@pytest.mark.parametrize("example", PRINTING, ids=lambda example: example.title)
def test_it_prints_what_the_page_says(example: Example, tmp_path: Path) -> None:
    assert example.run(tmp_path) == example.output


def test_there_are_some() -> None:
    wanted = {"Messages", "Requests: a job pool", "Broadcast", "Sockets", "A chat over WebSockets", "Any program"}
    wanted |= {"Listening", "A UDP collector", "A rolling restart by hand"}
    assert wanted <= set(EXAMPLES)
