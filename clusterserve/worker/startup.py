"""What every process of ours does when it starts, a worker or the template of workers: its life is the master's.

And the message channel before the event loop has it: a frame at a time, blocking.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys
from types import FrameType
from typing import Final

from .. import faults
from ..core.messages import Message, encode
from ..current import OF_THE_MASTER
from .link import MASTER_GONE

#: What a worker exits with when its application cannot be loaded or started (uvicorn's STARTUP_FAILURE).
BOOT_FAILURE: Final = 3

_PR_SET_PDEATHSIG: Final = 1


def begin(master: int) -> None:
    """Belong to the process `master`: die with it, leave its signals to it, and tell where you stand if it asks."""
    die_with(master)
    for number in OF_THE_MASTER:
        # A handler, not SIG_IGN: what the application starts must not inherit deafness.
        signal.signal(number, heed_the_master)
    # The master has held them back until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_MASTER)
    tell_faults(2)


def tell_faults(fd: int) -> None:
    """Write the stacks of all threads there when this process crashes, unless PYTHONFAULTHANDLER has them on stderr.

    The master's SIGABRT finds a worker that no longer runs any Python: they are written in C, from the signal's
    handler, to the descriptor and not to what the application may put in the place of sys.stderr.
    """
    if not _wanted_by_others():
        faulthandler.enable(fd, all_threads=True)


def _wanted_by_others() -> bool:
    return sys.flags.dev_mode or "faulthandler" in sys._xoptions or bool(os.environ.get("PYTHONFAULTHANDLER"))


def die_with(master: int) -> None:
    """Be killed when the process `master` ends, even if this one is busy or blocked (prctl(2), PR_SET_PDEATHSIG)."""
    if faults.on("no-parent-death-signal"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have ended before the call above.
    if os.getppid() != master:
        os._exit(MASTER_GONE)


def heed_the_master(number: int, frame: FrameType | None) -> None:
    """Do nothing: the master hears the signal too and says what to do."""


def exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            os._exit(MASTER_GONE)
        data += part
    return bytes(data)


def send(channel: socket.socket, message: Message, *descriptors: int) -> None:
    """Before or after the loop's time: block until it is sent.  If the master is gone, nobody needs it."""
    channel.setblocking(True)
    frame = encode(message, len(descriptors))
    try:
        # They ride with the first byte.
        sent = socket.send_fds(channel, [frame], descriptors)
        if sent < len(frame):
            # Not otherwise: who has read it all may have closed its end since.
            channel.sendall(frame[sent:])
    except (BrokenPipeError, ConnectionResetError):
        os._exit(MASTER_GONE)
