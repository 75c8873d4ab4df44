"""The connection channel: a SOCK_SEQPACKET socketpair that carries offers one way and answers the other.

A message is a list of fixed-size records (`core.records`); an offer's descriptor rides with it, in the same order.  The
master keeps a copy of the worker's end, on which it can take back what the worker has not read: the kernel decides who
gets a message, so nothing is served twice.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from ..core.records import ANSWER_SIZE, OFFER_SIZE, Flag, pack_note, unpack_offers

#: Descriptors in one message, at most (the kernel's SCM_MAX_FD is 253).
MAX_BATCH: Final = 32

#: Answers in one message, at most: the master reads no more.
MAX_ANSWERS: Final = 1024

_SPACE: Final = socket.CMSG_SPACE(4 * MAX_BATCH)
_OFFER_BYTES: Final = OFFER_SIZE * MAX_BATCH
_ANSWER_BYTES: Final = ANSWER_SIZE * MAX_ANSWERS
_FLAGS: Final = socket.MSG_CMSG_CLOEXEC

#: What says "not now" instead of "broken": the buffer is full, or too many descriptors are in flight.
_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
#: What says that the other end is gone.
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> array.array[int]:
    fds: array.array[int] = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds


class MasterEnd:
    """The master's side.  Owns both sockets: its own, and the copy of the worker's end used for `recall`."""

    def __init__(self, own: socket.socket, theirs: socket.socket) -> None:
        self._own = own
        self._theirs = theirs
        own.setblocking(False)
        theirs.setblocking(False)
        # Notes that could not be sent, or came back with a recall.  Nothing overtakes them: an offer behind a LOST may
        # be of the same connection.
        self.owed: list[bytes] = []

    def fileno(self) -> int:
        """The descriptor that becomes readable when answers have come."""
        return self._own.fileno()

    def offer(self, records: Sequence[bytes], fds: array.array[int]) -> bool:
        """Send offers with their descriptors, of which the caller keeps its own copies; False if it must wait.

        All or nothing: a message is atomic.  Offers to a worker whose end is closed count as sent: its death brings
        them back.
        """
        if self.owed and not self.remind():
            return False
        try:
            self._own.sendmsg(records, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except OSError as exc:
            if exc.errno in _GONE:
                return True
            if exc.errno not in _FULL:
                raise
            return False
        return True

    def note(self, flag: Flag, ids: Sequence[int]) -> None:
        """Tell the worker of connections that it keeps; what cannot be sent now waits for `remind`."""
        self.owed += [pack_note(flag, id) for id in ids]
        self.remind()

    def remind(self) -> bool:
        """Send the notes that wait; False if some still do."""
        while self.owed:
            try:
                self._own.send(b"".join(self.owed[:MAX_BATCH]))
            except OSError as exc:
                if exc.errno in _GONE:
                    self.owed.clear()
                    return True
                if exc.errno not in _FULL:
                    raise
                return False
            del self.owed[:MAX_BATCH]
        return True

    def answers(self) -> bytes:
        """The records of one message; empty when there is none (now, or ever again)."""
        try:
            return self._own.recv(_ANSWER_BYTES)
        except (BlockingIOError, ConnectionResetError):
            return b""

    def recall(self) -> list[int]:
        """Take back every offer the worker has not read; returns their connection ids.  Notes are sent again."""
        ids: list[int] = []
        notes: list[bytes] = []
        while True:
            try:
                data, ancillary, _, _ = self._theirs.recvmsg(_OFFER_BYTES, _SPACE, _FLAGS)
            except (BlockingIOError, ConnectionResetError):
                break
            # Duplicates of what the master holds; at its descriptor limit fewer may arrive, which loses nothing.
            for fd in _descriptors(ancillary):
                os.close(fd)
            if not data:
                break
            for record in unpack_offers(data):
                if record[2]:
                    notes.append(pack_note(Flag(record[2]), record[4]))
                else:
                    ids.append(record[4])
        if notes:
            self.owed[:0] = notes
            self.remind()
        return ids

    def close(self) -> None:
        self._own.close()
        self._theirs.close()


class WorkerEnd:
    """The worker's side.  Owns its socket; the descriptors `offers` returns belong to the caller."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that becomes readable when offers have come."""
        return self._sock.fileno()

    def offers(self) -> tuple[bytes, array.array[int]] | None:
        """One message: its records and its descriptors, in order; None: nothing now; empty: the master is gone.

        At the worker's descriptor limit the kernel drops descriptors from the end (MSG_CTRUNC): then there are fewer of
        them than records, and the caller refuses the rest.
        """
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_OFFER_BYTES, _SPACE, _FLAGS)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b"", array.array("i")
        return data, _descriptors(ancillary)

    def answer(self, records: bytes) -> bool:
        """Send a message of at most `MAX_ANSWERS` answers; False if it must wait for the master."""
        try:
            self._sock.send(records)
        except OSError as exc:
            if exc.errno in _GONE:
                return True
            if exc.errno not in _FULL:
                raise
            return False
        return True

    def close(self) -> None:
        self._sock.close()


def connection_channel() -> tuple[MasterEnd, socket.socket]:
    """A new channel: the master's side, and the socket that the worker's process inherits.

    The same socket stays in the master for `recall`; `MasterEnd.close` closes it.
    """
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return MasterEnd(own, theirs), theirs
