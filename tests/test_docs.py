"""Documents that are made from the code are up to date."""

from __future__ import annotations

import socket
from pathlib import Path

from clusterserve.options import SPECS
from tests.helpers.docs import examples
from tests.helpers.option_table import DOCUMENT, README, flags, spellings, table, updated

STALE = "run: python -m tests.helpers.option_table"


def test_the_tables_of_options_are_up_to_date() -> None:
    settings, readme = DOCUMENT.read_text(encoding="utf-8"), README.read_text(encoding="utf-8")
    assert settings == updated(settings), STALE
    assert readme == updated(readme, "spellings", spellings), STALE


def test_every_option_is_in_both() -> None:
    every = [flag for spec in SPECS for flag in flags(spec)]
    assert [flag for flag in every if f"`{flag}`" not in table() or f"`{flag}`" not in spellings()] == []


def test_the_readmes_program_restarts_all_workers_and_ends(tmp_path: Path) -> None:
    example = examples("../README.md")["Node's `cluster`, for Python programs"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    example.files["server.py"] = example.files["server.py"].replace("9000", str(port))
    assert sorted(example.run(tmp_path).splitlines()) == [f"worker {number} has left" for number in range(1, 9)]
