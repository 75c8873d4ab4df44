"""What `ps` and `top` show of the master and the workers, if the package setproctitle is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def titler() -> Callable[[str], Any] | None:
    """What sets this process's title; None if nothing can."""
    # The environment stays readable where it is (/proc/PID/environ): people find processes by it.  Titles are then cut
    # to the length of the command line.
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
