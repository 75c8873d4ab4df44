"""The log seen from outside: what is in it, in which form, and that no line is lost or broken."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from clusterserve import Cluster, ClusterError
from tests.helpers.raw import Address, Client, fetch, request
from tests.helpers.server import LISTENING_ON, Serve, Server, run, serving
from tests.helpers.waiting import DEADLINE, eventually

APP = "tests.helpers.apps.logged:app"

#: Of every line, whoever writes it.
COMMON = ("time", "level", "logger", "message", "worker", "slot", "pid", "request_id")
#: Of the access log besides.
ACCESS = (
    "client", "method", "path", "query", "protocol", "status", "bytes", "queue_time", "service_time", "referer",
    "user_agent",
)  # fmt: skip


class Log:
    """A server that logs in JSON, requests to a file."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self.path = path

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    @property
    def others(self) -> list[dict[str, Any]]:
        return [json.loads(line.text) for line in self.server.lines]

    def said_for(self, name: str) -> dict[str, Any]:
        """What else is logged with this name, as soon as it is there."""
        (line,) = eventually(lambda: [line for line in self.others if line["request_id"] == name], f"{name} is told")
        return line

    def of(self, name: str) -> dict[str, Any]:
        """The line of the request of this name, as soon as it is there; there is only one."""
        (line,) = eventually(lambda: [line for line in self.requests if line["request_id"] == name], f"{name} is told")
        return line

    def ask(self, target: str, name: str, *headers: str) -> dict[str, Any]:
        with self.server.connect() as client:
            client.ask("GET", target, f"X-Request-ID: {name}", *headers)
        return self.of(name)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    path = tmp_path_factory.mktemp("log") / "access.log"
    with serving() as serve:
        server = serve(
            *("--log-format", "json", "--access-logfile", str(path)),
            *("--access-log-exclude", "/health*", "--access-log-exclude", "/static/*"),
            # Two of its requests raise, which is told.
            *("--dispatch", "request"),
            app=APP,
            workers=2,
            noise=True,
        )
        yield Log(server, path)


def test_one_schema_for_master_workers_and_requests(log: Log) -> None:
    log.ask("/", "schema")
    workers = {worker.id: worker for worker in log.server.workers}
    for line in (*log.others, *log.requests):
        assert tuple(line)[: len(COMMON)] == COMMON
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", line["time"])
        if line["worker"] is None:
            assert (line["slot"], line["pid"], line["logger"]) == (None, log.server.pid, "clusterserve")
        else:
            worker = workers[line["worker"]]
            assert (line["slot"], line["pid"]) == (worker.slot, worker.pid)
    assert tuple(log.of("schema")) == COMMON + ACCESS
    assert {line.stream for line in log.server.lines} == {"err"}


def test_a_request(log: Log) -> None:
    with log.server.connect() as client:
        response = client.ask("GET", "/x%20y?a=b", "X-Request-ID: told", "User-Agent: test/1", "Referer: http://r/")
        assert response.text == "told"
        port = client.port
    line = log.of("told")
    expected = {
        "client": f"127.0.0.1:{port}", "method": "GET", "path": "/x y", "query": "a=b", "protocol": "HTTP/1.1",
        "status": 200, "bytes": 4, "referer": "http://r/", "user_agent": "test/1", "level": "info",
        "logger": "uvicorn.access", "message": f'127.0.0.1:{port} - "GET /x%20y?a=b HTTP/1.1" 200',
    }  # fmt: skip
    assert {key: line[key] for key in expected} == expected


@pytest.mark.parametrize("given", [None, "two words", "x" * 129, 'a"b', "-starts"])
def test_a_request_without_an_acceptable_id_gets_one(log: Log, given: str | None) -> None:
    with log.server.connect() as client:
        name = client.ask("GET", "/", *([] if given is None else [f"X-Request-ID: {given}"])).text
    assert re.fullmatch(r"[0-9a-f]{32}", name)
    assert log.of(name)["status"] == 200


