"""A Flask application: what one does, and requests that wait for a file of the test's in the directory GATES."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flask import Flask, Response, jsonify, request

from clusterserve import current_worker

app = Flask(__name__)
gates = Path(os.environ.get("GATES", "/nonexistent"))


def _wait(name: str) -> None:
    (gates / f"{name}.reached").touch()
    while not (gates / name).exists():
        time.sleep(0.005)


@app.get("/whoami")
def whoami() -> Response:
    worker = current_worker()
    return jsonify(id=worker.id if worker else 0, pid=os.getpid(), thread=threading.current_thread().name)


@app.get("/hold/<name>")
def hold(name: str) -> Response:
    _wait(name)
    return whoami()


@app.get("/stream/<name>")
def stream(name: str) -> Response:
    def parts() -> Iterator[str]:
        yield "one\n"
        _wait(name)
        yield "two\n"

    return Response(parts(), mimetype="text/plain")


@app.get("/endless/<name>")
def endless(name: str) -> Response:
    def parts() -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 1000
                time.sleep(0.01)
        finally:
            (gates / f"{name}.closed").touch()

    return Response(parts())


@app.get("/midway")
def midway() -> Response:
    def parts() -> Iterator[bytes]:
        yield b"begun"
        raise RuntimeError("midway")

    return Response(parts())


@app.get("/raise")
def raises() -> Response:
    raise RuntimeError("on purpose")


@app.post("/upload")
def upload() -> Response:
    """Reads the stream by lines, however it is framed."""
    return jsonify(lines=sum(1 for _ in request.stream), encoding=request.headers.get("Transfer-Encoding"))


@app.post("/form")
def form() -> Response:
    file = request.files["file"]
    return jsonify(name=request.form["name"], file=file.filename, size=len(file.read()))


@app.get("/environ")
def environ() -> Response:
    names = ("SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "REMOTE_ADDR", "HTTP_X_USER", "wsgi.multithread")
    print("said on wsgi.errors", file=request.environ["wsgi.errors"], flush=True)
    draining = request.environ["asgi.scope"]["extensions"]["clusterserve"]["draining"].is_set()
    return jsonify({**{name: request.environ.get(name) for name in names}, "draining": draining})


def create_app() -> Flask:
    print("The factory was called", file=sys.stderr, flush=True)
    return app


def anything(*arguments: object) -> object:
    """Nobody can tell what it is."""
    return app(*arguments)  # type: ignore[arg-type]
