"""The access log of the master's own answers, with the dispatcher that gives them and clients of its own."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from clusterserve.core.records import Kind
from clusterserve.log_files import Descriptors
from clusterserve.logs import answer_logger
from clusterserve.master.answered import AnswerLog
from clusterserve.settings import Settings

from .rig import Rig

REQUEST = b"GET /a%20b?c=d HTTP/1.1\r\nHost: x\r\nX-Request-ID: an-id\r\n\r\n"
FORMAT = '%(h)s "%(r)s" %(s)s %(B)s %({retry-after}o)s %({clusterserve.request_id}e)s %({clusterserve.worker}e)s'
SETTINGS = Settings.create(app="a:b")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def told(rig: Rig, lines: list[str]) -> Rig:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("a")  # noqa: LOG001
    logger.addHandler(Lines())
    rig.dispatcher.on_answer = AnswerLog(logger, FORMAT).answered
    return rig


def test_who_is_turned_away_has_asked_for_something(told: Rig, lines: list[str]) -> None:
    listener = told.listen(client_speaks_first=True)
    client = told.connect(listener, REQUEST)
    told.queued(1)
    told.dispatcher.expect_no_workers()
    assert client.recv(65536).startswith(b"HTTP/1.1 503")
    assert lines == ['127.0.0.1 "GET /a%20b?c=d HTTP/1.1" 503 30 1 an-id -']


def test_what_a_worker_has_read_is_gone_with_it(told: Rig, lines: list[str]) -> None:
    listener = told.listen("[::1]:0", client_speaks_first=True)
    worker = told.worker(listener)
    client = told.connect(listener, REQUEST + b"GET /next HTTP/1.1\r\n\r\n")
    (offer,) = worker.receive()
    offer.sock.recv(len(REQUEST))
    worker.die()
    assert client.recv(65536).startswith(b"HTTP/1.1 502")
    assert lines == ['::1 "-" 502 46 - - -']


def test_a_client_without_an_address(told: Rig, lines: list[str], tmp_path: Path) -> None:
    listener = told.listen(f"unix:{tmp_path}/s", client_speaks_first=True)
    told.connect(listener, REQUEST)
    told.queued(1)
    told.dispatcher.expect_no_workers()
    assert lines == ['- "GET /a%20b?c=d HTTP/1.1" 503 30 1 an-id -']


def test_who_hears_nothing_of_us_is_not_told_of(told: Rig, lines: list[str]) -> None:
    """Within TLS, and where a response was begun: there is no answer of ours."""
    tls = told.listen(client_speaks_first=True, tls=True)
    told.connect(tls, b"\x16\x03\x01")
    told.queued(1)
    plain = told.listen(client_speaks_first=True)
    worker = told.worker(plain)
    told.connect(plain, REQUEST)
    (offer,) = worker.receive()
    offer.sock.recv(65536)
    offer.sock.sendall(b"HTTP/1.1 200 OK\r\n")
    worker.answer(Kind.ACK, offer.id)
    told.loop.until(lambda: worker.record.borrowed, "it is acknowledged")
    worker.die()
    told.dispatcher.expect_no_workers()
    assert told.distributor.queued == 0
    assert lines == []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"log_level": "warning"}, False),
        ({"access_log": False}, False),
        ({"app": "", "exec": "a.py"}, False),
        ({"log_level": "trace", "log_format": "json"}, True),
    ],
)
def test_who_wants_it(changes: dict[str, object], wanted: bool) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    before = [*logging.getLogger("uvicorn.access").handlers]
    assert (AnswerLog.of(settings, Descriptors()) is not None) is wanted
    # Another program's loggers stay as they are.
    assert logging.getLogger("uvicorn.access").handlers == before


def test_a_log_config_says_where(caplog: pytest.LogCaptureFixture) -> None:
    settings = dataclasses.replace(SETTINGS, log_config="c.ini")
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        assert answer_logger(settings, Descriptors()) is logging.getLogger("uvicorn.access")
    with caplog.at_level(logging.WARNING, "uvicorn.access"):
        assert answer_logger(settings, Descriptors()) is None
