"""The list itself: whole, the document's table up to date, and its judge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.rows import DOCUMENT, Result, Row, judge, put, races, results, rows, table

HERE = Path(__file__).parent

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" tests="4" timestamp="2026-11-23T00:00:00">
<testcase classname="conformance.test_debug" name="test_I03_I06_zero[a]" time="1"/>
<testcase classname="conformance.test_debug" name="test_I01_x"><failure message="no">no</failure></testcase>
<testcase classname="conformance.test_debug" name="test_I02_x"><error message="no">no</error></testcase>
<testcase classname="e2e.test_http" name="test_I04_elsewhere" time="1"/>
</testsuite></testsuites>
"""


def row(id: str, applies: str = "yes", *, beyond: bool = False, open: bool = False) -> Row:
    return Row(id, applies, "what holds", "why not" if applies == "no" else "", beyond, open)


def test_every_row_is_there_once() -> None:
    counts = {"L": 12, "F": 18, "A": 16, "R": 23, "S": 9, "U": 17, "X": 7, "D": 19, "K": 14, "M": 23, "E": 10, "I": 11}
    assert [each.id for each in rows()] == [
        f"{theme}{n:02}" for theme, count in counts.items() for n in range(1, count + 1)
    ]


def test_who_does_not_apply_says_why() -> None:
    assert [each.id for each in rows() if each.applies != "yes" and not each.note] == []


def test_the_documents_table_is_this_one() -> None:
    """`python -m tests.conformance.rows --write` makes it so."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert put(document, "rows", table(rows())) == document


def test_tests_are_named_after_rows_that_there_are() -> None:
    known = {each.id for each in rows()}
    for path in HERE.glob("test_*.py"):
        names = re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert {id for name in names for id in Result(name, True).rows} <= known, path


def test_what_a_report_says(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = results(report)
    assert [(each.name, each.rows, each.passed) for each in found] == [
        ("test_I03_I06_zero[a]", ["I03", "I06"], True),
        ("test_I01_x", ["I01"], False),
        ("test_I02_x", ["I02"], False),
    ]
    assert races(report).startswith("Last run: 2026-11-23, Python 3.")
    assert races(report).endswith(": 3 races, 3 runs in all, 2 failed: test_I01_x, test_I02_x.\n")


@pytest.mark.parametrize(
    ("one", "ran", "fault"),
    [
        (row("D01"), [Result("test_D01_x", True)], ""),
        (row("D01"), [Result("test_D01_x", True), Result("test_D01_y", False)], "D01: test_D01_y failed"),
        (row("D01"), [], "D01: no test"),
        (row("D01"), [Result("test_D01_can_fail", True)], "D01: no test"),
        (row("D01", "partly"), [], "D01: no test"),
        (row("D01", "no"), [], ""),
        (row("D01", "later"), [], ""),
        (row("D01", open=True), [], ""),
        (row("D01", open=True), [Result("test_D01_x", True)], "D01 is marked open, but there are tests"),
        (row("D01", open=True, beyond=True), [Result("test_D01_x", True)], ""),
        (row("D01", beyond=True), [Result("test_D01_x", True)], "D01: 1 passed, but nothing shows that they can fail"),
        (row("D01", beyond=True), [Result("test_D01_x", True), Result("test_D01_can_fail", True)], ""),
        (
            row("D01", beyond=True),
            [Result("test_D01_x", True), Result("test_D01_can_fail", False)],
            "D01: test_D01_can_fail failed",
        ),
        (row("D01", "no"), [Result("test_D99_x", True)], "D99 is no row, but test_D99_x is named after it"),
    ],
)
def test_judgement(one: Row, ran: list[Result], fault: str) -> None:
    lines, faults = judge([one], ran)
    assert len(lines) == 1
    assert faults == ([fault] if fault else [])
