"""A worker's start-up: become a worker, tie this process's life to the master's, load the application, serve."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..channel.board import Board
from ..channel.tally import Tally
from ..core.messages import HEADER_SIZE, Boot, Decoder, Failed, Online, decode
from ..credentials import Credentials
from ..current import STDIO_VARIABLE, TEMPLATE_VARIABLE, VARIABLE, become
from ..currentworker import CurrentWorker
from ..errors import BootError, ProtocolError
from ..importing import nothing_collected
from ..log_files import MOST_FILES
from ..settings import Settings
from . import debugging
from .link import MASTER_GONE, Link
from .stacks import answer_signal
from .startup import BOOT_FAILURE, begin, die_with, exactly, send, tell_faults

if TYPE_CHECKING:
    from .preparations import Prepared


def main() -> int:
    """Run as a worker until told to finish; returns the exit code."""
    template = os.environ.pop(TEMPLATE_VARIABLE, "")
    if not template:
        place_descriptors(os.environ.pop(STDIO_VARIABLE, ""))
        *descriptors, master = (int(number) for number in os.environ.pop(VARIABLE).split(","))
        begin(master)
        return _work(descriptors, None)
    channel, master = (int(number) for number in template.split(","))
    begin(master)
    from .template import live

    birth = live(channel, master)
    # A fork inherits everything of `begin` but this.
    die_with(birth.master)
    return _work(birth.descriptors, birth.prepared)


def _work(descriptors: Sequence[int], prepared: Prepared | None) -> int:
    """Be the worker to which these descriptors belong: messages, connections, board, kept, tally."""
    messages, connections, board, kept, *tally = descriptors
    channel = socket.socket(fileno=messages)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    try:
        boot, files = _receive_boot(channel)
    except ProtocolError as exc:
        # The package may have been upgraded under a running master, and this process is the first of the new version.
        send(channel, Failed(f"the worker does not understand its master, which may be of another version: {exc}", ""))
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
    # The master logs them, wherever that is.
    tell_faults(told)
    if boot.path and (prepared is None or prepared.app is None):
        # One that was imported has its path as it wants it.
        sys.path[:] = boot.path
    send(channel, Online(os.getpid()), told)
    with _watched(boot, channel, worker):
        return _serve(boot, channel, link, worker, prepared, files)


@contextlib.contextmanager
def _watched(boot: Boot, channel: socket.socket, worker: CurrentWorker) -> Iterator[None]:
    """With a debugger and a profile, if they are wanted; waits for the debugger's client if that is."""
    with contextlib.ExitStack() as stack:
        if boot.launch.get("debug_port") is not None:
            debugged = debugging.listen(boot.launch["debug_port"], boot.slot)
            send(channel, debugged)
            if debugged.address and boot.launch.get("debug_wait"):
                debugging.wait()
        if boot.launch.get("profile"):
            from .profiling import profiled

            stack.enter_context(profiled(boot.launch["profile"], worker))
        yield


def _serve(
    boot: Boot,
    channel: socket.socket,
    link: Link,
    worker: CurrentWorker,
    prepared: Prepared | None,
    files: Sequence[int],
) -> int:
    """Serve an application, and log to `files`."""
    # Importing uvicorn takes most of the start-up: not before the master knows that we live.
    with nothing_collected():
        from .asgi import serve

    try:
        credentials = Credentials.from_json(boot.tls) if boot.tls else None
        serve(Settings.from_json(boot.settings), link, worker, prepared, files, credentials)
    except BootError as exc:
        send(channel, Failed.of(exc.args[0], exc.traceback))
        return BOOT_FAILURE
    return 0


def _run(boot: Boot, channel: socket.socket, link: Link, worker: CurrentWorker, told: int) -> int:
    """Run a program instead of serving an application."""
    from .main_module import MainModule
    from .program import Program

    try:
        module = MainModule(boot.launch["exec"], boot.launch["args"])
    except BootError as exc:
        send(channel, Failed.of(exc.args[0], exc.traceback))
        return BOOT_FAILURE
    send(channel, Online(os.getpid()), told)
    with _watched(boot, channel, worker):
        return Program(module, Settings.from_json(boot.settings), link, worker).run()


def place_descriptors(places: str) -> None:
    """Put descriptors where the program wants them ("4:70,5:71"), where nothing else is."""
    for place in filter(None, places.split(",")):
        number, fd = map(int, place.split(":"))
        os.dup2(fd, number)
        os.close(fd)


def _receive_boot(channel: socket.socket) -> tuple[Boot, list[int]]:
    """The first frame and its descriptors, and not a byte more: what follows belongs to the channel's reader."""
    decoder = Decoder()
    # They ride with the first byte.
    first, files, _, _ = socket.recv_fds(channel, 1, MOST_FILES)
    if not first:
        os._exit(MASTER_GONE)
    for fd in files:
        os.set_inheritable(fd, False)
    header = first + exactly(channel, HEADER_SIZE - 1)
    frames = list(decoder.feed(header))
    # Not before it is clear that this can be a frame's length.
    frames += decoder.feed(exactly(channel, int.from_bytes(header[:4], "little")))
    message = decode(frames[0][0])
    if not isinstance(message, Boot):
        raise ProtocolError(f"a worker does not expect {type(message).__name__} first")
    return message, files
