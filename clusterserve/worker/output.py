"""`--capture-output`: what the application prints goes to stderr, and the access log stays on stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_for_logs() -> Iterator[None]:
    """What finds `sys.stdout` inside the block has the real one; from its end on, descriptor 1 is stderr's."""
    printed = sys.stdout
    printed.flush()
    # Never closed: handlers of the log hold it as long as the process lives.
    sys.stdout = open(os.dup(1), "w", buffering=1, encoding=printed.encoding, errors=printed.errors)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout = printed
        os.dup2(2, 1)
        if isinstance(printed, io.TextIOWrapper):
            # As stderr: a line that is printed is to be seen.
            printed.reconfigure(line_buffering=True)
