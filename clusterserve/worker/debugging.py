"""Having this worker debugged: debugpy listens on the worker's port, or on a free one if that is taken.

debugpy's adapter is a process of its own, which ends by itself when this one does.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Final

from .. import faults
from ..core.messages import Debugged
from ..debugport import address, written

#: How long the adapter of the slot's last worker may take to leave the port (seconds).
_PATIENCE: Final = 2.0
_PAUSE: Final = 0.05

#: Once it listens it does so for the life of the process.
_state: dict[str, Debugged] = {}


def listen(port: str | int, slot: int) -> Debugged:
    """Have debugpy listen, and return what to tell the master.  Blocks for a second or two; again does nothing."""
    if "done" not in _state:
        _state["done"] = _listen(port, slot)
    return _state["done"]


def wait() -> None:
    """Block until a client has attached and is ready."""
    import debugpy

    debugpy.wait_for_client()


def _listen(port: str | int, slot: int) -> Debugged:
    # It warns on stderr of modules frozen into the interpreter, whose lines nobody steps through.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import debugpy

    host, wanted = address(port, slot)
    # What the application starts is its own affair: debugpy would rewrite its command line.
    debugpy.configure(subProcess=False)
    why = _unusable(host, wanted) if wanted else ""
    if not why:
        try:
            return Debugged(written(*debugpy.listen((host, wanted))), "", "")
        except RuntimeError as exc:
            why = str(exc)
    if faults.on("debug-port-free"):
        sys.exit(f"{written(host, wanted)}: {why}")
    try:
        return Debugged(written(*debugpy.listen((host, 0))), written(host, wanted), why)
    except RuntimeError as exc:
        return Debugged("", written(host, wanted), str(exc))


def _unusable(host: str, port: int) -> str:
    """Why it cannot be listened on; empty if it can.  The worker before this one may still be about to leave it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen(1)
        except OSError as exc:
            if time.monotonic() > deadline:
                return exc.strerror or str(exc)
        else:
            return ""
        time.sleep(_PAUSE)
