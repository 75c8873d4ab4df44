"""Documents that are made from the code are up to date."""

from __future__ import annotations

import socket
from pathlib import Path

from clusterserve.options import SPECS
from tests.helpers.docs import examples
from tests.helpers.option_table import DOCUMENT, table, updated


def test_the_table_of_options_is_up_to_date() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == updated(document), "run: python -m tests.helpers.option_table"


def test_every_option_is_in_it() -> None:
    assert [flag for spec in SPECS for flag in spec.flags if f"`{flag}`" not in table()] == []


def test_the_readmes_program_restarts_all_workers_and_ends(tmp_path: Path) -> None:
    example = examples("../README.md")["Node's `cluster`, for Python programs"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    example.files["server.py"] = example.files["server.py"].replace("9000", str(port))
    assert sorted(example.run(tmp_path).splitlines()) == [f"worker {number} has left" for number in range(1, 9)]
