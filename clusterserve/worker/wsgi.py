"""WSGI applications, in threads behind ASGI.

a2wsgi makes the environment (`environ.py`).  Its `WSGIMiddleware` is not used: its thread waits for ever, and is lost,
when a request is cancelled or its response is refused; it goes on with a response whose client has left; and it passes
every part on by a round trip of its own.  Here the thread puts what the application yields into a queue of bounded
size, and the event loop sends it as fast as the client reads.

What PEP 3333 asks of a server and is easily got wrong: the head is not sent before the first bytes that are not empty,
so that `start_response` may be called again with `exc_info`; `close` of the iterable is called whatever happens, in the
context in which the application was called.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Final
from wsgiref.util import is_hop_by_hop

from .body import Body, ClientGoneError
from .environ import environ_of
from .threads import Job, Threads

logger = logging.getLogger("uvicorn.error")

#: The application is held up while so much of its response waits for the client (bytes).
HIGH_WATER: Final = 65536

_READ_AHEAD: Final = 16384

#: No body follows, whatever the application says.
_BODILESS: Final = frozenset({204, 304})

#: What a header's name consists of (RFC 9110), and what its value must not have.
_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
ExcInfo = tuple[type[BaseException], BaseException, TracebackType]


class Bridge:
    """An ASGI application that runs the WSGI application `app` in `threads`."""

    def __init__(self, app: Callable[..., Any], threads: Threads) -> None:
        self.app = app
        self.threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self.app, scope, receive, send, self.threads).run()
        elif scope["type"] == "lifespan":
            # WSGI knows none: whoever asks for it with `--lifespan on` is not to fail for that.
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})


class _Exchange:
    """One request and its response.  What the thread and the loop share is `_parts`, `_waiting` and some flags."""

    def __init__(self, app: Callable[..., Any], scope: Scope, receive: Receive, send: Send, threads: Threads) -> None:
        self._app = app
        self._scope = scope
        self._send = send
        self._threads = threads
        self._job: Job | None = None
        self._loop = asyncio.get_running_loop()
        self._body = Body(self._loop, receive, threads.gets_on)
        # From the thread to the loop, and how many bytes of it the client has not taken.
        self._parts: deque[dict[str, Any]] = deque()
        self._waiting = 0
        self._room = threading.Condition()
        self._news = asyncio.Event()
        self._told = False
        self._gone = False
        self._ended = False
        self._error: BaseException | None = None
        # Of the response, in the thread.
        self._head: dict[str, Any] | None = None
        self._begun = self._complete = False
        self._length: int | None = None
        self._bodiless = False

    # -- on the loop ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Returns when the thread is done; raises what the application has raised."""
        reader = io.BufferedReader(self._body, _READ_AHEAD)
        environ = environ_of(self._scope, reader, several_threads=self._threads.places > 1)
        work = partial(contextvars.copy_context().run, self._work, environ)
        self._job = self._threads.begin(self._loop, work)
        watch: asyncio.Task[None] | None = None
        try:
            while True:
                # First: whoever adds a part from now on will say so.
                self._told = False
                while self._parts:
                    part = self._parts.popleft()
                    await self._send(part)
                    self._threads.gets_on()
                    if part.get("more_body"):
                        self._taken(len(part["body"]))
                        if watch is None:
                            # A response that may go on for ever ends when its client does.
                            watch = self._loop.create_task(self._watch())
                if self._ended and not self._parts:
                    break
                await self._news.wait()
                self._news.clear()
        finally:
            self._abandon()
            if watch is not None:
                watch.cancel()
        error, self._error = self._error, None
        if error is not None and not self._complete:
            raise error
        if error is not None:
            # The client has its answer, and its connection may be serving the next request.
            logger.error("Exception in WSGI application, after its response\n", exc_info=error)

    def _taken(self, size: int) -> None:
        with self._room:
            self._waiting -= size
            self._room.notify()

    async def _watch(self) -> None:
        if await self._body.watch():
            self._abandon()

    def _abandon(self) -> None:
        """Nobody wants the rest: the thread hears of it when it next writes."""
        with self._room:
            self._gone = True
            self._room.notify()
        # Work behind a complete response is nobody's request any more, and no fault.
        if self._job is not None and not self._ended and not self._complete:
            self._threads.give_up(self._job)

    # -- in the thread --------------------------------------------------------------------------------------------

    def _work(self, environ: dict[str, Any]) -> None:
        try:
            self._respond(environ)
        except ClientGoneError:
            # An application that does not care is not to blame.
            pass
        except BaseException as exc:  # noqa: BLE001 - raised again where the server logs it
            self._error = exc
        finally:
            self._ended = True
            self._tell()

    def _respond(self, environ: dict[str, Any]) -> None:
        iterable: Iterable[bytes] = self._app(environ, self._start_response)
        try:
            for data in iterable:
                self._write(data)
            self._finish()
        finally:
            close = getattr(iterable, "close", None)
            if close is not None:
                close()

    def _start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        if exc_info is not None:
            try:
                if self._begun:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # it refers to this frame
        elif self._head is not None:
            raise RuntimeError("the application has called start_response twice, the second time without exc_info")
        code = int(status.partition(" ")[0])
        for name, value in headers:
            # The server would refuse the head when it is too late to tell the application, or the client.
            if not _NAME.fullmatch(name) or _CONTROL.search(value):
                raise ValueError(f"a header cannot be sent: {name!r}: {value!r}")
        lengths = [int(value) for name, value in headers if name.lower() == "content-length"]
        self._bodiless = self._scope["method"] == "HEAD" or code in _BODILESS
        self._length = lengths[0] if lengths and not self._bodiless else None
        self._head = {
            "type": "http.response.start",
            "status": code,
            "headers": [
                (name.lower().encode("latin1"), value.strip().encode("latin1"))
                for name, value in headers
                # The connection is the server's; but that it should end, the application may know.  A length that is
                # not that of what follows would be waited for.
                if name.lower() == "connection"
                or not (is_hop_by_hop(name) or (code in _BODILESS and name.lower() == "content-length"))
            ],
        }
        return self._write

    def _write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            raise TypeError(f"a WSGI application's response consists of bytes, and this is {type(data).__name__}")
        if not data or self._complete:
            return
        self._begin()
        if self._bodiless:
            # The client would take it for the next response.
            self._finish()
            return
        if self._length is not None:
            # More than was promised would be read as the next response.
            data = data[: self._length]
            self._length -= len(data)
            # The client need not wait for the application to notice that this was all.
            self._complete = not self._length
        self._put({"type": "http.response.body", "body": data, "more_body": not self._complete})

    def _finish(self) -> None:
        if not self._complete:
            self._begin()
            self._complete = True
            self._put({"type": "http.response.body", "body": b"", "more_body": False})

    def _begin(self) -> None:
        if self._head is None:
            raise RuntimeError("the application has not called start_response")
        if not self._begun:
            self._begun = True
            # Said together with what follows.
            self._parts.append(self._head)

    def _put(self, part: dict[str, Any]) -> None:
        if self._gone:
            raise ClientGoneError("the client has left, or the request was ended")
        with self._room:
            self._waiting += len(part["body"])
        self._parts.append(part)
        self._tell()
        if part["more_body"]:
            with self._room:
                self._room.wait_for(lambda: self._gone or self._waiting <= HIGH_WATER)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._news.set)
            except RuntimeError:
                # The loop is closed, and the worker about to end.
                self._gone = True
