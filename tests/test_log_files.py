"""Lines of several processes, on real files and pipes: none is lost, none is broken; and files that are renamed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.errors import SettingsError
from clusterserve.log_files import LineHandler, LogFiles, WorkerFiles, placed, reopen_handlers
from clusterserve.settings import Settings
from tests.helpers.waiting import eventually

#: Writes so many lines, some of them longer than a pipe takes at once, each with its length.
WRITER = """
import logging, sys
from clusterserve.log_files import LineHandler
handler = LineHandler(int(sys.argv[1]))
for number in range(int(sys.argv[3])):
    size = 20_000 if number % 5 == 0 else 50
    text = f"{sys.argv[2]}-{number} {size} " + sys.argv[2] * size
    handler.handle(logging.makeLogRecord({"msg": text}))
"""


def writer(fd: int, name: str, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(fd), name, str(count)], pass_fds=[fd])


def whole(lines: list[str], names: str, count: int) -> None:
    """Every line is there, once, and has its own letters only."""
    for line in lines:
        head, size, rest = line.split(" ")
        assert rest == head[0] * int(size), line[:100]
    assert Counter(line.split(" ")[0] for line in lines) == Counter(f"{c}-{n}" for c in names for n in range(count))


def record(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text})


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reads, writes = os.pipe()
    yield reads, writes
    os.close(reads)
    # Some close it before, to read to the end.
    with contextlib.suppress(OSError):
        os.close(writes)


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_of_any_length_in_a_pipe_that_is_read_slowly(pipe: tuple[int, int], blocking: bool) -> None:
    reads, writes = pipe
    os.set_blocking(writes, blocking)
    writers = [writer(writes, name, 60) for name in "abcd"]
    os.close(writes)
    text = b""
    # Little by little: it is full nearly all the time.
    while part := os.read(reads, 1500):
        text += part
    assert [each.wait() for each in writers] == [0] * 4
    whole(text.decode().splitlines(), "abcd", 60)


def test_lines_of_any_length_in_a_file(tmp_path: Path) -> None:
    files = LogFiles(str(tmp_path / "log"), "-")
    files.open()
    writers = [writer(files.places.access, name, 200) for name in "abcd"]
    assert [each.wait() for each in writers] == [0] * 4
    files.close()
    whole((tmp_path / "log").read_text().splitlines(), "abcd", 200)


def test_a_process_that_dies_in_the_midst_of_a_line_holds_nobody_up(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    os.set_blocking(writes, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writes, b"x" * 4096):
            pass
    os.set_blocking(writes, True)
    dies = writer(writes, "a", 1)
    eventually(lambda: _is_locked(writes), "it has begun its line")
    lives = writer(writes, "b", 3)
    dies.kill()
    assert dies.wait() == -signal.SIGKILL
    os.close(writes)
    text = b""
    while part := os.read(reads, 1500):
        text += part
    assert lives.wait() == 0
    whole(text.decode().lstrip("x").splitlines(), "b", 3)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN)
    return False


def test_a_process_that_was_stopped_in_the_midst_of_a_line_does_not_stop_the_others(pipe: tuple[int, int]) -> None:
    reads, writes = pipe
    holds = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; fcntl.lockf({writes}, fcntl.LOCK_EX); input()"],
        stdin=subprocess.PIPE,
        pass_fds=[writes],
    )
    with holds:
        eventually(lambda: _is_locked(writes), "it holds the lock")
        handler = LineHandler(writes)
        for number in range(3):
            handler.handle(record(f"line {number}"))
        assert os.read(reads, 100) == b"line 0\nline 1\nline 2\n"
        assert holds.stdin is not None
        holds.stdin.write(b"\n")


def test_two_handlers_of_one_process_on_one_pipe(pipe: tuple[int, int]) -> None:
    """Locks are the process's: the threads of one must not let each other in."""
    reads, writes = pipe
    handlers = [LineHandler(writes), LineHandler(os.dup(writes))]
    texts = ["a" * 9000, "b" * 9000]

    def write(handler: LineHandler, text: str) -> None:
        for _ in range(50):
            handler.handle(record(text))

    threads = [threading.Thread(target=write, args=pair) for pair in zip(handlers, texts, strict=True)]
    for thread in threads:
        thread.start()
    found = b""
    while len(found) < 2 * 50 * 9001:
        found += os.read(reads, 1500)
    for thread in threads:
        thread.join()
    os.close(handlers[1]._fd)
    assert Counter(found.decode().splitlines()) == dict.fromkeys(texts, 50)


def test_what_is_no_text_elsewhere(tmp_path: Path) -> None:
    with open(tmp_path / "log", "ab") as file:
        LineHandler(file.fileno()).handle(record("é \ud800"))
    assert (tmp_path / "log").read_bytes() == "é \\ud800\n".encode()


def test_a_record_that_cannot_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    LineHandler(2).handle(logging.LogRecord("a", 20, "f", 1, "%d", ("x",), None))
    assert "--- Logging error ---" in capsys.readouterr().err


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_what_goes() -> None:
    assert placed(("-", "-"), ()) == (1, 2)
    assert placed(("a", "-"), (7,)) == (7, 2)
    assert placed(("-", "e"), (7,)) == (1, 7)
    assert placed(("a", "e"), (7, 8)) == (7, 8)


