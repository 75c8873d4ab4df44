"""What `ps` and `top` show of the master and the workers, if the package setproctitle is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Final

#: As long as titles usually are, at most: a long name of an application, and what it does.
_ROOM: Final = 200


def titler() -> Callable[[str], Any] | None:
    """What sets this process's title; None if nothing can."""
    # The environment stays readable where it is (/proc/PID/environ): people find processes by it.  Titles are then cut
    # to the length of the command line: see `room`.
    before = os.environ.get("SPT_NOENV")
    os.environ["SPT_NOENV"] = "1"
    try:
        from setproctitle import getproctitle, setproctitle

        # It looks at the variable when it is first used.
        getproctitle()
    except ImportError:
        return None
    finally:
        if before is None:
            del os.environ["SPT_NOENV"]
    return setproctitle


def room(command: Sequence[str]) -> list[str]:
    """A word of blanks, which makes the command line of a process that ignores it long enough for titles."""
    missing = _ROOM - len(" ".join(command)) - 1
    return [" " * missing] if missing > 0 and find_spec("setproctitle") is not None else []
