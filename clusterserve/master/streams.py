"""A worker's descriptors beyond its channels: `silent` and `stdio`, and what of them the program holds."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence
from typing import IO, Any, Final

from ..launch import Launch

#: As Node: stdin, stdout, stderr and the channel.
_SILENT: Final = ("pipe", "pipe", "pipe", "ipc")


class Stream:
    """The program's end of one.  Open until the program closes what `take` gave it; closed unseen if it never asks."""

    def __init__(self, fd: int, kind: str) -> None:
        self._fd = fd
        self._kind = kind
        self._taken: Any = None

    def take(self) -> Any:
        """A binary file that is read ("rb") or written ("wb"), or a socket ("")."""
        if self._taken is None:
            fd, self._fd = self._fd, -1
            self._taken = open(fd, self._kind) if self._kind else socket.socket(fileno=fd)  # noqa: SIM115 - theirs
        return self._taken

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class Streams:
    """What a worker is launched with.  `close` closes the worker's ends, which are copies; `abandon` the program's.

    Raises OSError for a descriptor that is not open.
    """

    def __init__(self, launch: Launch) -> None:
        self.ours: dict[int, Stream] = {}
        #: By the number it has in the worker; None: as the master's.
        self.theirs: dict[int, int | None] = {}
        self._owned: list[int] = []
        entries: Sequence[str | int] = launch.stdio or (_SILENT if launch.silent else ())
        self._base = len(entries) + 3
        try:
            # The master's own first: what is opened here must not pass for one of a number that was not open.
            for number, entry in sorted(enumerate(entries), key=lambda each: each[1] in ("pipe", "ignore", "ipc")):
                self._open(number, entry)
        except OSError:
            self.close()
            self.abandon()
            raise

    def _open(self, number: int, entry: str | int) -> None:
        if entry == "ipc":
            return
        if isinstance(entry, int):
            self.theirs[number] = self._lifted(os.dup(entry))
        elif entry == "inherit":
            self.theirs[number] = None if number < 3 else self._lifted(os.dup(number))
        elif entry == "ignore":
            self.theirs[number] = self._lifted(os.open(os.devnull, os.O_RDWR))
        elif number >= 3:
            mine, its = (end.detach() for end in socket.socketpair())
            self.ours[number] = Stream(mine, "")
            self.theirs[number] = self._lifted(its)
        else:
            reads, writes = os.pipe()
            mine, its = (writes, reads) if number == 0 else (reads, writes)
            self.ours[number] = Stream(mine, "wb" if number == 0 else "rb")
            self.theirs[number] = self._lifted(its)

    def _lifted(self, fd: int) -> int:
        """Instead of `fd`, a descriptor above all numbers that are spoken for."""
        try:
            high = self.lift(fd)
        finally:
            os.close(fd)
        self._owned.append(high)
        return high

    def lift(self, fd: int) -> int:
        """A copy of `fd` above all numbers that are spoken for in the worker; the caller's to close."""
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self._base)

    @property
    def standard(self) -> dict[str, Any]:
        """`stdin`, `stdout` and `stderr` for Popen."""
        return {name: self.theirs.get(number) for number, name in enumerate(("stdin", "stdout", "stderr"))}

    @property
    def extra(self) -> dict[int, int]:
        """By its number in the worker, what it is a copy of."""
        return {number: fd for number, fd in sorted(self.theirs.items()) if number >= 3 and fd is not None}

    def close(self) -> None:
        for fd in self._owned:
            os.close(fd)
        self._owned.clear()

    def abandon(self) -> None:
        for stream in self.ours.values():
            stream.close()

    def stdio(self) -> tuple[Any, ...]:
        """By number: the program's ends, None where there is none."""
        highest = max(self.ours, default=-1)
        return tuple(self.ours[n].take() if n in self.ours else None for n in range(highest + 1))

    def file(self, number: int) -> IO[bytes] | None:
        stream = self.ours.get(number)
        return None if stream is None else stream.take()
