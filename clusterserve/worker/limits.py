"""uvicorn's HTTP protocols with limits: for the head of a request (`core.head`), and for the pauses of its body.

Relied upon of httptools' protocol, besides what `protocols.py` names: an exception in a callback of the parser ends in
`send_400_response`, `url` and `headers` are what the parser has found so far, of the newest request, and `scope` is a
new one for each.  Of h11's: an `h11.RemoteProtocolError` from `conn.next_event` ends there too, `trailing_data` is what
no event has been made of.

What a request that fits into one read costs is two comparisons: this is the hot path.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, NamedTuple

import h11

from ..core.glance import glance
from ..core.head import LONG_LINE, MANY_FIELDS, NO_LIMITS, Excess, HeadLimits
from .deadline import Lingering
from .refusals import UVICORNS, Refusals

logger = logging.getLogger("uvicorn.error")

#: How often is looked at bodies in the time a pause may take.
BODY_LOOKS: Final = 4

_LATE: Final = b"The body of the request took too long"
BODY_TIMEOUT: Final = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%b"
) % (len(_LATE), _LATE)


#: What uvicorn answers, as far as the access log tells it.
BAD_REQUEST: Final = b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b"


class _Pause(NamedTuple):
    """Nothing of a body has come since `looks` looks ago, when so much had."""

    arrivals: int
    looks: int


class _Limited:
    """Common to both: over uvicorn's class, whichever it is."""

    limits = NO_LIMITS
    refusals: Refusals = UVICORNS
    #: Within a request that has begun and has not been read to its end.
    _reading: Any = False
    #: Reads that brought something of a body.
    _arrivals = 0
    _pause: _Pause | None = None
    _refused: Excess | None = None
    transport: Any
    cycle: Any
    flow: Any
    loop: Any

    def refuse(self, excess: Excess) -> None:
        """Answer, and end the connection without resetting what the client has not read."""
        logger.warning("%s, answered %d", excess.what, excess.status)
        if not self.transport.is_closing():
            # A line that is too long would be too long for the log.
            self.refusals.of_head(glance(b"") if excess is LONG_LINE else self._asked(), self, excess.answer)
        self._end(excess.answer, "the head of a request is too large")

    def _end(self, answer: bytes, why: str) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            Lingering(self.loop, self.transport, why)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser has failed."""
        if self._refused is not None:
            self.refuse(self._refused)
        elif self._failed_in_body():
            self._body_is_bad(msg)
        else:
            super().send_400_response(msg)  # type: ignore[misc]
            self._head_is_bad(BAD_REQUEST % (len(msg), msg.encode()))

    def _body_is_bad(self, msg: str) -> None:
        cycle = self.cycle
        if cycle.response_started:
            # An answer would be taken for a part of the response, or for the next one.
            self._end(b"", "the body of a request is invalid")
            return
        self.refusals.of_body(cycle, BAD_REQUEST % (len(msg), msg.encode()))
        super().send_400_response(msg)  # type: ignore[misc]
        # The application must not answer as well before it learns that the connection is closed.
        cycle.disconnected = True

    def _within_body(self) -> bool:
        raise AssertionError("defined by the subclass")

    def _failed_in_body(self) -> bool:
        """Whether what the parser has found to be wrong is a body's."""
        raise AssertionError("defined by the subclass")

    def _asked(self) -> dict[str, Any]:
        """What is known of the request whose head has begun, as `glance` tells it."""
        raise AssertionError("defined by the subclass")

    def _head_is_bad(self, answer: bytes) -> None:
        """It was answered so: tell the access log."""
        self.refusals.of_head(self._asked(), self, answer)

    def look_at_body(self) -> None:
        """Called `BODY_LOOKS` times in the time a body may pause."""
        cycle = self.cycle
        # Who is not read from, or was not told to go on, is not the one we wait for.
        if cycle is None or not self._within_body() or self.flow.read_paused or cycle.waiting_for_100_continue:
            self._pause = None
        elif self._pause is None or self._pause.arrivals != self._arrivals:
            self._pause = _Pause(self._arrivals, 0)
        else:
            self._pause = _Pause(self._arrivals, self._pause.looks + 1)
            # The first look came after it had begun, by up to a quarter: a pause is never ended early.
            if self._pause.looks == BODY_LOOKS:
                self._body_is_late(cycle)

    def _body_is_late(self, cycle: Any) -> None:
        logger.warning(
            "The body of a request has paused for too long, %s", "closed" if cycle.response_started else "answered 408"
        )
        self._give_up(BODY_TIMEOUT)

    def _give_up(self, answer: bytes) -> None:
        """In the midst of a body: answer, if that is still to be done, and end the connection."""
        cycle = self.cycle
        if not cycle.response_started and not self.transport.is_closing():
            self.refusals.of_body(cycle, answer)
        begun, cycle.disconnected = cycle.response_started, cycle.disconnected or not cycle.response_complete
        self._end(b"" if begun else answer, "the body of a request was given up")