def test_what_is_logged_for_a_request_has_its_id(log: Log) -> None:
    line = log.ask("/raise", "trouble")
    assert (line["status"], line["bytes"]) == (500, 21)
    told = log.said_for("trouble")
    assert (told["level"], told["logger"], told["worker"]) == ("error", "uvicorn.error", line["worker"])
    assert told["exception"].endswith("RuntimeError: the handler's own trouble")


def test_what_the_application_logs_without_having_said_how_is_json_too(log: Log) -> None:
    log.ask("/say", "unconfigured")
    told = log.said_for("unconfigured")
    assert (told["level"], told["logger"], told["message"]) == (
        "warning", "the.applications.own", "said for unconfigured",
    )  # fmt: skip


def test_an_application_that_says_nothing(log: Log) -> None:
    assert log.ask("/nothing", "nothing")["status"] == 500


def test_a_client_that_leaves(log: Log) -> None:
    with log.server.connect() as client:
        client.send(request("GET", "/wait", "X-Request-ID: left"))
        log.server.wait_for('"It waits".*"left"')
    line = log.of("left")
    assert (line["status"], line["bytes"]) == (499, 0)


def test_a_request_that_waits_for_the_only_worker(serve: Serve, tmp_path: Path) -> None:
    path, go = tmp_path / "access.log", tmp_path / "go"
    log = Log(serve("--log-format", "json", "--access-logfile", str(path), app=APP), path)
    with log.server.connect() as first:
        first.send(request("GET", f"/hold?until={go}", "X-Request-ID: first"))
        log.server.wait_for("The loop is held")
        start = time.monotonic()
        with log.server.connect() as second:
            second.send(request("GET", "/", "X-Request-ID: second"))
            eventually(lambda: log.server.accepted_by_master(second), "it is accepted, and waits")
            waits = time.monotonic()
            eventually(lambda: time.monotonic() > waits + 0.3, "it has waited")
            waited = time.monotonic() - waits
            go.touch()
            assert first.response().status == second.response().status == 200
            whole = time.monotonic() - start
            # On a connection that its worker has kept, nobody knows how long a request has waited.
            assert second.ask("GET", "/", "X-Request-ID: third").status == 200
    held, line = log.of("first"), log.of("second")
    # The master's clock counts in milliseconds.
    assert held["service_time"] >= waited - 0.002
    assert waited - 0.002 <= line["queue_time"] <= whole + 0.002
    assert line["service_time"] <= whole - waited + 0.002
    assert log.of("third")["queue_time"] is None


def test_failures_are_logged_also_where_they_are_excluded(log: Log) -> None:
    with log.server.connect() as client:
        for name, target in (
            ("h1", "/health"), ("h2", "/health/live?x=1"), ("h3", "/health?status=503"), ("s1", "/static/a/b.css"),
            ("s2", "/static/none?status=404"), ("last", "/static"),
        ):  # fmt: skip
            client.ask("GET", target, f"X-Request-ID: {name}")
    log.of("last")
    names = {line["request_id"] for line in log.requests}
    assert {"h1", "h2", "h3", "s1", "s2", "last"} & names == {"h3", "s2", "last"}


@pytest.mark.parametrize(("ends", "code"), [("client", 1000), ("server", 4001)])
def test_a_websocket_is_one_line_at_its_close(log: Log, ends: str, code: int) -> None:
    name = f"ws-{ends}"
    url = log.server.url.replace("http://", "ws://")
    with connect(f"{url}/ws?a=b", additional_headers={"X-Request-ID": name}) as websocket:
        websocket.send("hello")
        assert websocket.recv() == "hello"
        assert not [line for line in log.requests if line["request_id"] == name]
        if ends == "server":
            websocket.send("end")
            with pytest.raises(Exception, match="4001"):
                websocket.recv()
    line = log.of(name)
    assert (line["status"], line["close_code"], line["bytes"], line["path"]) == (101, code, 5, "/ws")
    assert not log.server.found(rf"WebSocket .*{name}|\[accepted\]")


