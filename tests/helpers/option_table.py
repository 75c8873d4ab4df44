"""The tables of options in docs/settings.md and README.md, made from the options themselves.

`python -m tests.helpers.option_table` brings both documents up to date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from clusterserve.cli import option_help
from clusterserve.options import GROUPS, ONCE, Spec, variable
from tests.test_peers import GUNICORN, UVICORN

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "settings.md"
README = ROOT / "README.md"

_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")

NOTHING = "–"


def table() -> str:
    """Every option, by group: what it is called everywhere, its default, and what it does."""
    lines = []
    for title, group in GROUPS.items():
        lines += [f"**{title}**", "", "| option | default | variable | in a file | meaning |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in _row(spec))} |" for spec in group]
        lines.append("")
    return "\n".join(lines)


def _row(spec: Spec) -> list[str]:
    metavar = f" `{spec.metavar}`" if spec.metavar and spec.metavar != "-" else ""
    text = option_help(spec)
    found = _DEFAULT.search(text)
    default = found[1] if found is not None else "off" if spec.kind == "flag" and spec.setting not in ONCE else NOTHING
    name = spec.name[2:].replace("-", "_")
    return [
        ", ".join(_marked(flag) for flag in flags(spec)) + metavar,
        default.replace("<", "&lt;").replace("*", r"\*"),
        NOTHING if spec.setting in ONCE else f"`{variable(spec.name)}`",
        NOTHING if spec.setting in ONCE or spec.setting == "config" else f"`{name}`",
        _DEFAULT.sub("", text).replace("<", "&lt;"),
    ]


def flags(spec: Spec) -> list[str]:
    """Everything it can be written as on the command line."""
    return [*spec.flags, *(f"--no-{flag[2:]}" for flag in spec.flags if spec.kind == "pair")]


def _marked(flag: str) -> str:
    """With the initials of whose spelling it is."""
    whose = " ".join(letter for letter, theirs in (("U", UVICORN), ("G", GUNICORN)) if flag in theirs)
    return f"`{flag}`" + f"<sup>{whose}</sup>" * bool(whose)


def spellings() -> str:
    """Every option by group, and whose it is."""
    lines = ["| | both | uvicorn | gunicorn | neither |", "|---|---|---|---|---|"]
    for title, group in GROUPS.items():
        cells = [
            " ".join(
                f"`{flag}`"
                for spec in group
                for flag in flags(spec)
                if (flag in UVICORN) is uvicorns and (flag in GUNICORN) is gunicorns
            )
            for uvicorns, gunicorns in ((True, True), (True, False), (False, True), (False, False))
        ]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join([*lines, ""])


def updated(document: str, mark: str = "options", made: Callable[[], str] = table) -> str:
    """The document with this table in it."""
    block = re.compile(rf"(?<=<!-- {mark} -->\n).*(?=<!-- /{mark} -->)", re.DOTALL)
    if block.search(document) is None:
        raise ValueError(f"no place for the table: <!-- {mark} --> … <!-- /{mark} -->")
    return block.sub(lambda match: "\n" + made() + "\n" * (made is spellings), document)


def main() -> None:
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(updated(README.read_text(encoding="utf-8"), "spellings", spellings), encoding="utf-8")


if __name__ == "__main__":
    main()
