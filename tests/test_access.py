"""Records of the access log: uvicorn's look, and what other formatters make of ours."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from datetime import datetime

import pytest
from uvicorn.logging import AccessFormatter as Theirs

from clusterserve.access import MESSAGE, AccessFormatter, AccessRecord, Line, request_id
from clusterserve.core.atoms import Template, Who
from clusterserve.core.exchange import Exchange
from clusterserve.json_lines import JsonFormatter

WHO = Who(3, 2, 4711)
UVICORN = '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s'


def exchange(status: int = 200) -> Exchange:
    headers = [(b"user-agent", b"test/1")]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/a b",
        "query_string": b"c=d",
        "client": ("h", 5),
        "headers": headers,
    }
    found = Exchange(scope, "the-id", 0.00012345, 0.0)
    found.status, found.sent, found.service_time = status, 7, 1.5
    return found


@pytest.mark.parametrize("use_colors", [True, False])
@pytest.mark.parametrize("status", [101, 200, 204, 301, 404, 418, 499, 503, 599, 799])
def test_the_same_look_as_uvicorns(status: int, use_colors: bool) -> None:
    theirs = Theirs(UVICORN, use_colors=use_colors)
    args = ("127.0.0.1:5000", "GET", "/a?b=c", "1.1", status)
    for record in (
        logging.LogRecord("uvicorn.access", logging.INFO, "f", 1, MESSAGE, args, None),
        AccessRecord(exchange(status), None),
    ):
        assert AccessFormatter(use_colors).format(record) == theirs.format(record)


def test_a_record_with_a_template_is_its_line_and_still_uvicorns() -> None:
    record = AccessRecord(exchange(), Line(Template("%(t)s %(r)s", WHO)))
    before = time.strftime("[%d/%b/%Y:%H:%M")
    shown = logging.Formatter("%(name)s %(message)s").format(record)
    assert re.fullmatch(r"uvicorn\.access \[.{26}\] GET /a%20b\?c=d HTTP/1\.1", shown)
    assert before <= shown.split()[1][:18] <= time.strftime("[%d/%b/%Y:%H:%M")
    assert Theirs(UVICORN, use_colors=False).format(record) == 'INFO:     h:5 - "GET /a%20b?c=d HTTP/1.1" 200 OK'


def test_a_request_in_json() -> None:
    line = json.loads(JsonFormatter().format(AccessRecord(exchange(404), None)))
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info", "logger": "uvicorn.access", "message": 'h:5 - "GET /a%20b?c=d HTTP/1.1" 404',
        "worker": None, "slot": None, "pid": os.getpid(), "request_id": "the-id", "client": "h:5",
        "method": "GET", "path": "/a b",
        "query": "c=d", "protocol": "HTTP/1.1", "status": 404, "bytes": 7, "queue_time": 0.000123,
        "service_time": 1.5, "referer": None, "user_agent": "test/1",
    }  # fmt: skip


def test_what_nobody_has_read_in_json() -> None:
    """The same keys; nothing is made up."""
    known = json.loads(JsonFormatter().format(AccessRecord(exchange(502), None)))
    found = Exchange({"type": "http", "method": "", "path": "", "headers": [], "client": ("h", 5)}, "", None, 0.0)
    found.status, found.service_time = 502, None
    line = json.loads(JsonFormatter().format(AccessRecord(found, None)))
    assert list(line) == list(known)
    unknown = ("request_id", "method", "path", "query", "protocol", "queue_time", "service_time")
    assert [line[key] for key in unknown] == [None] * 7
    assert (line["client"], line["status"], line["message"]) == ("h:5", 502, 'h:5 - "- - HTTP/1.1" 502')


def test_anything_else_in_json() -> None:
    token = request_id.set("of-the-task")
    try:
        raise RuntimeError("trouble")
    except RuntimeError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "it %s\n\ud800", ("failed",), sys.exc_info())
        record.shop, record.pid, record.color_message = {"id": {1}}, "nobody's", "x"
        text = JsonFormatter().format(record)
    finally:
        request_id.reset(token)
    assert "\n" not in text
    line = json.loads(text)
    assert line.pop("exception").endswith("RuntimeError: trouble")
    line.pop("time")
    # What is no JSON is told as text; what the schema says of itself, nobody else says.
    assert line == {
        "level": "error", "logger": "a", "message": "it failed\n\ud800", "worker": None, "slot": None,
        "pid": os.getpid(), "request_id": "of-the-task", "shop": {"id": "{1}"},
    }  # fmt: skip
