"""Where this worker's own transports wait for their clients: epolls, nested in the event loop.

`busy` is this process's alone and has those in the midst of a request: for the rest of a body, or to notice that the
client has left.  Where a connection is for one worker (`--dispatch connection`), it has those between two requests as
well, and an entry stays armed.

Where connections are borrowed, `kept` has those between two requests.  The master made it and holds it too: an entry is
one-shot, so the kernel gives what is ready to whoever asks first, and nobody else.  That is how the master takes back
the requests behind a handler that holds the loop.  An entry outlives our descriptor, because the master has a copy of
it: whatever is closed is taken out first.

Every call that adds an entry may raise OSError: the kernel bounds how many a user may have.
"""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .lazy import LazyTransport
    from .receiver import Receiver

_ARMED: Final = select.EPOLLIN | select.EPOLLRDHUP


class Watch:
    """The epolls and who waits in them.  Owns both (`kept` is a copy of the master's; None if it has none)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kept: select.epoll | None, receiver: Receiver) -> None:
        self._loop = loop
        self._receiver = receiver
        #: Whether the master may take back those between two requests.
        self.shared = kept is not None
        #: How many requests are begun at once: those cannot be taken back, and what is offered waits for them.
        self.claims = 1
        self._busy = select.epoll()
        # Without a `kept` nobody calls for it.
        self._kept = kept or self._busy
        self._waiting: dict[int, LazyTransport] = {}
        self._armed = _ARMED | select.EPOLLONESHOT if self.shared else _ARMED
        loop.add_reader(self._busy.fileno(), self._look)
        if self.shared:
            loop.add_reader(self._kept.fileno(), self._claim)

    def __len__(self) -> int:
        """How many connections wait here, or have waited and are served now."""
        return len(self._waiting)

    def _claim(self) -> None:
        events = self._kept.poll(0, self.claims)
        if events:
            self._receiver.begin_turn(len(events), weighed=True)
            for fd, _ in events:
                self._waiting[fd].claimed()
            self._receiver.end_batch()

    def claim_all(self) -> None:
        """Every next request that has come by now is this worker's, read or not."""
        if self.shared:
            self.claims = max(self.claims, len(self._waiting))
            self._claim()

    def _look(self) -> None:
        # Shared, they are of requests in progress.  Else of those between two as well: an offer is read once a turn,
        # and must not wait for all of them each time.
        weighed = not self.shared
        events = self._busy.poll(0, self.claims if weighed else 64)
        if events:
            self._receiver.begin_turn(len(events) if weighed else 0, weighed=weighed)
            for fd, _ in events:
                self._waiting[fd].readable()
            self._receiver.end_batch()

    def keep(self, fd: int, transport: LazyTransport, known: bool) -> None:
        """Between two requests: tell of the next, or let the master have it.  `known`: it has been here before."""
        if known:
            self._kept.modify(fd, self._armed)
        else:
            self._kept.register(fd, self._armed)
            self._waiting[fd] = transport

    def watch(self, fd: int, transport: LazyTransport, known: bool) -> None:
        """In the midst of a request: tell, once if shared, when the client says something or leaves."""
        if known:
            self._busy.modify(fd, self._armed)
        else:
            self._busy.register(fd, self._armed)
            self._waiting[fd] = transport

    def pause(self, fd: int) -> None:
        """Tell nothing of one that is watched."""
        # One-shot all the same: an entry without events still tells of a hang-up, again and again.
        self._busy.modify(fd, select.EPOLLONESHOT)

    def forget(self, fd: int, kept: bool, busy: bool) -> None:
        """It is about to be closed, or to become the loop's."""
        if kept:
            self._kept.unregister(fd)
        if busy:
            self._busy.unregister(fd)
        del self._waiting[fd]

    def close(self) -> None:
        """Stop watching; who still waits is told nothing any more."""
        for epoll in {self._kept, self._busy}:
            self._loop.remove_reader(epoll.fileno())
            epoll.close()
        self._waiting.clear()
