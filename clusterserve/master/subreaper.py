"""Taking in the workers that are forked from a template: for a moment, this process is where orphans go (prctl(2)).

Only for that moment.  It is a property of the whole process, which may be somebody else's program: whatever is orphaned
below it meanwhile is its to wait for, as it is process 1's otherwise.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


class Subreaper:
    """Of this process.  `enter` and `leave` come in pairs; between the first and the last it takes orphans in."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._lock = threading.Lock()
        self._wanted = 0
        self._was = False

    def enter(self) -> None:
        """Take orphans in from now on; raises OSError."""
        with self._lock:
            if not self._wanted:
                was = ctypes.c_int()
                self._prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was))
                self._was = bool(was.value)
                self._prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
            self._wanted += 1

    def leave(self) -> None:
        """Somebody who needed it has done with it."""
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                self._prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(self._was))

    def _prctl(self, option: int, argument: object) -> None:
        if self._libc.prctl(option, argument, 0, 0, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


#: There is one process, however many clusters are in it, each with an engine in a thread of its own.
SUBREAPER: Final = Subreaper()