def test_a_websocket_that_is_refused(log: Log) -> None:
    url = log.server.url.replace("http://", "ws://")
    with pytest.raises(Exception, match="403"):
        connect(f"{url}/refused", additional_headers={"X-Request-ID": "ws-refused"})
    line = log.of("ws-refused")
    assert (line["status"], line["close_code"]) == (403, None)


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gunicorns_atoms(serve: Serve) -> None:
    template = '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s" %(D)s %(p)s %({x-y}i)s %({nope}o)s %(z)s'
    server = serve("--access-logformat", template, app=APP)
    with server.connect() as client:
        # admin:secret
        headers = ("User-Agent: test/1", "Authorization: Basic YWRtaW46c2VjcmV0", 'X-Y: say "hello"')
        client.ask("GET", "/a?b=c", *headers)
    [match] = server.wait_for(r"^127\.0\.0\.1 ")
    pid = server.workers[0].pid
    assert re.fullmatch(
        r"127\.0\.0\.1 - admin \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
        rf'"GET /a\?b=c HTTP/1\.1" 200 32 "-" "test/1" \d+ <{pid}> say \\"hello\\" - -',
        match.string,
    )
    assert [line.stream for line in server.lines if line.text == match.string] == ["out"]


def test_exclusion_with_uvicorns_own_lines(serve: Serve) -> None:
    server = serve("--access-log-exclude", "/health*", app=APP)
    with server.connect() as client:
        for target in ("/health", "/health?status=500", "/%68ealth", "/end"):
            client.ask("GET", target)
        port = client.port
    server.wait_for("GET /end")
    assert [line.text for line in server.lines if line.stream == "out"] == [
        f'INFO:     127.0.0.1:{port} - "GET /health?status=500 HTTP/1.1" 500 Internal Server Error',
        f'INFO:     127.0.0.1:{port} - "GET /end HTTP/1.1" 200 OK',
    ]


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Files:
    """A server whose whole log is in files, of the names that logrotate would give them."""

    def __init__(self, serve: Serve, tmp_path: Path, *options: str, workers: int = 2) -> None:
        self.access, self.error = tmp_path / "access.log", tmp_path / "error.log"
        names = ("--access-logfile", str(self.access), "--log-file", str(self.error))
        self.server = serve(*names, *options, app=APP, workers=workers, ready=False)
        eventually(lambda: self.said().count("is listening") >= workers, "they listen")
        found = LISTENING_ON.search(self.said())
        assert found is not None
        self.address = Address.parse(found[1])

    def said(self) -> str:
        return self.error.read_text() if self.error.exists() else ""

    def rotate(self) -> tuple[Path, Path]:
        """As logrotate without copytruncate; returns when the server says that it is done."""
        old = [path.rename(path.with_suffix(".1")) for path in (self.access, self.error)]
        self.server.signal(signal.SIGUSR1)
        eventually(lambda: "The log's files are reopened" in self.said(), "reopened")
        return old[0], old[1]


def test_rotation_under_load_loses_no_line(serve: Serve, tmp_path: Path) -> None:
    files = Files(serve, tmp_path)
    asked: Counter[str] = Counter()
    stop = threading.Event()

    def client(name: int) -> None:
        count = 0
        while not stop.is_set():
            # Some on one connection, as the workers that keep them log too.
            with Client(files.address) as connection:
                for _ in range(5):
                    target = f"/request-{name}-{count}"
                    assert connection.ask("GET", target).status == 200
                    asked[target] += 1
                    count += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: files.access.exists() and files.access.stat().st_size > 5000, "they are at it")
        old, _ = files.rotate()
        size = old.stat().st_size
        eventually(lambda: files.access.stat().st_size > 5000, "they are at it still")
        # Everything behind the confirmation is in the new file.
        assert old.stat().st_size == size
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert files.server.stop() == 0
    lines = (old.read_text() + files.access.read_text()).splitlines()
    assert all(re.fullmatch(r'INFO:     127\.0\.0\.1:\d+ - "GET \S+ HTTP/1\.1" 200 OK', line) for line in lines)
    told = Counter(line.split()[4] for line in lines)
    assert told == asked
    # The people's part goes on in the new file as well, and nothing of it is on the terminal.
    assert "Stopped, master process" in files.said()
    assert files.server.lines == []