def test_files_are_appended_to_and_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("before\n")
    files = LogFiles("a", "e")
    files.open()
    files.open()
    theirs = [os.dup(fd) for fd in files.descriptors]
    worker = WorkerFiles(Settings.create(app="a:b", workers=1, access_logfile="a", error_logfile="e"), theirs)
    access, error = LineHandler(worker.places.access), LineHandler(files.places.error)
    access.handle(record("one"))
    error.handle(record("trouble"))
    # The directory of the process may be another one by now.
    monkeypatch.chdir("/")
    for name in "ae":
        (tmp_path / name).rename(tmp_path / f"{name}.1")
    files.reopen()
    error.handle(record("more trouble"))
    access.handle(record("two"))
    assert worker.reopen(files.descriptors) == ""
    access.handle(record("three"))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.1": "before\none\ntwo\n", "a": "three\n", "e.1": "trouble\n", "e": "more trouble\n"}
    assert "limit of open descriptors" in worker.reopen([])
    assert not any(os.get_inheritable(fd) for fd in (*theirs, *files.descriptors))
    for fd in theirs:
        os.close(fd)
    files.close()


def test_nothing_is_left_open_if_one_cannot_be(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = LogFiles(str(tmp_path / "a"), str(tmp_path / "none" / "e"))
    with pytest.raises(SettingsError, match=r"^error_logfile '.*/none/e' cannot be opened: No such file or directory$"):
        files.open()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.timeout(20)
def test_a_named_pipe_without_a_reader_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files = LogFiles(str(tmp_path / "pipe"), str(tmp_path / "e"))
    files.open()
    pipe, error = files.descriptors
    os.close(reader)
    (tmp_path / "e").rename(tmp_path / "e.1")
    # The same pipe: it is open, and is no reason for the other file to stay.
    files.reopen()
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.write(pipe, b"a line\n")
    assert os.read(reader, 100) == b"a line\n"
    assert os.path.samestat(os.fstat(error), os.stat(tmp_path / "e"))
    # Another one: all stays as it is, until somebody reads.
    (tmp_path / "pipe").unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "e").unlink()
    with pytest.raises(SettingsError, match=r"^access_logfile '.*/pipe' cannot be opened: nobody reads from it$"):
        files.reopen()
    assert os.fstat(error).st_nlink == 0
    other = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.reopen()
    assert all(map(os.get_blocking, files.descriptors))
    os.write(pipe, b"another\n")
    assert os.read(other, 100) == b"another\n"
    files.close()
    os.close(reader)
    os.close(other)


@pytest.mark.timeout(20)
def test_a_handler_of_pythons_own_on_a_named_pipe_stays_there(tmp_path: Path) -> None:
    logger = logging.getLogger("test_log_files.pipe")
    logger.propagate = False
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    handler = logging.FileHandler(tmp_path / "pipe")
    logger.handlers[:] = [handler]
    os.close(reader)
    reopen_handlers()
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    logger.error("a line")
    assert os.read(reader, 100) == b"a line\n"
    handler.close()
    logger.handlers.clear()
    os.close(reader)


def test_the_umask_that_the_process_will_have(tmp_path: Path) -> None:
    files = LogFiles(str(tmp_path / "a"), "-", umask=0o027)
    before = os.umask(0o022)
    files.open()
    assert os.umask(before) == 0o022
    files.close()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.needs_root
def test_files_are_the_workers_own(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    os.chown(tmp_path / "old", 4711, 4712)
    files = LogFiles(str(tmp_path / "a"), str(tmp_path / "old"), (1234, 1235))
    files.open()
    files.close()
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()}
    assert owners == {"a": (1234, 1235), "old": (4711, 4712)}


@pytest.mark.needs_root
def test_a_file_that_was_there_is_not_given_away(tmp_path: Path) -> None:
    """It may be /dev/null, or what a user who can write to the directory has put a link to."""
    (tmp_path / "roots").touch()
    (tmp_path / "link").symlink_to("roots")
    files = LogFiles(str(tmp_path / "link"), str(tmp_path / "roots"), (1234, 1235))
    files.open()
    files.reopen()
    files.close()
    assert ((tmp_path / "roots").stat().st_uid, (tmp_path / "roots").stat().st_gid) == (0, 0)


def test_handlers_of_pythons_own_are_reopened_unless_they_would_empty_the_file(tmp_path: Path) -> None:
    logger = logging.getLogger("test_log_files.some")
    logger.propagate = False
    handlers = [logging.FileHandler(tmp_path / mode, mode) for mode in ("a", "w")]
    logger.handlers[:] = handlers
    for number in range(2):
        logger.error("line %d", number)
        (tmp_path / "a").replace(tmp_path / f"a.{number}")
        reopen_handlers()
    logger.error("line 2")
    for handler in handlers:
        handler.close()
    logger.handlers.clear()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a.0": "line 0\n", "a.1": "line 1\n", "a": "line 2\n", "w": "line 0\nline 1\nline 2\n"}
