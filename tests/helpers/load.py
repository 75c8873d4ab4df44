"""Clients under load that never lie: raw sockets that check every byte of every response, and every close."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from tests.helpers.apps.full import pattern
from tests.helpers.raw import Address, Client, request
from tests.helpers.waiting import eventually

_LONGEST = 200_000
_PATTERN = pattern(_LONGEST)
#: Between two requests of a client (seconds): enough that workers can start beside it on two cores.
_PAUSE = 0.015


@final
@dataclass
class Load:
    """Some clients that ask one request after the other until they are told to end."""

    address: Address
    faults: list[str] = field(default_factory=list)
    #: Answers so far, of clients that keep their connection and of those that do not.
    kept: int = 0
    closed: int = 0
    #: Connections that were closed while nobody had asked anything: what HTTP allows, and we promise not to do.
    dropped: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def keep_alive(self, number: int) -> None:
        """One connection for all requests."""
        with Client(self.address) as client:
            while not self._over.is_set():
                if client.has_something():
                    self.dropped += 1
                    raise AssertionError("an idle connection was closed, or spoke unasked")
                self._ask(client, number, self.kept)
                self.kept += 1
                self._over.wait(_PAUSE)

    def pipeline(self, number: int) -> None:
        """One connection, several requests at once, of which the last is not whole when the others are answered."""
        turn = 0
        with Client(self.address) as client:
            while not self._over.is_set():
                turn += 1
                sizes = [(number * 31 + turn * 7 + step * 1009) % 30_000 for step in range(1 + turn % 4)]
                data = b"".join(request("GET", f"/bytes?n={size}") for size in sizes)
                # From "all but the last byte" to "nothing but the first", the latter across several requests.
                cut = 1 + turn * 37 % (len(data) - 1)
                client.send(data[:cut])
                if turn % 2:
                    client.send(data[cut:])
                whole = data[:cut].count(b"\r\n\r\n")
                for position, size in enumerate(sizes):
                    if position == whole and not turn % 2:
                        client.send(data[cut:])
                    answer = client.response()
                    assert (answer.status, answer.body) == (200, _PATTERN[:size]), f"request {position} of {sizes}"
                self.kept += 1
                self._over.wait(_PAUSE)

    def close(self, number: int) -> None:
        """A connection for each request."""
        while not self._over.is_set():
            with Client(self.address) as client:
                self._ask(client, number, self.closed, "Connection: close")
                assert client.rest() == b"", "more than the response"
            self.closed += 1
            self._over.wait(_PAUSE)

    def _ask(self, client: Client, number: int, turn: int, *headers: str) -> None:
        # Every request is another, so that a response that belongs to somebody else's is seen.
        size = (number * 7919 + turn * 104_729) % (_LONGEST if turn % 10 == 0 else 2000)
        if turn % 3 == 0:
            body = _PATTERN[:size]
            data = request("POST", "/echo", *headers, body=body)
            cut = len(data) - size // 2
            client.send(data[:cut])
            client.send(data[cut:])
        else:
            body = _PATTERN[:size]
            client.send(request("GET", f"/bytes?n={size}", *headers))
        answer = client.response()
        assert answer.status == 200, f"{answer.status}: {answer.body[:200]!r}"
        assert answer.body == body, f"{len(answer.body)} bytes that are not the {size} asked for"

    def answered(self, more: int) -> None:
        """Wait until each kind of client has had `more` answers."""
        kept, closed = self.kept, self.closed

        def enough() -> bool:
            return bool(self.faults) or (self.kept >= kept + more and self.closed >= closed + more)

        eventually(enough, f"{more} more answers for clients of both kinds")
        assert self.faults == []

    def run(self, kind: str, number: int) -> None:
        try:
            getattr(self, kind)(number)
        except (AssertionError, OSError, EOFError, ValueError) as exc:
            self.faults.append(f"{kind} client {number}: {type(exc).__name__}: {exc}")

    def end(self) -> None:
        self._over.set()


@contextmanager
def under_load(address: Address, *, clients: int = 3) -> Iterator[Load]:
    """So many clients of each kind inside the block; none of them may have met a fault."""
    load = Load(address)
    threads = [
        threading.Thread(target=load.run, args=(kind, number))
        for kind in ("keep_alive", "pipeline", "close")
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        load.answered(5)
        yield load
    finally:
        load.end()
        for thread in threads:
            thread.join()
    assert load.faults == []
