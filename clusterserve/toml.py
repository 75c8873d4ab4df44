"""TOML: reading a file of it, and writing single values."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["BadTomlError", "parse", "written"]

if sys.version_info >= (3, 11):
    from tomllib import TOMLDecodeError, loads
else:
    from tomli import TOMLDecodeError, loads


class BadTomlError(ValueError):
    """What was read is no TOML; the text says why and on which line."""


def parse(text: str) -> dict[str, Any]:
    """The tables of a TOML document.  Raises `BadTomlError`."""
    try:
        return loads(text)
    except TOMLDecodeError as error:
        raise BadTomlError(str(error)) from None


def written(value: object) -> str:
    """A text, a truth, a number, a list or a mapping of such, as one line of TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_quoted(str(key))} = {written(each)}" for key, each in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(written(each) for each in value)}]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    shown = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08X}" for char in shown) + '"'
