"""A WSGI application whose requests take as long as the client says, as those of `work`: `/work?ms=MILLISECONDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.apps.common import BODY, PID, hold_the_event_loop
from benchmarks.apps.work import hold


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/pid":
        hold_the_event_loop()
        body = PID
    else:
        hold(float(environ["QUERY_STRING"].partition("ms=")[2] or 0) / 1000)
        body = BODY
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