def test_workers_forked_from_a_template_log_where_the_files_are_now(serve: Serve, tmp_path: Path) -> None:
    """The template has opened them before they were renamed, and a worker that is forked later inherits that."""
    files = Files(serve, tmp_path, "--preload", "--log-format", "json")
    old = files.rotate()
    sizes = [path.stat().st_size for path in old]
    (pid,) = {int(found) for found in re.findall(r"Worker 1 \(slot 0, pid (\d+)\) is listening", old[1].read_text())}
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: "Worker 3 (slot 0" in files.said(), "it is replaced")
    for number in range(8):
        assert fetch(files.address, f"/request-{number}").status == 200
    told = [json.loads(line) for line in files.access.read_text().splitlines()]
    assert Counter(line["path"] for line in told) == Counter(f"/request-{number}" for number in range(8))
    assert {(line["worker"], line["slot"]) for line in told} == {(2, 1), (3, 0)}
    assert files.server.stop() == 0
    assert [path.stat().st_size for path in old] == sizes


def test_a_reload_reopens_too(serve: Serve, tmp_path: Path) -> None:
    files = Files(serve, tmp_path, workers=1)
    files.error.rename(tmp_path / "error.log.1")
    files.server.signal(signal.SIGHUP)
    eventually(lambda: "Worker 2 (slot 0" in files.said(), "the new worker is told of in the new file")
    assert files.server.stop() == 0


def test_files_that_cannot_be_opened_again(serve: Serve, tmp_path: Path) -> None:
    place = tmp_path / "log"
    place.mkdir()
    files = Files(serve, place, workers=1)
    place.rename(tmp_path / "moved")
    error = tmp_path / "moved" / "error.log"
    files.server.signal(signal.SIGUSR1)
    eventually(lambda: "The log stays where it is: access_logfile" in error.read_text(), "it is told")
    assert files.server.stop() == 0
    assert "Stopped, master process" in error.read_text()


def test_handlers_of_a_log_config_follow(serve: Serve, tmp_path: Path) -> None:
    path, config = tmp_path / "all.log", tmp_path / "log.toml"
    config.write_text(
        "version = 1\ndisable_existing_loggers = false\n"
        'formatters.json."()" = "clusterserve.json_lines.JsonFormatter"\n'
        f'handlers.file = {{class = "logging.FileHandler", filename = "{path}", formatter = "json"}}\n'
        'root = {level = "INFO", handlers = ["file"]}\n'
    )
    server = serve("--log-config", str(config), "--access-logformat", "%(r)s took %(D)s", app=APP, ready=False)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    eventually(lambda: [line for line in lines() if "is listening" in line["message"]], "it listens")
    path.rename(tmp_path / "old.log")
    server.signal(signal.SIGUSR1)
    eventually(lambda: [line for line in lines() if "reopened" in line["message"]], "reopened")
    old = (tmp_path / "old.log").read_text()
    found = LISTENING_ON.search(old)
    assert found is not None
    assert fetch(Address.parse(found[1]), "/there").status == 200
    (line,) = eventually(lambda: [each for each in lines() if each["logger"] == "uvicorn.access"], "it is told")
    assert re.fullmatch(r"GET /there HTTP/1\.1 took \d+", line["message"])
    assert (line["path"], line["worker"], line["slot"]) == ("/there", 1, 0)
    assert (tmp_path / "old.log").read_text() == old
    assert server.stop() == 0


def test_captured_output_is_in_the_file_and_follows_it(serve: Serve, tmp_path: Path) -> None:
    error = tmp_path / "error.log"
    app = "tests.helpers.apps.prints:app"
    server = serve("--capture-output", "--error-logfile", str(error), app=app, ready=False)
    eventually(lambda: error.exists() and "is listening" in error.read_text(), "it listens")
    found = LISTENING_ON.search(error.read_text())
    assert found is not None
    address = Address.parse(found[1])
    before = error.read_text()
    error.rename(tmp_path / "old.log")
    server.signal(signal.SIGUSR1)
    eventually(lambda: error.exists() and "reopened" in error.read_text(), "reopened")
    assert fetch(address, "/").status == 200
    eventually(lambda: "printed" in error.read_text(), "what was printed is in the new file")
    assert (tmp_path / "old.log").read_text() == before
    assert server.stop() == 0
    assert {line.stream for line in server.lines} <= {"out"}


