"""Where the log goes: descriptors, written a record at a time, and files that can be reopened.

The master opens the files, once for all, and every worker gets copies of the descriptors: a worker needs no permission
to open them, and none can be in yesterday's file while another is in today's.  Reopening puts a new file under the old
number (dup2), which is one step: a line is in the old file or in the new one.

A record is one write.  In a regular file, which is open for appending, that is in one piece however long it is; on a
terminal too.  In a pipe or a socket only a short one is: there a short line locks a byte of its process, and a long one
all bytes, so that no line comes into the midst of another.  The kernel ends the lock of a process that dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import stat
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from .errors import SettingsError
from .launch import owner
from .settings import Settings

#: What a pipe takes in one piece.
_PIECE: Final = select.PIPE_BUF

#: How long a line waits for another to end where there is room (seconds): whose process was stopped in the midst of it
#: must not stop all.
_PATIENCE: Final = 1.0
_PAUSE: Final = 0.001

#: After that, no line waits for so long (seconds).
_SULK: Final = 10.0

#: The access log's file, and that of everything else.
MOST_FILES: Final = 2

#: Above what is usually given to workers with `stdio`.
_HIGH: Final = 64

#: Of this process, for all handlers: they may lead to one pipe, and its locks are the process's.
_TURN: Final = threading.RLock()


class LineHandler(logging.Handler):
    """Writes each record to the descriptor `fd`, which is not its own.  Lines of several processes never mix."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._shared = _is_shared(fd)
        self._sulks_until = 0.0

    def createLock(self) -> None:  # noqa: N802 - logging's
        # Registers it for forks.
        super().createLock()
        self.lock = _TURN

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except Exception:  # noqa: BLE001 - as every handler of logging: what was to be logged may be anything
            self.handleError(record)

    def _write(self, line: bytes) -> None:
        if not self._shared:
            _write_all(self._fd, line)
            return
        where = (0, 0) if len(line) > _PIECE else (1, os.getpid())
        locked = self._lock(*where)
        try:
            _write_all(self._fd, line)
        finally:
            if locked:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, *where)

    def _lock(self, length: int, start: int) -> bool:
        """Lock these bytes (length 0: all), unless that takes too long.  The caller unlocks them."""
        deadline = 0.0
        while not _try_lock(self._fd, length, start):
            now = time.monotonic()
            if now < self._sulks_until:
                return False
            if not deadline or not _has_room(self._fd):
                # Where nobody reads, whoever writes is not to blame: we could not either.
                deadline = now + _PATIENCE
            if now >= deadline:
                self._sulks_until = now + _SULK
                return False
            time.sleep(_PAUSE)
        return True


def _is_shared(fd: int) -> bool:
    """Whether others may write there in the midst of a line."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        # Closed by whoever started us: each line will say so.
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _try_lock(fd: int, length: int, start: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except BlockingIOError:
        return False
    return True


def _write_all(fd: int, data: bytes) -> None:
    written = _write(fd, data)
    while written < len(data):
        # A signal came, or the kernel had no room for more: only then is it worth slicing.
        written += _write(fd, memoryview(data)[written:])


def _write(fd: int, data: bytes | memoryview) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        # Somebody has made it non-blocking, for all who have it: asyncio does with pipes.
        _has_room(fd, None)
        return 0


def _has_room(fd: int, within: float | None = 0.0) -> bool:
    """Whether something can be written, now or so soon; None: however long it takes."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(within))


class Descriptors(NamedTuple):
    """Where a process writes; standard output and standard error if nothing else was said."""

    access: int = 1
    error: int = 2


