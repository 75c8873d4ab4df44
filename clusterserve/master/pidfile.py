"""`--pid FILE`: who the master is, for scripts that send it signals.

The file is never seen half written, and is locked as long as its master lives: so of two that start at once one is
refused, and one that a dead master has left is known for what it is, whoever has its process id by now.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator

from ..errors import ClusterError


class PidFile:
    """The file at `path`, ours from `write` to `remove`."""

    def __init__(self, path: str) -> None:
        # Somebody may change the directory before the end.
        self.path = os.path.abspath(path)
        self._fd = -1
        self._temporary = ""
        self._prepared = False

    def write(self) -> None:
        """Write our process id.  Raises `ClusterError` if another master lives that has done so, or if it cannot be."""
        with self._explained():
            self._make()
            self._put(self._temporary)
            self._temporary = ""

    def prepare(self) -> None:
        """Know that it can be written, beside that of another master, who will leave us its place: see `take_over`."""
        with self._explained():
            self._make()
        # Nothing stays until then: who is killed meanwhile could not remove it.
        self.remove()
        self._prepared = True

    def take_over(self) -> None:
        """Ours takes the place of the other master's file, which will not remove it; nothing if not `prepare`d."""
        if self._prepared:
            self._prepared = False
            with self._explained():
                self._make()
                os.rename(self._temporary, self.path)
                self._temporary = ""

    def _make(self) -> None:
        """Beside its place, whole and locked."""
        directory, name = os.path.split(self.path)
        self._fd, self._temporary = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        os.write(self._fd, f"{os.getpid()}\n".encode())
        os.fchmod(self._fd, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong leaves nothing behind."""
        try:
            yield
        except BaseException as error:
            self.remove()
            if not isinstance(error, OSError):
                raise
            reason = (error.strerror or str(error)).lower()
            raise ClusterError(f"cannot write the pid file {self.path}: {reason}") from None

    def remove(self) -> None:
        """Remove it, if it is still ours."""
        if self._fd < 0:
            return
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = ""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.unlink(self.path)
        self._close()

    def _put(self, temporary: str) -> None:
        while True:
            try:
                # Fails if there is one, unlike rename.
                os.link(temporary, self.path)
                os.unlink(temporary)
                return
            except FileExistsError:
                pass
            if self._replaced_link(temporary):
                return
            with contextlib.suppress(FileNotFoundError), open(self.path, "rb", opener=_opener) as old:
                if not stat.S_ISREG(os.fstat(old.fileno()).st_mode):
                    raise ClusterError(f"the pid file {self.path} is no regular file; choose another one")
                # Whoever replaces it holds its lock, so only one of several does.
                self._claim(old.fileno(), old.read(32))
                if os.path.samestat(os.stat(self.path), os.fstat(old.fileno())):
                    os.rename(temporary, self.path)
                    return

    def _replaced_link(self, temporary: str) -> bool:
        """Put `temporary` in the place of a link that leads nowhere, if there is one; any other link is replaced too,
        when what it leads to is claimed."""
        if os.path.exists(self.path) or not os.path.islink(self.path):
            return False
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # There is no file whose lock would say which of several replaces it.
            fcntl.flock(directory, fcntl.LOCK_EX)
            found = not os.path.exists(self.path) and os.path.islink(self.path)
            if found:
                os.rename(temporary, self.path)
        finally:
            os.close(directory)
        return found

    def _claim(self, fd: int, content: bytes) -> None:
        pid = int(content) if content.strip().isdigit() else 0
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = f"process {pid} is running" if pid else "another process holds it"
            raise ClusterError(f"the pid file {self.path} is in use: {who}; stop it, or choose another file") from None
        # Another program's, which locks nothing: alive, and here when the file was written.
        if pid not in (0, os.getpid()) and _started(pid) <= os.fstat(fd).st_mtime:
            raise ClusterError(
                f"the pid file {self.path} names process {pid}, which is running; stop it, or choose another file"
            )

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _opener(path: str, flags: int) -> int:
    # A pipe has nobody at its other end, for whom this would wait.
    return os.open(path, flags | os.O_NONBLOCK)


def _started(pid: int) -> float:
    """When a process started (seconds since the epoch, to the second); for ever after, if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        with open("/proc/stat", "rb") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith(b"btime "))
    except (FileNotFoundError, ProcessLookupError):
        return float("inf")
    return boot + ticks / os.sysconf("SC_CLK_TCK") - 1.0