def test_sigterm_in_the_midst_of_a_line_loses_none(serve: Serve, tmp_path: Path) -> None:
    """Two workers write long lines to a pipe that nobody reads yet: they stand in the midst of them when it comes."""
    pipe = tmp_path / "access"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    options = ("--access-logfile", str(pipe), "--dispatch", "connection", "--limit-request-line", "0")
    server = serve(*options, app=APP, workers=2)
    targets = {f"/{number:02}-" + "x" * 20_000 for number in range(12)}
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(server.connect()).send(request("GET", target))
        # It has room for 65,536 bytes: the next line does not fit, and who writes it waits in the midst of it.
        eventually(lambda: _unread(reader) > 60_000, "the pipe is full")
        server.terminate()
        server.wait_for("Stopping")
        os.set_blocking(reader, True)
        text = b""
        while part := os.read(reader, 3000):
            text += part
        assert server.wait() == 0
    os.close(reader)
    lines = text.decode().splitlines()
    assert {line.split()[4] for line in lines} == targets
    assert len(lines) == len(targets)
    assert all(line.startswith("INFO:     ") and line.endswith(" 200 OK") for line in lines)


def _unread(fd: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0])


def test_in_a_program_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "log" / "access.log"
    path.parent.mkdir()
    with Cluster(APP, workers=2, bind="127.0.0.1:0", access_logfile=path, timeout_request=0.2, log_format="json") as it:
        address = Address.parse(it.url)
        assert fetch(address, "/before").status == 200
        # Ended by its limit, which is told as its client was told.
        assert fetch(address, "/wait").status == 504
        old = path.rename(tmp_path / "old")
        it.reopen_logs().result(DEADLINE)
        assert fetch(address, "/after").status == 200
        path.parent.rename(tmp_path / "moved")
        with pytest.raises(ClusterError, match=r"access_logfile '.*/access\.log' cannot be opened: No such file"):
            it.reopen_logs().result(DEADLINE)
    told = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in (old, tmp_path / "moved" / path.name)
    ]
    assert [(line["path"], line["status"]) for lines in told for line in lines] == [
        ("/before", 200), ("/wait", 504), ("/after", 200),
    ]  # fmt: skip
    assert len(told[1]) == 1
    with pytest.raises(ClusterError):
        it.reopen_logs().result(DEADLINE)


# ── what keeps it from starting ─────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_start_is_a_line_for_machines() -> None:
    finished = run("tests.helpers.apps.raises:app", "--bind", "127.0.0.1:0", "--workers", "1", "--log-format", "json")
    assert finished.code == 3
    lines = [json.loads(line) for line in finished.err.splitlines()]
    assert (lines[-1]["level"], lines[-1]["worker"]) == ("critical", None)
    assert lines[-1]["message"] == "the application 'tests.helpers.apps.raises:app' could not be loaded"
    assert "Traceback" in lines[-1]["exception"]


def test_a_failed_start_is_in_the_file(tmp_path: Path) -> None:
    error = tmp_path / "error.log"
    app = ("tests.helpers.apps.raises:app", "--bind", "127.0.0.1:0", "--workers", "1")
    finished = run(*app, "--error-logfile", str(error))
    assert finished.code == 3
    # People look at the terminal first.
    assert finished.err.startswith("clusterserve: error: the application")
    assert "CRITICAL: the application 'tests.helpers.apps.raises:app' could not be loaded" in error.read_text()


@pytest.mark.parametrize("flag", ["--access-logfile", "--log-file"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, flag: str) -> None:
    finished = run(APP, flag, str(tmp_path / "none" / "x.log"))
    assert finished.code == 2
    assert re.fullmatch(
        rf"clusterserve: error: \w+ '{tmp_path}/none/x\.log' cannot be opened: No such file or directory\n",
        finished.err,
    )
