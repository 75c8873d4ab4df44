"""A real Django project, by its WSGI and by its ASGI application."""

from __future__ import annotations

import httpx
import pytest

from tests.helpers.server import Serve, Server

KINDS = {"wsgi": "WSGIRequest", "asgi": "ASGIRequest"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(kind: str, serve_module: Serve) -> Server:
    app = f"tests.helpers.djangosite.{kind}:application"
    return serve_module("--root-path", "/site", app=app, workers=2)


def test_the_interface_is_told_by_itself(server: Server, kind: str) -> None:
    found = server.get("/whoami").json()
    assert found["kind"] == KINDS[kind]
    assert found["pid"] in {worker.pid for worker in server.workers}


def test_sessions_forms_files_and_the_database(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for count in (1, 2, 3):
            found = client.get("/visits").json()
            assert (found["visits"], found["answer"]) == (count, 42)
        data = bytes(range(256)) * 2000
        refused = client.post("/upload", data={"name": "x"}, files={"file": ("f.bin", data)})
        assert refused.status_code == 403
        headers = {"X-CSRFToken": found["token"]}
        taken = client.post("/upload", data={"name": "x"}, files={"file": ("f.bin", data)}, headers=headers)
        assert taken.json() == {"name": "x", "file": "f.bin", "size": len(data)}


def test_a_streamed_response(server: Server) -> None:
    with server.connect() as client:
        response = client.ask("GET", "/stream")
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.text == "0\n1\n2\n"
        # The connection goes on.
        assert client.ask("GET", "/whoami").status == 200


def test_below_a_root_path(server: Server) -> None:
    found = server.get("/where/%C3%A9?a=b%20c").json()
    assert found == {"path": "/site/where/é", "info": "/where/é", "query": {"a": "b c"}}


def test_what_goes_wrong(server: Server) -> None:
    assert server.get("/nowhere").status == 404
    assert server.get("/raise").status == 500
    assert server.get("/whoami").status == 200
