"""WSGI's environment of a request, from its ASGI scope.

a2wsgi translates; what it leaves to its user is done here, each with a test (tests/worker/test_environ.py): names of
headers with underscores would pass for those with dashes, several cookies are one header, a query string may hold any
byte, a path is what was sent and not what UTF-8 makes of it, and `wsgi.errors` is no place for stdout.
"""

from __future__ import annotations

import sys
from typing import Any, Final
from urllib.parse import unquote_to_bytes
from wsgiref.util import FileWrapper

from a2wsgi.wsgi import build_environ

#: A client can send these twice with the same meaning as once; a2wsgi would join them with a comma.
_ONCE: Final = frozenset({b"content-length", b"content-type", b"host"})


def environ_of(scope: dict[str, Any], body: Any, *, several_threads: bool) -> dict[str, Any]:
    """The environment; `asgi.scope` in it is the scope itself.  `body` becomes `wsgi.input`."""
    query = scope["query_string"]
    translated: dict[str, Any] = dict(scope, headers=_headers(scope["headers"]), query_string=b"")
    environ: dict[str, Any] = dict(build_environ(translated, body))  # type: ignore[arg-type]
    raw = scope.get("raw_path") or scope["path"].encode()
    script, path = environ["SCRIPT_NAME"], unquote_to_bytes(raw).decode("latin1")
    environ.update(
        {
            "asgi.scope": scope,
            "PATH_INFO": path[len(script) :] if path == script or path.startswith(f"{script}/") else path,
            "QUERY_STRING": query.decode("latin1"),
            # gunicorn's, and uwsgi's: as it was sent.
            "RAW_URI": (raw + b"?" + query if query else raw).decode("latin1"),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": several_threads,
            "wsgi.file_wrapper": FileWrapper,
            # It ends where the body does, also that of a chunked upload, which has no length.
            "wsgi.input_terminated": True,
        }
    )
    # A unix socket's clients have none.
    environ.setdefault("REMOTE_ADDR", "")
    return environ


def _headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    kept: dict[bytes, bytes] = {}
    for name, value in headers:
        if b"_" in name:
            # In the environment it could not be told from the one with a dash, which a proxy in front has checked.
            continue
        if name not in kept:
            kept[name] = value
        elif name not in _ONCE:
            kept[name] += (b"; " if name == b"cookie" else b",") + value
    return list(kept.items())
