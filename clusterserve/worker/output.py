"""`--capture-output`: what the application prints goes to stderr, and the access log stays on stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from ..log_files import redirect


@contextlib.contextmanager
def stdout_for_logs(error: int = 2) -> Iterator[int]:
    """What finds `sys.stdout` inside the block has the real one, whose descriptor is given; from its end on, descriptor
    1 is where errors go, and so is 2, if that is a file of the log (`error`)."""
    printed = sys.stdout
    printed.flush()
    # Never closed: handlers of the log have it as long as the process lives.
    fd = os.dup(1)
    sys.stdout = open(  # noqa: SIM115
        fd, "w", buffering=1, encoding=printed.encoding, errors=printed.errors, closefd=False
    )
    try:
        yield fd
    finally:
        sys.stdout = printed
        redirect(error)
        if isinstance(printed, io.TextIOWrapper):
            # As stderr: a line that is printed is to be seen.
            printed.reconfigure(line_buffering=True)
