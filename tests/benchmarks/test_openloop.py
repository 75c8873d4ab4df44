"""The open-loop client against servers that do one thing each: what it counts is what happened."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from benchmarks import openloop
from benchmarks.openloop import Outcome, Style
from benchmarks.schedule import Schedule
from tests.helpers.waiting import DEADLINE

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSES = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno"
SCHEDULE = Schedule((0.0, 0.01, 0.02, 0.03), (0.0, 0.0, 0.0, 0.0))


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextlib.contextmanager
def served(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that does `serve` with each connection, one after the other; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                client, _ = listener.accept()
                client.settimeout(DEADLINE)
                with client, contextlib.suppress(ConnectionError):
                    if not client.recv(65536):
                        return
                    serve(client)

        thread = threading.Thread(target=run)
        thread.start()
        port: int = listener.getsockname()[1]
        try:
            yield port
        finally:
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def outcome(serve: Callable[[socket.socket], None], style: Style, schedule: Schedule = SCHEDULE) -> Outcome:
    with served(serve) as port:
        return openloop.run(port, schedule, style, "1")


def keeps(client: socket.socket) -> None:
    client.sendall(OK)
    while client.recv(65536):
        client.sendall(OK)


def resets(client: socket.socket) -> None:
    reset(client)


def says_nothing(client: socket.socket) -> None:
    client.recv(1)


SAYS = {
    "early EOF": lambda client: None,
    "partial response": lambda client: client.sendall(OK[:-1]),
    "clean 502": lambda client: client.sendall(BAD_GATEWAY),
    "status 500": lambda client: client.sendall(CLOSES.replace(b"200", b"500")),
    "reset": resets,
}


def test_everything_answered_over_one_connection() -> None:
    # So far apart that none has to wait for the one before, which would have another connection opened.
    found = outcome(keeps, Style(keep_alive=True, pool=1), Schedule((0.0, 0.5), (0.0, 0.0)))
    assert len(found.answered) == 2
    assert (found.failed, found.opened, found.closed_idle) == (0, 1, 0)
    assert all(0 < latency < DEADLINE for latency in found.answered)
    assert len(found.lateness) == 2


def test_everything_answered_over_connections_of_their_own() -> None:
    found = outcome(lambda client: client.sendall(CLOSES), Style(keep_alive=False))
    assert (len(found.answered), found.failed, found.opened) == (4, 0, 4)


def test_a_body_in_a_segment_of_its_own() -> None:
    bodies = []

    def serve(client: socket.socket) -> None:
        # `served` has read the head, and nothing but the head.
        bodies.append(client.recv(65536))
        client.sendall(CLOSES)

    style = Style(keep_alive=False, method="POST", body=b"body", body_seconds=0.1)
    # One alone: a second one's body would come while the server still serves the first.
    found = outcome(serve, style, Schedule((0.0,), (0.0,)))
    assert bodies == [b"body"]
    assert found.answered[0] >= 0.1


@pytest.mark.parametrize("kind", SAYS)
def test_failures_by_kind(kind: str) -> None:
    found = outcome(SAYS[kind], Style(keep_alive=False))
    assert dict(found.failures) == {kind: 4}
    assert found.answered == []


def test_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = openloop.run(port, SCHEDULE, Style(keep_alive=False), "1")
    assert dict(found.failures) == {"refused": 4}


def test_nothing_within_the_time() -> None:
    found = outcome(says_nothing, Style(keep_alive=False, timeout=0.2))
    # The server serves one after the other: whoever waits for its turn has waited too long as well.
    assert dict(found.failures) == {"timeout": 4}