class LogFiles:
    """The files of one cluster's log, `-` being none.  Owns their descriptors from `open` until `close`."""

    def __init__(
        self,
        access: str,
        error: str,
        owner: tuple[int, int] = (-1, -1),
        umask: int | None = None,
    ) -> None:
        """`owner`: the workers' user and group, whose new files are to be; -1 for the master's."""
        self._paths = [("access_logfile", access), ("error_logfile", error)]
        # Now: the directory may change.
        self._paths = [(setting, path if path == "-" else os.path.abspath(path)) for setting, path in self._paths]
        self._owner = owner
        self._umask = umask
        self._fds: list[int] = []

    @classmethod
    def of(cls, settings: Settings) -> LogFiles:
        """Those that the settings name."""
        return cls(settings.access_logfile, settings.error_logfile, owner(settings), settings.umask)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(path != "-" for _, path in self._paths)

    def open(self) -> None:
        """Open those that are not open yet.  Raises `SettingsError`."""
        if not self._fds:
            self._fds = self._opened()

    def _opened(self) -> list[int]:
        fds: list[int] = []
        before_this = iter(self._fds)
        # The process's own comes later, and the log is there first.
        before = None if self._umask is None else os.umask(self._umask)
        try:
            for setting, path in self._paths:
                if path != "-":
                    fds.append(self._open(setting, path, next(before_this, -1)))
        except SettingsError:
            _close(fds)
            raise
        finally:
            if before is not None:
                os.umask(before)
        return fds

    def _open(self, setting: str, path: str, old: int) -> int:
        """`old` is what is open under this name so far; -1 for nothing, and then a pipe waits for whoever reads it."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        again = old >= 0
        if again:
            # Somebody serves meanwhile, who cannot wait for a reader.
            flags |= os.O_NONBLOCK
        made = True
        try:
            if again and _is_pipe(path, old):
                # Who reads it may be away for now.
                return os.dup(old)
            try:
                fd = os.open(path, flags | os.O_EXCL, 0o666)
            except FileExistsError:
                # Also a link that leads nowhere yet.
                fd, made = os.open(path, flags, 0o666), False
        except OSError as exc:
            why = "nobody reads from it" if again and exc.errno == errno.ENXIO else exc.strerror
            raise SettingsError(f"{setting} {path!r} cannot be opened: {why}") from None
        os.set_blocking(fd, True)
        if made and os.geteuid() == 0 and self._owner != (-1, -1):
            # Of whoever runs the application, as gunicorn has it; a file system without owners has none.  Never one
            # that was there: it may be /dev/null, or what a link in a directory of that user's leads to.
            with contextlib.suppress(OSError):
                os.fchown(fd, *self._owner)
        return fd

    @property
    def descriptors(self) -> list[int]:
        """Of the files, for workers: those of `placed`."""
        return list(self._fds)

    @property
    def places(self) -> Descriptors:
        """Where the master writes."""
        return placed([path for _, path in self._paths], self._fds)

    def reopen(self) -> None:
        """Have the files of these names, new ones if need be, under the old numbers.  Raises `SettingsError`."""
        new = self._opened()
        move(new, self._fds)
        _close(new)

    def close(self) -> None:
        _close(self._fds)
        self._fds = []


def placed(paths: Sequence[str], fds: Sequence[int]) -> Descriptors:
    """Where what goes: `paths` are those of the access log and of everything else, `fds` those of the files in them."""
    files = iter(fds)
    usual = Descriptors()
    access, error = (next(files, number) if path != "-" else number for path, number in zip(paths, usual, strict=True))
    return Descriptors(access, error)


def move(new: Sequence[int], old: Sequence[int]) -> None:
    """Put copies of `new` in the place of `old`."""
    for fresh, fd in zip(new, old, strict=False):
        os.dup2(fresh, fd, inheritable=False)


class WorkerFiles:
    """The same in a worker, or in the template of workers, which was given `fds`, and owns them from now on."""

    def __init__(self, settings: Settings, fds: Sequence[int]) -> None:
        self._fds = list(fds)
        self.places = placed((settings.access_logfile, settings.error_logfile), fds)
        # What the application prints goes where errors go, by descriptors of its own.
        self._follows = settings.capture_output and self.places.error != 2

    def reopen(self, new: Sequence[int]) -> str:
        """Write to `new`, the caller's, from now on; says what is wrong if that cannot be."""
        reopen_handlers()
        if len(new) != len(self._fds):
            return "the files were lost at the limit of open descriptors"
        move(new, self._fds)
        if self._follows:
            redirect(self.places.error)
        return ""

    def take(self, new: Sequence[int]) -> None:
        """In a worker that was forked from a template: those of the template may be old ones."""
        self.reopen(new)
        _close(new)


def lifted(fds: Sequence[int]) -> list[int]:
    """Copies of `fds`, which are closed, with numbers that nobody asks for."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in fds]
    _close(fds)
    return high


def redirect(error: int) -> None:
    """What this process prints, on descriptors 1 and 2, goes to `error`."""
    for fd in {1, 2} - {error}:
        os.dup2(error, fd)


def _is_pipe(path: str, fd: int | None = None) -> bool:
    """Whether that is a named pipe, and what is open as `fd`: it cannot be opened as long as nobody reads."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISFIFO(found.st_mode) and (fd is None or os.path.samestat(found, os.fstat(fd)))


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def reopen_handlers() -> None:
    """Have every `FileHandler` of Python's logging open its file again, as a `--log-config` may have made some.

    One that would empty the file (mode "w") is left alone, and so is a named pipe: somebody would have to read it.
    """
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {handler for logger in known if isinstance(logger, logging.Logger) for handler in logger.handlers}
    for handler in handlers:
        if isinstance(handler, logging.FileHandler) and handler.mode.startswith("a"):
            handler.acquire()
            try:
                if handler.stream is not None and not _is_pipe(handler.baseFilename):
                    stream, handler.stream = handler.stream, None
                    stream.close()
                    # `emit` opens it.
            finally:
                handler.release()
