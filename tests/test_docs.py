"""Documents that are made from the code are up to date."""

from __future__ import annotations

from clusterserve.options import SPECS
from tests.helpers.option_table import DOCUMENT, table, updated


def test_the_table_of_options_is_up_to_date() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == updated(document), "run: python -m tests.helpers.option_table"


def test_every_option_is_in_it() -> None:
    assert [flag for spec in SPECS for flag in spec.flags if f"`{flag}`" not in table()] == []
