"""How large the head of a request may be, as gunicorn has it: its line, the number of its fields, each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_ALL: Final = 1 << 62


@dataclass(frozen=True)
class Excess:
    """What is too large, the status that says so, and what to answer."""

    what: str
    status: int
    answer: bytes


def _excess(what: str, status: int, phrase: str) -> Excess:
    body = f"{what}\r\n".encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return Excess(what, status, head.encode() + body)


LONG_LINE: Final = _excess("Request line is too large", 414, "URI Too Long")
MANY_FIELDS: Final = _excess("Too many header fields", 431, "Request Header Fields Too Large")
LONG_FIELD: Final = _excess("Request header field is too large", 431, "Request Header Fields Too Large")


@dataclass(frozen=True)
class HeadLimits:
    """Sizes in bytes: of the line without its end, of a field as "Name: value" and the line's end.  0: no limit."""

    line: int = 0
    fields: int = 0
    field_size: int = 0

    @property
    def harmless(self) -> int:
        """No line and no field can be too large in so many bytes."""
        return min(self.line or _ALL, self.field_size or _ALL)

    @property
    def most_fields(self) -> int:
        """So many fields are not too many."""
        return self.fields or _ALL

    def excess(self, line: int, fields: Sequence[tuple[bytes, bytes]]) -> Excess | None:
        """What is too large of a head with a line of so many bytes and these fields; None: nothing."""
        if self.line and line > self.line:
            return LONG_LINE
        if self.fields and len(fields) > self.fields:
            return MANY_FIELDS
        if self.field_size and any(len(name) + len(value) + 4 > self.field_size for name, value in fields):
            return LONG_FIELD
        return None

    def excess_so_far(self, line: int, fields: int, last: int) -> Excess | None:
        """The same of an unfinished head: so long a line, so many whole fields, and so much of the next one."""
        if self.line and line > self.line:
            return LONG_LINE
        if self.fields and fields > self.fields:
            return MANY_FIELDS
        return LONG_FIELD if self.field_size and last > self.field_size else None

    def excess_of_raw(self, head: bytes | bytearray) -> Excess | None:
        """The same of an unfinished head as it came; a field that is not at its end counts as one that is."""
        line, *fields = head.split(b"\n")
        # What is empty in the end is not begun.
        longest = max((len(field) + 1 for field in fields), default=0)
        return self.excess_so_far(len(line.rstrip(b"\r")), len(fields) - (fields[-1:] == [b""]), longest)


NO_LIMITS: Final = HeadLimits()
