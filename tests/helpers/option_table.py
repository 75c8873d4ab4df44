"""The table of options in docs/settings.md, made from the options themselves.

`python -m tests.helpers.option_table` brings the document up to date.
"""

from __future__ import annotations

import re
from pathlib import Path

from clusterserve.cli import option_help
from clusterserve.options import GROUPS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
_BLOCK = re.compile(r"(?<=<!-- options -->\n).*(?=<!-- /options -->)", re.DOTALL)


def table() -> str:
    """Every option, by group."""
    lines = []
    for title, group in GROUPS.items():
        lines += [f"**{title}**", "", "| option | meaning |", "|---|---|"]
        for spec in group:
            flags = ", ".join(f"`{flag}`" for flag in spec.flags)
            metavar = f" `{spec.metavar}`" if spec.metavar and spec.metavar != "-" else ""
            metavar = metavar.replace("|", "\\|")
            text = option_help(spec).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {flags}{metavar} | {text} |")
        lines.append("")
    return "\n".join(lines)


def updated(document: str) -> str:
    """The document with this table in it."""
    return _BLOCK.sub(lambda match: "\n" + table(), document)


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
