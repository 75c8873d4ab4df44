"""The tally: memory that all workers share, in which each says how much it has in progress, so that each knows the sum.

A cell of 32 bits per worker.  Only its worker writes it, and the master once that is dead: so what a dead worker had in
progress is off the books by one store, whatever it was doing.  There is no lock, because nobody could take that from a
worker that was stopped while holding it.

Exact means: never more than `limit` are in.  A worker first adds one to its own cell, marked WANT, and only then reads
all cells.  Assume limit + 1 are in at some moment: the one of them that was added last was followed by a look that
found all of them, so it was not let in.  Between the store and the look stands a fence, or a processor might do them in
the other order.  And of two who want the last place one gets it: who has the lower place waits, with its mark, until
the other has seen that mark and withdrawn.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final

#: The mark of a cell one of whose requests is not let in yet.
WANT: Final = 1 << 31

#: More workers than processes can be; sparse, so what nobody uses takes no memory.
_PLACES: Final = 1 << 16
_SIZE: Final = 4 * (_PLACES + 1)

#: How often is looked whether a rival has withdrawn.  Rivals decide within microseconds, unless one is stopped
#: or has no processor: then somebody is turned away who might have been let in.
_LOOKS: Final = 200


class Tally:
    """The memory, mapped.  Owns `fd`, a memfd, until `close`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._view = memoryview(self._map)
        #: How many places were ever taken, then a cell for each.
        self.cells = self._view.cast("I")

    @classmethod
    def create(cls) -> Tally:
        """A new one."""
        fd = os.memfd_create("clusterserve-tally")
        try:
            os.ftruncate(fd, _SIZE)
            return cls(fd)
        except OSError:
            os.close(fd)
            raise

    def close(self) -> None:
        """Unmap it and close the descriptor."""
        self.cells.release()
        self._view.release()
        self._map.close()
        os.close(self.fd)


class Places:
    """The master's side: which worker, by id, has which cell; no two that live have the same.  Owns the tally."""

    def __init__(self) -> None:
        self.tally = Tally.create()
        self.places: dict[int, int] = {}

    @property
    def fd(self) -> int:
        return self.tally.fd

    def take(self, worker: int) -> int:
        """A place for a worker that is about to be started."""
        taken = set(self.places.values())
        place = self.places[worker] = next(number for number in range(_PLACES) if number not in taken)
        # Before the worker exists: whoever looks after it has added something looks at its cell too.
        self.tally.cells[0] = max(self.tally.cells[0], place + 1)
        return place

    def free(self, worker: int) -> None:
        """It is dead, or was never born, and with it what it had in progress is over."""
        self.tally.cells[1 + self.places.pop(worker)] = 0

    def close(self) -> None:
        """Unmap it; the workers are dead."""
        self.tally.close()


class Crowd:
    """A worker's side: what all workers together have in progress is never more than `limit`.  For one thread."""

    def __init__(self, tally: Tally, place: int, limit: int) -> None:
        self._cells = tally.cells
        self._mine = 1 + place
        self._limit = limit
        self._held = 0
        self._used = 0
        self._all = self._cells[1:1]
        self._fence = threading.Lock()
        self._fence.acquire()

    def enter(self) -> bool:
        """Whether one more may begin; then `leave` must follow."""
        held = self._held
        self._cells[self._mine] = WANT | (held + 1)
        # A full barrier where we run, x86 and ARMv8: a release and, behind it, an acquisition.
        self._fence.release()
        self._fence.acquire()
        if self._used != self._cells[0]:
            self._used = self._cells[0]
            self._all = self._cells[1 : 1 + self._used]
        # With a rival's mark it is above every limit.
        entered = sum(self._all) - WANT <= self._limit or self._prevails()
        if entered:
            self._held = held + 1
        self._cells[self._mine] = self._held
        return entered

    def _prevails(self) -> bool:
        """There is no room, or not for all who want it: those with the lowest places get it."""
        for _ in range(_LOOKS):
            inside = wanting = before = 0
            for place, cell in enumerate(self._all, 1):
                if cell & WANT:
                    wanting += 1
                    before += place < self._mine
                    cell = (cell ^ WANT) - 1
                inside += cell
            if inside + wanting <= self._limit:
                return True
            if inside + before >= self._limit:
                return False
        return False

    def leave(self) -> None:
        """What was let in is over."""
        self._held -= 1
        self._cells[self._mine] = self._held
