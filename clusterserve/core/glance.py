"""What a request looks like that nobody has read, by its first bytes: enough for a line of the access log."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import unquote

#: Nothing that a parser would refuse: it stands in a line of the log as it is.
_LINE: Final = re.compile(rb"([!#-'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/(\d\.\d)\r?\n")


def glance(data: bytes) -> dict[str, Any]:
    """As much of ASGI's scope as is there.  The method is empty if the first line is not whole, or is none."""
    scope: dict[str, Any] = {"type": "http", "method": "", "path": "", "query_string": b"", "headers": []}
    line = _LINE.match(data)
    if line is not None:
        path, _, query = line[2].partition(b"?")
        # The last piece is what comes behind the head, or a field that is not at its end.
        fields = data[line.end() :].partition(b"\r\n\r\n")[0].split(b"\r\n")
        if b"\r\n\r\n" not in data:
            fields.pop()
        pairs = (field.partition(b":") for field in fields)
        scope.update(
            method=line[1].decode(),
            path=unquote(path.decode()),
            query_string=query,
            http_version=line[3].decode(),
            headers=[(name.lower(), value.strip()) for name, colon, value in pairs if colon],
        )
    return scope