def limited_httptools(base: Any) -> Any:
    """uvicorn's httptools protocol, with limits."""
    # Called by name: `super()` costs as much as all that is added here.
    begin, head_complete, complete, receive = (
        getattr(base, name)
        for name in ("on_message_begin", "on_headers_complete", "on_message_complete", "data_received")
    )

    class LimitedHttpTools(_Limited, base):  # type: ignore[misc]  # whichever it is
        #: A line or a field of a head in the bytes that are read may be too large.
        _wide = False
        #: The head that is not at its end, and how much there is of its last field so far.
        _unfinished: object = None
        _last = 0
        #: Its first line is at its end.
        _line_whole = False
        #: What was answered to a head of which the parser makes nothing, as long as the access log does not know.
        _answered_bad: bytes | None = None

        def on_message_begin(self) -> None:
            self._reading = True
            begin(self)

        def on_headers_complete(self) -> None:
            if self._wide or len(self.headers) > self._most_fields:
                line = len(self.parser.get_method()) + len(self.url) + len(" / HTTP/1.1") - 1
                self._refused = self.limits.excess(line, self.headers)
                self._unfinished = None
                if self._refused is not None:
                    self._line_whole = True
                    raise ValueError(self._refused.what)
            head_complete(self)

        def on_message_complete(self) -> None:
            complete(self)
            self._reading = False

        def data_received(self, data: bytes) -> None:
            if len(data) > self._harmless or self._unfinished is not None:
                # Not written for every request: an attribute more, and the instance's are found much more slowly.
                self._wide = True
                receive(self, data)
                self._wide = False
            else:
                receive(self, data)
            if self._reading:
                self._unread(data)

        def _within_body(self) -> bool:
            return self._reading and self._head_begun() is None

        def _head_begun(self) -> object:
            """What stands for the request whose head has begun and is not complete; None if there is none."""
            if not self._reading or (self.cycle is not None and self.cycle.scope is self.scope):
                return None
            return self.scope

        def _failed_in_body(self) -> bool:
            return self._within_body()

        def _head_is_bad(self, answer: bytes) -> None:
            # What was asked may stand in the bytes that are read.
            self._answered_bad = answer

        def _asked(self) -> dict[str, Any]:
            line = (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            asked = glance(b"%b %b HTTP/%b\r\n" % line if self._line_whole else b"")
            if asked["method"]:
                asked["headers"] = self.headers
            return asked

        def _sees_line(self, data: bytes) -> bool:
            """Whether the first line of the head stands in the bytes that are read, or stood in those before."""
            known = self._line_whole and self._unfinished is self.scope
            # Not any line: it may be another request's.
            return known or b" %b HTTP/" % self.url in data

        def _unread(self, data: bytes) -> None:
            """The request is not at its end; nor, maybe, is its head, which must not grow without end."""
            if self._answered_bad is not None:
                self._line_whole = self._sees_line(data)
                super()._head_is_bad(self._answered_bad)
                self._answered_bad = None
            if self.transport.is_closing() or self.parser is None:
                return
            head, newline = self._head_begun(), data.rfind(b"\n")
            if head is None:
                self._arrivals += 1
                if len(self.headers) > self._most_fields:
                    # Trailers join the fields of the head.
                    self._give_up(MANY_FIELDS.answer)
                return
            self._line_whole = self._sees_line(data) or (newline >= 0 and head is self._unfinished)
            if newline >= 0:
                self._last = len(data) - newline - 1
            elif head is not self._unfinished:
                # It is its first line that is not at its end.
                self._last = 0
            elif self._last or self.headers:
                self._last += len(data)
            self._unfinished = head
            excess = self.limits.excess_so_far(len(self.url), len(self.headers), self._last)
            if excess is not None:
                self.refuse(excess)

    return LimitedHttpTools


class _LimitedConnection(h11.Connection):
    """h11's connection, with limits."""

    limits = NO_LIMITS
    refused: Excess | None = None
    failed_in_body = False

    def next_event(self) -> Any:
        within = self.their_state is h11.IDLE
        try:
            event = super().next_event()
        except h11.RemoteProtocolError:
            self.failed_in_body = self.failed_in_body or not within
            raise
        if within and type(event) is h11.Request:
            line = len(event.method) + len(event.target) + len("  HTTP/1.1")
            self.refused = self.limits.excess(line, [*event.headers])
        elif within and event is h11.NEED_DATA:
            self.refused = self.limits.excess_of_raw(self.trailing_data[0])
        if self.refused is not None:
            raise h11.RemoteProtocolError(self.refused.what, error_status_hint=self.refused.status)
        return event


def limited_h11(base: Any) -> Any:
    """uvicorn's h11 protocol, with limits."""

    class LimitedH11(_Limited, base):  # type: ignore[misc]  # whichever it is
        conn: _LimitedConnection
        #: What is being read: h11 forgets a head of which it makes nothing.
        _data = b""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            own = type("Connection", (_LimitedConnection,), {"limits": self.limits})
            self.conn = own(h11.SERVER, self.conn._max_incomplete_event_size)

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.MUST_CLOSE:
                # Behind a request that was told to be the last one, or said so itself.  h11 would call it an error, and
                # uvicorn answer it in the midst of that one's response.
                return
            self._data = data
            super().data_received(data)
            self._data = b""
            if self._within_body():
                self._arrivals += 1

        def send_400_response(self, msg: str) -> None:
            self._refused = self.conn.refused
            super().send_400_response(msg)

        def _within_body(self) -> bool:
            return self.conn.their_state is h11.SEND_BODY

        def _failed_in_body(self) -> bool:
            return self.conn.failed_in_body

        def _asked(self) -> dict[str, Any]:
            asked = glance(self._data)
            if not asked["method"] and self.conn.their_state is h11.IDLE:
                # Not behind a head that was wrong: there lies what comes after it.
                asked = glance(self.conn.trailing_data[0])
            return asked

    return LimitedH11


def look_at_bodies(loop: asyncio.AbstractEventLoop, connections: set[Any], timeout: float) -> None:
    """Look now and then: bodies may pause for `timeout` seconds; `connections` are uvicorn's protocols."""
    for protocol in tuple(connections):
        look = getattr(protocol, "look_at_body", None)
        if look is not None:
            look()
    loop.call_later(timeout / BODY_LOOKS, look_at_bodies, loop, connections, timeout)


def with_limits(kind: type[Any], limits: HeadLimits, refusals: Refusals) -> type[Any]:
    """The class with these limits for the head, that tells `refusals` of what it refuses."""
    own = {"limits": limits, "refusals": refusals, "_harmless": limits.harmless, "_most_fields": limits.most_fields}
    return type(kind.__name__, (kind,), own)
