"""A template: the process that prepares what all workers need, and of which workers are forks.

It is spawned by the master as a worker is, does what the master says on its channel, and never serves.

A worker is forked twice: the process in between ends at once, and the worker's parent is from then on the nearest
ancestor that takes orphans in, which is the master (it is a subreaper, PR_SET_CHILD_SUBREAPER, while it waits for
`Born`, or process 1).  So a worker is the master's own child: the master waits for it, knows its exit exactly, and the
parent-death signal follows the master.  Its template may end, or die, and it goes on.  (clone(2) with CLONE_PARENT
would do the same with one fork; but glibc would know nothing of it, nor those who ask it to be told of forks.)

What a fork would break is refused after the preparations: threads, which do not exist in a fork, though the locks that
they hold do; and event loops, whose epoll all forks would share.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import gc
import importlib
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from ..channel.descriptors import MAX_DESCRIPTORS
from ..core.messages import HEADER_SIZE, Born, Decoder, Failed, Fork, Message, Prepare, Prepared, Unborn, decode
from ..current import SLOT_VARIABLE
from ..errors import BootError, ProtocolError
from ..settings import Settings
from ..titles import titler
from . import preparations
from .startup import BOOT_FAILURE, exactly, heed_the_master, send

#: How long a thread that was joined may take to be gone for the kernel as well (seconds).
_ENDING: Final = 1.0

_PAUSE: Final = 0.005

#: What every worker has: messages, connections, board, kept, tally.
_ENDS: Final = 5

_SPACE: Final = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
_REPORT: Final = struct.Struct("ii")


class Birth(NamedTuple):
    """What a worker that was just forked has: its descriptors, the master's pid, and what the template has prepared."""

    #: messages, connections, board, kept
    descriptors: Sequence[int]
    master: int
    prepared: preparations.Prepared


def live(fd: int, master: int) -> Birth:
    """Be a template, on the channel `fd`.  Returns in each worker that is forked from it, and nowhere else."""
    channel = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    # As a worker that boots: a signal for the whole group is the master's to act on.  SIGTERM too, which a worker gets
    # back: systemd sends it to all, and the workers that still boot need us until the master says otherwise.
    signal.signal(signal.SIGTERM, heed_the_master)
    try:
        order, files = _receive(channel)
        if not isinstance(order, Prepare):
            raise ProtocolError(f"a template does not expect {type(order).__name__} first")
        settings = Settings.from_json(order.settings)
        _entitle(settings, order, "preparing")
        sys.path[:] = order.path
        prepared = _prepare(settings, files, order.terms)
    except ProtocolError as exc:
        send(
            channel, Failed(f"the template does not understand its master, which may be of another version: {exc}", "")
        )
        os._exit(BOOT_FAILURE)
    except BootError as exc:
        send(channel, Failed.of(exc.args[0], exc.traceback))
        _flush()
        os._exit(BOOT_FAILURE)
    _entitle(settings, order, "ready")
    send(channel, Prepared())
    while True:
        fork, descriptors = _receive(channel)
        if not isinstance(fork, Fork):
            raise ProtocolError(f"a template does not expect {type(fork).__name__}")
        if len(descriptors) != _ENDS + len(fork.stdio):
            # Lost at somebody's limit of descriptors.
            send(channel, Unborn(fork.worker, errno.EMFILE))
        elif _born(channel, fork):
            channel.close()
            return Birth(_become(fork, descriptors), master, prepared)
        for each in descriptors:
            os.close(each)


def _prepare(settings: Settings, files: Sequence[int], terms: str) -> preparations.Prepared:
    prepared = preparations.prepare(settings, files, terms)
    _refuse_threads(settings)
    _refuse_loops(settings)
    # The collector writes into what it looks at, and what is written to is no longer shared.
    gc.collect()
    gc.freeze()
    return prepared


