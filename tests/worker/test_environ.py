"""WSGI's environment: what a2wsgi leaves to its user."""

from __future__ import annotations

import io
import sys
from typing import Any
from wsgiref.validate import validator

import pytest

from clusterserve.worker.environ import environ_of


def environ(path: str = "/", raw: bytes | None = None, *, several: bool = True, **scope: Any) -> dict[str, Any]:
    given = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path,
        "raw_path": path.encode() if raw is None else raw, "query_string": b"", "root_path": "", "headers": [],
        "server": ("127.0.0.1", 8000), "client": ("10.0.0.1", 1234), **scope,
    }  # fmt: skip
    return environ_of(given, io.BytesIO(), several_threads=several)


def test_what_every_application_asks_for() -> None:
    found = environ("/x", query_string=b"a=b", headers=[(b"host", b"h"), (b"content-type", b"t"), (b"x-y", b"z")])
    wanted = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/x", "QUERY_STRING": "a=b", "RAW_URI": "/x?a=b",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "REMOTE_ADDR": "10.0.0.1",
        "HTTP_HOST": "h", "CONTENT_TYPE": "t", "HTTP_X_Y": "z", "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
        "wsgi.input_terminated": True, "wsgi.multithread": True, "wsgi.multiprocess": True,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert found["asgi.scope"]["headers"][2] == (b"x-y", b"z")
    assert environ(several=False)["wsgi.multithread"] is False


@pytest.mark.parametrize(
    ("root", "raw", "script", "path"),
    [
        ("/api", b"/api/x", "/api", "/x"),
        ("/api", b"/api", "/api", ""),
        ("/api", b"/apix", "/api", "/apix"),
        ("", b"/a%2Fb%20c", "", "/a/b c"),
        # Not UTF-8: the very bytes.
        ("", b"/%ff%C3%A9", "", "/\xff\xc3\xa9"),
    ],
)
def test_paths(root: str, raw: bytes, script: str, path: str) -> None:
    found = environ(raw=raw, root_path=root)
    assert (found["SCRIPT_NAME"], found["PATH_INFO"]) == (script, path)


def test_script_name_of_the_environment_as_gunicorn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPT_NAME", "/shop")
    found = environ("/shop/x")
    assert (found["SCRIPT_NAME"], found["PATH_INFO"]) == ("/shop", "/x")


def test_a_protocol_that_has_no_raw_path() -> None:
    assert environ("/é", raw=b"")["PATH_INFO"] == "/\xc3\xa9"


def test_headers() -> None:
    headers = [
        (b"x-user", b"proxy"), (b"x_user", b"intruder"), (b"cookie", b"a=1"), (b"cookie", b"b=2"),
        (b"accept", b"x"), (b"accept", b"y"), (b"host", b"one"), (b"host", b"two"),
    ]  # fmt: skip
    found = environ(headers=headers)
    names = ("HTTP_X_USER", "HTTP_COOKIE", "HTTP_ACCEPT", "HTTP_HOST")
    assert [found[name] for name in names] == ["proxy", "a=1; b=2", "x,y", "one"]


def test_a_query_of_any_bytes_and_a_client_without_an_address() -> None:
    found = environ(query_string=b"\xff=1", client=None)
    assert (found["QUERY_STRING"], found["REMOTE_ADDR"]) == ("\xff=1", "")


def test_it_is_what_the_standard_asks_for() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    answer = validator(app)(environ(), lambda *arguments: lambda data: None)
    assert list(answer) == [b""]
    answer.close()  # type: ignore[attr-defined]
