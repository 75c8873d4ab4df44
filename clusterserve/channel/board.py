"""A worker's board: memory it shares with the master, in which it says where it stands without a message.

A head with two counters, then a byte for every connection: how far the worker is with it, so that the master can help
the client of a worker that died.  A connection's place is the master's number for its descriptor, which no other open
connection has.  Every worker has a board of its own and cannot harm another's.
"""

from __future__ import annotations

import mmap
import os
import resource
from typing import Final

#: How far a worker is with a connection.  The master writes UNTOUCHED when it offers it, the worker all others.
UNTOUCHED: Final = 0
#: It is about to read, or has read, from a request that it has not begun to answer.
READING: Final = 1
#: It is about to write, or has written, a part of the response.
RESPONDING: Final = 2
#: Between two requests: the last response is flushed, and nothing beyond it was read.
IDLE: Final = 3
#: The event loop's own transport serves it and marks nothing: the kernel may know.
UNKNOWN: Final = 4

_HEAD: Final = 64
#: More connections than this have no place of their own: what a dead worker did to them is UNKNOWN.
_MOST: Final = 1 << 20


class Board:
    """One worker's board, mapped.  Owns `fd`, a memfd, until `close`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # Sparse: what no connection uses takes no memory.
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        self._view = memoryview(self._map)
        #: [how often the loop has begun or ended a turn: odd within one; kept connections with a request in progress;
        #: requests in threads or waiting for one; how many threads it has for them, 0: its loop serves them].
        self.counters = self._view[:_HEAD].cast("I")
        #: A byte per place, and one more for whoever has none.
        self.marks = self._view[_HEAD:]
        self.places = len(self.marks) - 1

    @classmethod
    def create(cls) -> Board:
        """A new one, with a place for every descriptor this process may ever have (to a million)."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        places = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
        fd = os.memfd_create("clusterserve-board")
        try:
            os.ftruncate(fd, _HEAD + places + 1)
            return cls(fd)
        except OSError:
            os.close(fd)
            raise

    def mark(self, place: int) -> int:
        """How far the worker is with the connection of this place."""
        return self.marks[place] if place < self.places else UNKNOWN

    def close(self) -> None:
        """Unmap it and close the descriptor."""
        self.counters.release()
        self.marks.release()
        self._view.release()
        self._map.close()
        os.close(self.fd)
