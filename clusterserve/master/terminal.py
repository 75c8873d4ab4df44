"""`Terminal`: the one that this process was started from, as long as there is one.

Whoever closes the window of a program in development means its end, and the kernel and the shell say so with SIGHUP;
which for a server in production is an order to reload.  What tells them apart is that the terminal is gone.
"""

from __future__ import annotations

import os


class Terminal:
    """Looks for it now, and whenever it is asked for; owns nothing."""

    def __init__(self) -> None:
        self._had = _reachable()

    @property
    def gone(self) -> bool:
        """Whether there was one at first, and there is none any more."""
        return self._had and not _reachable()


def _reachable() -> bool:
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(fd)
    return True
