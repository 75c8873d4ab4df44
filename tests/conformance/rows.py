"""`python -m tests.conformance.rows REPORT`: which rows of the acceptance list have a passing test.

REPORT is a JUnit XML file of a test run.  Prints every row, and ends with 1 if one that holds here has no passing test
and is not marked open in rows.txt, or is marked open and has one, or a test of a row failed.

`--write` brings the table of docs/node-parity.md up to date, `--races REPORT --write` notes a result of `tox -e stress`
there.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TABLE: Final = Path(__file__).with_name("rows.txt")
DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "node-parity.md"

THEMES: Final = {
    "L": "Lifecycle", "F": "Fork, environment, settings", "A": "Addresses", "R": "Round robin", "S": "Shared sockets",
    "U": "UDP", "X": "Unix sockets and descriptors", "D": "Disconnecting", "K": "Killing and dying", "M": "Messages",
    "E": "Errors", "I": "Debugging and profiling",
}  # fmt: skip

_ROW: Final = re.compile(r"([A-Z]\d\d)(\*?) \| (yes|partly|no|later) \| (.+?) \|(?: (.*))?")


@dataclass(frozen=True)
class Row:
    """One row.  `beyond`: where Node is wrong, so that a test must show that the check can fail."""

    id: str
    applies: str
    title: str
    note: str
    beyond: bool
    open: bool

    @property
    def wanted(self) -> bool:
        """Whether there must be a test."""
        return self.applies in ("yes", "partly")


def rows() -> list[Row]:
    """All of them, as in rows.txt.  Raises ValueError for a line that is none."""
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            match = _ROW.fullmatch(line.rstrip())
            if match is None:
                raise ValueError(f"{TABLE.name}: {line}")
            id, star, applies, title, note = match.groups(default="")
            opened = note.endswith("open")
            note = note.removesuffix("open").rstrip("; ")
            found.append(Row(id, applies, title, note, bool(star), opened))
    return found


@dataclass(frozen=True)
class Result:
    """A test that ran."""

    name: str
    passed: bool

    @property
    def rows(self) -> list[str]:
        """What it is about: `test_I03_I06_zero…` is about two rows, `test_I00_…` about none."""
        match = re.match(r"test_((?:[A-Z]\d\d_)+)", self.name)
        return [id for id in match[1].rstrip("_").split("_") if not id.endswith("00")] if match else []

    @property
    def shows_that_it_can_fail(self) -> bool:
        return "_can_fail" in self.name


def results(report: Path) -> list[Result]:
    """The conformance tests of a JUnit report."""
    return [
        Result(case.get("name", ""), not any(child.tag in ("failure", "error") for child in case))
        for case in ElementTree.parse(report).iter("testcase")
        if "conformance" in case.get("classname", "")
    ]


def judge(table: Iterable[Row], ran: Iterable[Result]) -> tuple[list[str], list[str]]:
    """A line for every row, and what is wrong."""
    proofs: dict[str, list[Result]] = {}
    doubts: dict[str, list[Result]] = {}
    for result in ran:
        for id in result.rows:
            (doubts if result.shows_that_it_can_fail else proofs).setdefault(id, []).append(result)
    lines, faults = [], []
    known = set()
    for row in table:
        known.add(row.id)
        tests = proofs.get(row.id, [])
        failed = [each.name for each in (*tests, *doubts.get(row.id, [])) if not each.passed]
        proved = bool(tests) and not failed
        complete = proved and (not row.beyond or row.id in doubts)
        if not row.wanted:
            state = f"does not apply: {row.note}" if row.applies == "no" else f"later: {row.note}"
        elif proved:
            state = f"{len(tests)} passed" + ("" if complete else ", but nothing shows that they can fail")
        else:
            state = f"FAILED: {', '.join(failed)}" if failed else "no test"
        lines.append(f"{row.id}{'*' if row.beyond else ' '} {row.applies:6} {row.title}: {state}")
        if failed:
            faults.append(f"{row.id}: {', '.join(failed)} failed")
        elif row.wanted and not complete and not row.open:
            faults.append(f"{row.id}: {state}")
        elif row.open and complete:
            faults.append(f"{row.id} is marked open, but there are tests")
    for id, tests in proofs.items():
        if id not in known:
            faults.append(f"{id} is no row, but {tests[0].name} is named after it")
    return lines, faults


def table(all: Iterable[Row]) -> str:
    """The table of the document."""
    lines = []
    theme = ""
    for row in all:
        if row.id[0] != theme:
            theme = row.id[0]
            lines += ["", f"**{THEMES[theme]}**", "", "| row | what holds | here | note |", "|---|---|---|---|"]
        beyond = " ★" if row.beyond else ""
        note = "; ".join(each for each in (row.note, "no test yet" if row.open else "") if each)
        lines.append(f"| {row.id}{beyond} | {row.title} | {row.applies} | {note} |")
    return "\n".join(lines[1:]) + "\n"


def races(report: Path) -> str:
    """A sentence on a run of `tox -e stress`."""
    ran = results(report)
    tests = {each.name.partition("[")[0] for each in ran}
    failed = [each.name for each in ran if not each.passed]
    suite = next(ElementTree.parse(report).iter("testsuite"))
    ended = f"{len(failed)} failed: {', '.join(failed)}" if failed else "none failed"
    python = ".".join(map(str, sys.version_info[:3]))
    day = suite.get("timestamp", "")[:10]
    return f"Last run: {day}, Python {python}: {len(tests)} races, {len(ran)} runs in all, {ended}.\n"


def put(document: str, name: str, text: str) -> str:
    """The document with this text between its marks."""
    block = re.compile(rf"(?<=<!-- {name} -->\n).*(?=<!-- /{name} -->)", re.DOTALL)
    return block.sub(lambda match: text, document)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--races", type=Path, metavar="REPORT")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write:
        document = put(DOCUMENT.read_text(encoding="utf-8"), "rows", table(rows()))
        if given.races:
            document = put(document, "races", races(given.races))
        DOCUMENT.write_text(document, encoding="utf-8")
    if given.report is None:
        return 0
    lines, faults = judge(rows(), results(given.report))
    print("\n".join(lines))
    for fault in faults:
        print(f"rows: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
