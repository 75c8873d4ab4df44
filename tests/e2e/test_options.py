"""Options seen from outside: what is printed where, what reaches uvicorn, and policies of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.raw import Address, fetch
from tests.helpers.server import EXAMPLE, IN_TURN, WORKER_LISTENS, Serve, Server, run, serving
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with every option that does not get in another's way."""
    env_file = tmp_path_factory.mktemp("env") / "settings.env"
    env_file.write_text("GREETING=from the file\n")
    with serving() as serve:
        yield serve(
            *("--root-path", "/api"),
            *("--header", "X-One: 1", "--header", "X-Two:2"),
            "--no-server-header",
            "--no-date-header",
            "--no-access-log",
            *("--forwarded-allow-ips", "127.0.0.5"),
            *("--timeout-keep-alive", "1"),
            *("--env-file", str(env_file)),
            *("--lifespan", "off"),
            app=FULL,
        )


def test_headers_for_every_response(tuned: Server) -> None:
    headers = tuned.get("/").headers
    assert (headers["x-one"], headers["x-two"]) == ("1", "2")
    assert "server" not in headers
    assert "date" not in headers


def test_root_path(tuned: Server) -> None:
    assert tuned.get("/scope").json()["root_path"] == "/api"


def test_forwarded_headers_of_a_trusted_proxy_and_of_a_stranger(tuned: Server) -> None:
    said = ("X-Forwarded-For: 192.0.2.77", "X-Forwarded-Proto: https")
    with tuned.connect(source="127.0.0.5") as proxy, tuned.connect(source="127.0.0.6") as stranger:
        scope = proxy.ask("GET", "/scope", *said).json()
        assert (scope["client"][0], scope["scheme"]) == ("192.0.2.77", "https")
        scope = stranger.ask("GET", "/scope", *said).json()
        assert (scope["client"][0], scope["scheme"]) == ("127.0.0.6", "http")


def test_an_idle_connection_is_closed_after_the_keep_alive_time(tuned: Server) -> None:
    with tuned.connect() as client:
        assert client.ask("GET", "/").status == 200
        assert client.rest() == b""


def test_lifespan_off_and_no_access_log(tuned: Server) -> None:
    assert tuned.get("/").status == 200
    assert not tuned.found("The application starts in")
    assert not tuned.found("GET /")


def test_the_env_file_reaches_the_application(tuned: Server) -> None:
    environments = [Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0") for worker in tuned.workers]
    assert all(b"GREETING=from the file" in environment for environment in environments)


# ── what is printed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_start_up_is_one_line_per_fact_and_one_per_worker(serve: Serve) -> None:
    server = serve("--lifespan", "off", workers=3, bind=["127.0.0.1:0", "[::1]:0"])
    lines = [line.text for line in server.lines]
    assert len([line for line in lines if "Listening on" in line]) == 2
    assert len([line for line in lines if WORKER_LISTENS.search(line)]) == 3
    # Besides these: how many workers and why, the policy, the master's pid.
    others = [line for line in lines if "Listening on" not in line and not WORKER_LISTENS.search(line)]
    assert len(others) <= 3, others
    facts = "\n".join(others)
    for fact in (r"\b3 workers\b", r"--workers", r"\brr\b", rf"\b{server.pid}\b"):
        assert re.search(fact, facts), facts
    assert {line.stream for line in server.lines} == {"err"}


def test_the_access_log_is_on_stdout(serve: Serve) -> None:
    server = serve()
    with server.connect(source="127.0.0.8") as client:
        assert client.ask("GET", "/whoami?a=b").status == 200
        port = client.port
    [match] = server.wait_for(r"GET /whoami")
    assert match.string == f'INFO:     127.0.0.8:{port} - "GET /whoami?a=b HTTP/1.1" 200 OK'
    assert {line.stream for line in server.lines if "GET /whoami" in line.text} == {"out"}


def test_log_level_warning_is_silent(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = serve("--log-level", "warning", ready=False, bind=f"unix:{path}")
    # Nothing tells that it listens, save that it answers.
    eventually(lambda: proc.unix_inodes(str(path)), "it listens")
    assert fetch(Address.parse(f"unix:{path}"), "/").status == 200
    assert server.stop() == 0
    assert server.lines == []


@pytest.mark.parametrize("kind", ["json", "ini"])
def test_a_log_config_made_for_uvicorn(serve: Serve, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"log.{kind}"
    if kind == "json":
        file.write_text(
            json.dumps(
                {
                    "version": 1,
                    "disable_existing_loggers": False,
                    "formatters": {"marked": {"format": "MARKED %(name)s %(message)s"}},
                    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "marked"}},
                    "loggers": {"uvicorn": {"handlers": ["out"], "level": "INFO", "propagate": False}},
                }
            )
        )
    else:
        file.write_text(
            "[loggers]\nkeys=root,uvicorn\n[handlers]\nkeys=out\n[formatters]\nkeys=marked\n"
            "[logger_root]\nlevel=WARNING\nhandlers=\n"
            "[logger_uvicorn]\nlevel=INFO\nhandlers=out\nqualname=uvicorn\npropagate=0\n"
            "[handler_out]\nclass=StreamHandler\nformatter=marked\nargs=(sys.stderr,)\n"
            "[formatter_marked]\nformat=MARKED %(name)s %(message)s\n"
        )
    server = serve("--log-config", str(file))
    assert server.get("/").status == 200
    server.wait_for("MARKED uvicorn.error The application starts in worker 1")
    server.wait_for("MARKED uvicorn.access .*GET /")


# ── policies of one's own ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_policy_of_ones_own(serve: Serve) -> None:
    server = serve("--policy", "tests.helpers.policies:Newest", *IN_TURN, workers=3)
    youngest = max(worker.id for worker in server.workers)
    eventually(lambda: server.ask_id() == youngest, "the youngest worker serves")
    assert [server.ask_id() for _ in range(10)] == [youngest] * 10


def test_a_policy_that_raises_is_told_once_and_rr_decides(serve: Serve) -> None:
    server = serve("--policy", "tests.helpers.policies:Raises", workers=2, noise=True)
    server.warm()
    assert [server.get("/").status for _ in range(10)] == [200] * 10
    assert len(server.found(r"^LookupError: the policy's own trouble")) == 1


def test_a_class_that_is_no_policy() -> None:
    finished = run(EXAMPLE, "--policy", "tests.helpers.policies:NoPolicy", "--bind", "127.0.0.1:0")
    assert finished.code == 2
    assert len(finished.err.splitlines()) == 1
    assert "tests.helpers.policies:NoPolicy" in finished.err
