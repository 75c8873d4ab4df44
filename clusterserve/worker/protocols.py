"""uvicorn's HTTP protocols, able to give a connection back when it is idle.

The second file that knows uvicorn, and the only one that knows the insides of its protocols; each of them has a
contract test (tests/worker/test_borrow_contract.py).  Relied upon, of both: `on_response_complete` is called from the
application's task when a response is complete, `shutdown` when the server stops, `cycle` is the newest request (None
before the first), `cycle.response_started`, `cycle.response_complete`, `cycle.keep_alive`, `cycle.default_headers`,
`flow` with `read_paused`, `server_state.total_requests`, `scheme` and `transport` (None before `connection_made`);
`data_received` cancels the timer `timeout_keep_alive_task`, which calls `timeout_keep_alive_handler`;
between two requests neither `cycle` nor `scope` nor `headers` is needed.  Of httptools': `pipeline` holds the requests
that wait, `on_message_begin` and `on_message_complete` enclose a request.  Of h11's: `conn`.

A connection is idle when its last response is complete, the request was read to its end, and nothing beyond it has been
read: what lies unread in the kernel goes to whoever gets the connection next.  A TLS connection is its worker's to the
end: one that leaves waits for a last request, whose response says that it is the last.  Under policy `none` the
transport is the loop's own and cannot give back: everything is uvicorn's then.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final

import h11
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..core.head import NO_LIMITS, HeadLimits
from .limits import limited_h11, limited_httptools, with_limits
from .receiver import HEAD_LOOKS
from .refusals import UVICORNS, Refusals
from .transport import HandedTransport

logger = logging.getLogger("uvicorn.error")

#: How long a client that has closed its side waits for its response to begin (seconds): it may be gone altogether,
#: which looks the same.
HALF_CLOSED: Final = 1.0


REQUEST_TIMEOUT: Final = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 33\r\n"
    b"connection: close\r\n\r\nThe request took too long to come"
)

#: A worker that leaves while others go on closes a TLS connection that asks nothing for so long (seconds).
LAST_CALL: Final = 5.0

#: When the whole cluster stops, one that has never asked anything: its first request may be on its way.  Likewise one
#: that has sent something which this worker has not read.
FIRST_WORD: Final = 0.5

CLOSE: Final = (b"connection", b"close")


@dataclass
class Borrowing:
    """What this worker does with idle connections; shared by all its protocols."""

    #: Let go of a connection after every response (`--dispatch request`, `auto`), or only while the worker drains:
    #: until then uvicorn's own timer ends what is idle.
    after_response: bool = False


def _borrower(base: Any) -> Any:
    """One of uvicorn's protocol classes, able to give back; `_idle` is the only difference between them."""
    receive = base.data_received

    class _Borrower(base):  # type: ignore[misc]  # whichever it is
        borrowing: Borrowing
        cycle: Any
        scope: Any
        headers: Any
        timeout_keep_alive_task: Any
        _late_head: object = None
        _looks = 0
        #: The next response is the last.
        _leaving = False

        def _idle(self) -> bool:
            raise AssertionError("defined by the subclass")

        def _answered(self) -> bool:
            """Whether the newest request, of which there is one, has its response."""
            cycle: Any = self.cycle
            return cycle is not None and bool(cycle.response_complete)

        def give_back(self) -> bool:
            """Give the connection back if it is idle; False if it is not, or cannot be given back."""
            if not self._at_rest():
                return False
            self._unset_keepalive_if_required()
            # The same protocol may get the next request.
            if self.flow.read_paused:
                self.flow.resume_reading()
            self._rest()
            return True

        def _rest(self) -> None:
            # Nothing is left of the request: a connection waits much longer than it is served, and there are many.
            self.cycle = self.scope = self.headers = self._late_head = None
            self.transport.rest()

        def _at_rest(self) -> bool:
            transport = self.transport
            # Not ours any more if it has been upgraded, and is a WebSocket's now.
            return isinstance(transport, HandedTransport) and transport.serves(self) and self._idle()

        def _midway(self) -> bool:
            raise AssertionError("defined by the subclass")

        def look_at_head(self) -> None:
            """Called four times in the time a head may take: end a client that drips, whatever it sends meanwhile."""
            head = None if self.cycle is not None and not self._answered() else self._head_begun()
            begun = head is not None
            if head is None and self.cycle is None and self.scheme == "https":
                # Who says nothing, the master waits for, if he could tell: here it is after the handshake.
                head = self
            if head is None or head is not self._late_head:
                self._late_head, self._looks = head, 0
            else:
                self._looks += 1
                # The first look came after it began, by up to a quarter: a head is never ended early.
                if self._looks == HEAD_LOOKS:
                    if begun:
                        logger.warning("The head of a request took too long to come, answered 408")
                        self.refusals.of_head(self._asked(), self, REQUEST_TIMEOUT)
                        self.transport.write(REQUEST_TIMEOUT)
                    self.transport.close()

        def eof_received(self) -> bool:
            # What a client has asked for before it closed its side is answered, if that begins soon; what it has begun
            # to ask, or already hears (an event stream) is over, as with uvicorn.
            cycle = self.cycle
            # With TLS the event loops know no half of a connection.
            if self.scheme == "https" or cycle is None or cycle.response_started or self._midway():
                return False
            self.loop.call_later(HALF_CLOSED, self._too_late, cycle)
            return True

        def _too_late(self, cycle: Any) -> None:
            if self.cycle is cycle and not cycle.response_started:
                self.transport.close()

        def on_response_complete(self) -> None:
            if self.borrowing.after_response and self.give_back():
                self.server_state.total_requests += 1
            else:
                super().on_response_complete()
                if self._leaving:
                    self._wait_for_the_last()
                if not self.borrowing.after_response and self._at_rest():
                    self._rest()

        def data_received(self, data: bytes) -> None:
            receive(self, data)
            if self._leaving:
                self._make_it_the_last()
            cycle = self.cycle
            if cycle is None or cycle.response_complete:
                self._read_between_requests()

        def _read_between_requests(self) -> None:
            """No request waits for its response: bytes of a head, of a body that comes after it, or an empty line.

            A response may be complete before its request is: the connection goes back when the body has ended.  And an
            empty line begins no request (RFC 9112, 2.2): the connection is as idle as before.
            """
            if self.borrowing.after_response and self.give_back():
                return
            if not self.borrowing.after_response and self._at_rest():
                self._rest()
            elif self.cycle is None:
                # A head has its own time; or it is HTTP no more.
                return
            # Receiving has cancelled uvicorn's timer, and the end of a response, which has come, starts no other.
            transport = self.transport
            if self.timeout_keep_alive_task is None and transport.get_protocol() is self and not transport.is_closing():
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

        def shutdown(self) -> None:
            # With `after_response` set, a request in flight gives its connection back at its end.
            if not isinstance(self.transport, HandedTransport):
                super().shutdown()
            elif self.scheme == "https":
                self._say_goodbye()
            elif self.borrowing.after_response:
                self.give_back()
            elif self.cycle is not None and not self._answered():
                # uvicorn would end the connection behind it all the same, without a word.
                self._make_it_the_last()
            elif self._asks_again():
                self._leaving = True
                self.loop.call_later(FIRST_WORD, self._close_if_silent, self.cycle)
            else:
                super().shutdown()

        def _asks_again(self) -> bool:
            """Whether an idle connection's next request is there, though this worker, which held its loop, has not
            come to read it."""
            return (self.cycle is None or self._answered()) and bool(self.transport.has_unread)

        def _say_goodbye(self) -> None:
            self._leaving = True
            if self.cycle is not None and not self._answered():
                self._make_it_the_last()
            elif self.borrowing.after_response:
                self._wait_for_the_last()
            elif self.cycle is None or self._asks_again():
                self.loop.call_later(FIRST_WORD, self._close_if_silent, self.cycle)
            else:
                super().shutdown()

        def _make_it_the_last(self) -> None:
            cycle = self.cycle
            if cycle is None or cycle.response_complete:
                return
            if not cycle.response_started:
                cycle.keep_alive = False
                if CLOSE not in cycle.default_headers:
                    # The list is everybody's.
                    cycle.default_headers = [*cycle.default_headers, CLOSE]
            elif not self.borrowing.after_response:
                # The cluster stops, and cannot wait for more.
                cycle.keep_alive = False
            # Else it has not said so, and the next request may be on its way already: that is the last, if it comes.

        def _wait_for_the_last(self) -> None:
            if self._answered() or self.cycle is None:
                if not self.transport.is_closing():
                    self.loop.call_later(LAST_CALL, self._close_if_silent, self.cycle)
            else:
                # It was sent on the heels of the one before.
                self._make_it_the_last()

        def _close_if_silent(self, cycle: Any) -> None:
            if self.cycle is cycle:
                self.transport.close()

    return _Borrower