def _refuse_threads(settings: Settings) -> None:
    """Raises `BootError` if there is any thread but this one, those of native code included."""
    deadline = time.monotonic() + _ENDING
    while len(tasks := os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > deadline:
            break
        time.sleep(_PAUSE)
    else:
        return
    main = threading.get_native_id()
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    names = [known[int(task)] for task in tasks if int(task) != main and int(task) in known]
    native = [_native_name(task) for task in tasks if int(task) not in known]
    if native:
        names.append(
            f"{len(native)} of native code ({', '.join(sorted(set(native)))}; if it is NumPy that starts them, "
            "OPENBLAS_NUM_THREADS=1 keeps it from that)"
        )
    raise BootError(
        f"--preload cannot be used: importing {settings.app!r} starts threads, which do not survive the fork of a "
        f"worker: {', '.join(names)}; start them in the application's lifespan, or leave --preload out"
    )


def _native_name(task: str) -> str:
    # It may have ended just now.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/self/task/{task}/comm").read_text().strip()
    return "ended since"


def _refuse_loops(settings: Settings) -> None:
    """Raises `BootError` if there is an event loop that is not closed."""
    open_loops = {
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.get_objects()
        if issubclass(type(each), asyncio.AbstractEventLoop) and not each.is_closed()
    }
    if open_loops:
        raise BootError(
            f"--preload cannot be used: importing {settings.app!r} makes an event loop, which workers must not share: "
            f"{', '.join(sorted(open_loops))}; make it in the application's lifespan, or leave --preload out"
        )


# -- forking ----------------------------------------------------------------------------------------------------------


def _born(channel: socket.socket, fork: Fork) -> bool:
    """Fork it, twice, and tell the master; whether this is the worker."""
    _flush()
    pipes: list[int] = []
    try:
        pipes += os.pipe()
        pipes += os.pipe()
        between = os.fork()
    except OSError as exc:
        for fd in pipes:
            os.close(fd)
        send(channel, Unborn(fork.worker, exc.errno or 0))
        return False
    report, reports, begin, begins = pipes
    if not between:
        try:
            pid, why = os.fork(), 0
        except OSError as exc:
            pid, why = -1, exc.errno or 0
        if pid:
            os.write(reports, _REPORT.pack(pid, why))
            os._exit(0)
        os.close(begins)
        told = os.read(begin, 1)
        for fd in (report, reports, begin):
            os.close(fd)
        if not told:
            # The template has died in the midst of this: the master does not know of us, and has given us up.
            os._exit(BOOT_FAILURE)
        return True
    os.close(reports)
    os.close(begin)
    # When it has been waited for, its child is the master's.
    os.waitpid(between, 0)
    data = os.read(report, _REPORT.size)
    os.close(report)
    # Without an answer, somebody has killed it.
    pid, why = _REPORT.unpack(data) if data else (-1, errno.ECHILD)
    send(channel, Born(fork.worker, pid) if pid > 0 else Unborn(fork.worker, why))
    if pid > 0:
        # Not before: what the master does not know of must not end.
        with contextlib.suppress(BrokenPipeError):
            os.write(begins, b"!")
    os.close(begins)
    return False


def _become(fork: Fork, descriptors: list[int]) -> list[int]:
    """In the worker: what a process that was spawned for it would have from the start; its descriptors."""
    if signal.getsignal(signal.SIGTERM) is heed_the_master:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(fork.env)
    os.environ[SLOT_VARIABLE] = str(fork.slot)
    # What the template knows of directories is as old as it is.
    importlib.invalidate_caches()
    base = max(fork.stdio, default=-1) + 1
    if base:
        # The numbers that `stdio` gives away may be the channels'.
        lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(base, 3)) for fd in descriptors]
        for fd in descriptors:
            os.close(fd)
        descriptors = lifted
        for number, fd in zip(fork.stdio, descriptors[_ENDS:], strict=True):
            os.dup2(fd, number)
            os.close(fd)
    return descriptors[:_ENDS]


# -- the channel ------------------------------------------------------------------------------------------------------


def _receive(channel: socket.socket) -> tuple[Message, list[int]]:
    """The next order, and the descriptors that ride along.  If the master is gone, or needs us no more: the end.

    Nothing of the application's is run then (atexit): what it has made is the workers', and they may live on.
    """
    fds: array.array[int] = array.array("i")
    header = b""
    while len(header) < HEADER_SIZE:
        # They come with the first byte of their frame.
        data, ancillary, _, _ = channel.recvmsg(HEADER_SIZE - len(header), _SPACE, socket.MSG_CMSG_CLOEXEC)
        if not data:
            _flush()
            os._exit(0)
        header += data
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    decoder = Decoder()
    frames = list(decoder.feed(header))
    # Not before it is clear that this can be a frame's length.
    frames += decoder.feed(exactly(channel, int.from_bytes(header[:4], "little")))
    return decode(frames[0][0]), fds.tolist()


def _entitle(settings: Settings, order: Prepare, state: str) -> None:
    entitle = titler()
    if entitle is not None:
        entitle(f"clusterserve: template {order.template} [{settings.title}] {state}")


def _flush() -> None:
    """What is printed but not written yet would be written by every fork."""
    for stream in (sys.stdout, sys.stderr):
        # The application may have closed it, or put anything in its place.
        with contextlib.suppress(ValueError, AttributeError):
            stream.flush()
