"""A worker's start-up: become a worker, tie this process's life to the master's, load the application, serve."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Final

from .. import faults
from ..channel.board import Board
from ..channel.tally import Tally
from ..core.messages import HEADER_SIZE, Boot, Decoder, Failed, Message, Online, decode, encode
from ..current import STDIO_VARIABLE, VARIABLE, become
from ..currentworker import CurrentWorker
from ..errors import BootError, ProtocolError
from ..settings import Settings
from . import debugging
from .link import MASTER_GONE, Link
from .stacks import answer_signal

#: What a worker exits with when its application cannot be loaded or started (uvicorn's STARTUP_FAILURE).
BOOT_FAILURE: Final = 3

_PR_SET_PDEATHSIG: Final = 1

#: A terminal sends some of these to the whole process group, and people send the others to "all of it": the master acts
#: on them.  A handler, not SIG_IGN: what the application starts must not inherit deafness.
_MASTERS: Final = ("SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU", "SIGPWR")


def main() -> int:
    """Run as a worker until told to finish; returns the exit code."""
    place_descriptors(os.environ.pop(STDIO_VARIABLE, ""))
    messages, connections, board, kept, *tally, master = (int(each) for each in os.environ.pop(VARIABLE).split(","))
    die_with(master)
    for name in _MASTERS:
        signal.signal(getattr(signal, name), heed_the_master)
    if not faulthandler.is_enabled():
        # The master's SIGABRT finds a worker that no longer runs any Python: its stacks are written in C, from the
        # signal handler, to the descriptor and not to what the application may put in the place of sys.stderr.
        faulthandler.enable(2, all_threads=True)
    channel = socket.socket(fileno=messages)
    for descriptor in (messages, connections, board, kept, *tally):
        os.set_inheritable(descriptor, False)
    try:
        boot = _receive_boot(channel)
    except ProtocolError as exc:
        # The package may have been upgraded under a running master, and this process is the first of the new version.
        _send(channel, Failed(f"the worker does not understand its master, which may be of another version: {exc}", ""))
        return BOOT_FAILURE
    pickled = boot.launch.get("serialization") == "pickle"
    worker = CurrentWorker(boot.worker, boot.slot, os.getpid(), pickled=pickled)
    become(worker)
    link = Link(channel, socket.socket(fileno=connections), Board(board), select.epoll.fromfd(kept))
    if tally:
        link.tally, link.place = Tally(tally[0]), boot.place
    told = answer_signal()
    if boot.launch.get("exec"):
        return _run(boot, channel, link, worker, told)
    if boot.path:
        sys.path[:] = boot.path
    _send(channel, Online(os.getpid()), told)
    with _watched(boot, channel, worker):
        return _serve(boot, channel, link, worker)


@contextlib.contextmanager
def _watched(boot: Boot, channel: socket.socket, worker: CurrentWorker) -> Iterator[None]:
    """With a debugger and a profile, if they are wanted; waits for the debugger's client if that is."""
    with contextlib.ExitStack() as stack:
        if boot.launch.get("debug_port") is not None:
            debugged = debugging.listen(boot.launch["debug_port"], boot.slot)
            _send(channel, debugged)
            if debugged.address and boot.launch.get("debug_wait"):
                debugging.wait()
        if boot.launch.get("profile"):
            from .profiling import profiled

            stack.enter_context(profiled(boot.launch["profile"], worker))
        yield


def _serve(boot: Boot, channel: socket.socket, link: Link, worker: CurrentWorker) -> int:
    """Serve an application."""
    # Importing uvicorn takes most of the start-up: not before the master knows that we live.
    from .asgi import serve

    try:
        serve(Settings.from_json(boot.settings), link, worker)
    except BootError as exc:
        _send(channel, Failed(exc.args[0], exc.traceback))
        return BOOT_FAILURE
    return 0


def _run(boot: Boot, channel: socket.socket, link: Link, worker: CurrentWorker, told: int) -> int:
    """Run a program instead of serving an application."""
    from .main_module import MainModule
    from .program import Program

    try:
        module = MainModule(boot.launch["exec"], boot.launch["args"])
    except BootError as exc:
        _send(channel, Failed(exc.args[0], exc.traceback))
        return BOOT_FAILURE
    _send(channel, Online(os.getpid()), told)
    with _watched(boot, channel, worker):
        return Program(module, Settings.from_json(boot.settings), link, worker).run()


def place_descriptors(places: str) -> None:
    """Put descriptors where the program wants them ("4:70,5:71"), where nothing else is."""
    for place in filter(None, places.split(",")):
        number, fd = map(int, place.split(":"))
        os.dup2(fd, number)
        os.close(fd)


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


def _receive_boot(channel: socket.socket) -> Boot:
    """The first frame, and not a byte more: what follows belongs to the channel's reader."""
    decoder = Decoder()
    header = _exactly(channel, HEADER_SIZE)
    frames = list(decoder.feed(header))
    # Not before it is clear that this can be a frame's length.
    frames += decoder.feed(_exactly(channel, int.from_bytes(header[:4], "little")))
    message = decode(frames[0][0])
    if not isinstance(message, Boot):
        raise ProtocolError(f"a worker does not expect {type(message).__name__} first")
    return message


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(size - len(data))
        if not part:
            os._exit(MASTER_GONE)
        data += part
    return bytes(data)


def _send(channel: socket.socket, message: Message, *descriptors: int) -> None:
    """Before or after the loop's time: block until it is sent.  If the master is gone, nobody needs it."""
    channel.setblocking(True)
    frame = encode(message, len(descriptors))
    try:
        # They ride with the first byte.
        sent = socket.send_fds(channel, [frame], descriptors)
        channel.sendall(frame[sent:])
    except (BrokenPipeError, ConnectionResetError):
        os._exit(MASTER_GONE)