LimitedHttpTools: Any = limited_httptools(HttpToolsProtocol)
LimitedH11: Any = limited_h11(H11Protocol)


class BorrowingHttpTools(_borrower(LimitedHttpTools)):  # type: ignore[misc]
    """uvicorn's httptools protocol."""

    def _idle(self) -> bool:
        cycle: Any = self.cycle
        return not self._reading and not self.pipeline and (cycle is None or cycle.response_complete)

    def _midway(self) -> bool:
        return bool(self._reading)


class BorrowingH11(_borrower(LimitedH11)):  # type: ignore[misc]
    """uvicorn's h11 protocol."""

    conn: h11.Connection

    def _idle(self) -> bool:
        cycle: Any = self.cycle
        if cycle is not None and not self._answered():
            return False
        states = (self.conn.our_state, self.conn.their_state)
        # Nothing of the next request is buffered.
        return states in ((h11.IDLE, h11.IDLE), (h11.DONE, h11.DONE)) and not self.conn.trailing_data[0]

    def _rest(self) -> None:
        if self.conn.our_state is h11.DONE:
            # Make the parser ready for the next request.
            self.conn.start_next_cycle()
        super()._rest()

    def _midway(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _head_begun(self) -> object:
        """As httptools' has it, in `limits`."""
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        return (self.cycle or self) if begun else None


def http_protocol(
    name: str, borrowing: Borrowing | None, limits: HeadLimits = NO_LIMITS, refusals: Refusals = UVICORNS
) -> type[asyncio.Protocol] | str:
    """The class for uvicorn's `--http` with limits, that gives back if it may be `borrowing`.

    `name` itself if it is none of ours to extend.
    """
    if name == "auto":
        name = "httptools" if AutoHTTPProtocol is HttpToolsProtocol else "h11"
    kinds: dict[str, tuple[Any, Any]] = {
        "httptools": (LimitedHttpTools, BorrowingHttpTools),
        "h11": (LimitedH11, BorrowingH11),
    }
    if name not in kinds:
        return name
    kind = with_limits(kinds[name][borrowing is not None], limits, refusals)
    return kind if borrowing is None else type(kind.__name__, (kind,), {"borrowing": borrowing})
