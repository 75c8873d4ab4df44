"""What `worker/limits.py` relies on of uvicorn's protocols and their parsers, one test each."""

from __future__ import annotations

from typing import Any

import h11
import httptools
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.helpers.raw import request
from tests.worker.test_borrow_contract import App, Make, Wire, app, kinds, make

__all__ = ["app", "make"]

GET = request("GET", "/path?query", "X-A: b")


def test_an_exception_in_a_callback_of_httptools_ends_in_the_answer_400(make: Make) -> None:
    told: list[str] = []

    def on_headers_complete(self: Any) -> None:
        raise ValueError("too large")

    own = {"on_headers_complete": on_headers_complete, "send_400_response": lambda self, msg: told.append(msg)}
    protocol = make(HttpToolsProtocol, **own)
    protocol.data_received(GET)
    assert len(told) == 1
    assert protocol.cycle is None


def test_httptools_protocol_has_found_so_much_so_far(make: Make) -> None:
    protocol = make(HttpToolsProtocol)
    protocol.data_received(GET[:8])
    assert protocol.url == b"/pat"
    protocol.data_received(GET[8:-4])
    assert protocol.url == b"/path?query"
    # The last field is not at its end, as far as anybody knows.
    assert protocol.headers == [(b"host", b"test")]
    assert protocol.parser.get_method() == b"GET"
    assert issubclass(httptools.HttpParserCallbackError, httptools.HttpParserError)


def test_trailers_join_the_headers_of_httptools_protocol(make: Make) -> None:
    protocol = make(HttpToolsProtocol)
    protocol.data_received(request("POST", "/", "Transfer-Encoding: chunked"))
    protocol.data_received(b"0\r\nX-A: b\r\nX-C: d\r\n")
    assert (b"x-a", b"b") in protocol.headers
    protocol.connection_lost(OSError())


def test_an_error_of_h11s_connection_ends_in_the_answer_400(make: Make) -> None:
    told: list[str] = []

    class Picky(h11.Connection):
        def next_event(self) -> Any:
            raise h11.RemoteProtocolError("too large", error_status_hint=431)

    protocol = make(H11Protocol, send_400_response=lambda self, msg: told.append(msg))
    assert protocol.conn._max_incomplete_event_size > 0
    protocol.conn = Picky(h11.SERVER)
    protocol.data_received(GET)
    assert len(told) == 1


def test_what_no_event_of_h11s_was_made_of_is_trailing_data(make: Make) -> None:
    protocol = make(H11Protocol)
    protocol.data_received(GET[:-4])
    assert protocol.conn.their_state is h11.IDLE
    assert protocol.conn.trailing_data[0] == GET[:-4]


@kinds
async def test_who_waits_for_100_is_known(make: Make, app: App, kind: Any) -> None:
    protocol = make(kind)
    protocol.data_received(request("POST", "/", "Content-Length: 5", "Expect: 100-continue"))
    assert protocol.cycle.waiting_for_100_continue
    assert not protocol.flow.read_paused
    protocol.data_received(b"12345")
    protocol.connection_lost(OSError())


@kinds
async def test_a_disconnected_cycle_hears_so_and_sends_nothing(make: Make, app: App, kind: Any) -> None:
    protocol = make(kind)
    protocol.data_received(request("POST", "/", "Content-Length: 5"))
    wire: Wire = protocol.transport
    protocol.cycle.disconnected = True
    protocol.connection_lost(ConnectionAbortedError())
    assert (await protocol.cycle.receive())["type"] == "http.disconnect"
    await protocol.cycle.send({"type": "http.response.start", "status": 200, "headers": []})
    assert not wire.written


@pytest.mark.parametrize("kind", [H11Protocol, HttpToolsProtocol])
def test_the_class_is_told_the_protocol_on_every_connection(make: Make, kind: Any) -> None:
    protocol = make(kind)
    assert protocol in protocol.server_state.connections
