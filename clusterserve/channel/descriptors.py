"""Descriptors that ride with messages: arrived and not claimed, those of one message, copies of some to be sent.

The kernel delivers them with bytes, and not with messages: which message's they are is told by how many it announces.
Whoever holds them here closes them, unless they are claimed or taken.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

#: Descriptors that may ride with one message.
MAX_DESCRIPTORS: Final = 16

#: Room for as many in one read.
SPACE: Final = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)

#: What says that a descriptor cannot be copied.
_NO_COPY: Final = frozenset({errno.EMFILE, errno.ENFILE})

#: Among the descriptors that have arrived: here some were lost at our descriptor limit, all of one message.
_LOST: Final = -1


class Riders:
    """The descriptors that came with a message.  They are closed with it if nobody takes them.

    `lost` more were sent, and did not arrive: this process was at its descriptor limit.
    """

    __slots__ = ("_fds", "lost")

    def __init__(self, fds: list[int], lost: int = 0) -> None:
        self._fds = fds
        self.lost = lost

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> list[int]:
        """They are the caller's from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        for fd in self.take():
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Arrived:
    """What has arrived and is not claimed, in its order."""

    __slots__ = ("_fds",)

    def __init__(self) -> None:
        self._fds: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._fds)

    def add(self, ancillary: Iterable[tuple[int, int, bytes]], flags: int) -> None:
        """What one `recvmsg` says besides its bytes."""
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds: array.array[int] = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self._fds.append(_LOST)

    def claim(self, count: int) -> list[int]:
        """The descriptors of a message; fewer than announced if our limit was hit, which the receiver sees."""
        claimed: list[int] = []
        while len(claimed) < count and self._fds:
            fd = self._fds.popleft()
            if fd == _LOST:
                break
            claimed.append(fd)
        return claimed

    def close(self) -> None:
        for fd in self._fds:
            if fd != _LOST:
                os.close(fd)
        self._fds.clear()


def copied(descriptors: Sequence[int]) -> list[int]:
    """Copies of them all, or none if there is no room for them."""
    made: list[int] = []
    try:
        for fd in descriptors:
            made.append(os.dup(fd))  # noqa: PERF401 - those that were made before it fails must be closed
    except OSError as exc:
        for fd in made:
            os.close(fd)
        if exc.errno not in _NO_COPY:
            raise
        return []
    return made
