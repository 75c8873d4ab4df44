"""What `chaos` is for ASGI, for WSGI: the same questions, the same answers, in threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import parse_qs

from tests.helpers.apps.chaos import checksum, content


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    query = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
    kind, ident, size, step = environ["PATH_INFO"][1:], query["id"], int(query["n"]), int(query.get("chunk", 0))
    body = b"" if kind == "early" else environ["wsgi.input"].read()
    if kind in ("block", "await"):
        time.sleep(float(query.get("ms", 0)) / 1000)
    headers = [("x-id", ident), ("x-sum", checksum(body)), ("x-pid", str(os.getpid()))]
    headers.append(("x-from", environ.get("REMOTE_ADDR", "")))
    if not step:
        headers.append(("content-length", str(size)))
    start_response("200 OK", headers)
    return pieces(content(ident, size), step or size or 1)


def pieces(body: bytes, step: int) -> Iterator[bytes]:
    for start in range(0, len(body), step):
        yield body[start : start + step]
