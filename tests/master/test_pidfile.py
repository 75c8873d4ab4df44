"""The pid file: whole or not there, one master's at a time, and nobody's that is dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clusterserve.errors import ClusterError
from clusterserve.master.pidfile import PidFile

OURS = f"{os.getpid()}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "master.pid"


def test_it_is_written_and_removed(path: Path) -> None:
    file = PidFile(str(path))
    file.write()
    assert path.read_text() == OURS
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]
    file.remove()
    file.remove()
    assert list(path.parent.iterdir()) == []


def test_a_second_master_is_refused(path: Path) -> None:
    file = PidFile(str(path))
    file.write()
    with pytest.raises(ClusterError, match=f"in use: process {os.getpid()} is running; stop it, or choose") as e:
        PidFile(str(path)).write()
    assert e.value.exit_code == 1
    assert path.read_text() == OURS
    assert list(path.parent.iterdir()) == [path]
    file.remove()


@pytest.mark.parametrize("target", ["nowhere", "stale", "master.pid"])
def test_a_link_is_replaced_wherever_it_leads(path: Path, target: str) -> None:
    (path.parent / "stale").write_text(f"{2**22}\n")
    path.symlink_to(target)
    file = PidFile(str(path))
    file.write()
    assert (path.is_symlink(), path.read_text()) == (False, OURS)
    with pytest.raises(ClusterError, match="in use"):
        PidFile(str(path)).write()
    file.remove()
    assert [each.name for each in path.parent.iterdir()] == ["stale"]


def test_one_of_several_replaces_a_link(path: Path) -> None:
    path.symlink_to("nowhere")
    with ThreadPoolExecutor(8) as threads:
        files = [PidFile(str(path)) for _ in range(8)]
        errors = [each.exception(30) for each in [threads.submit(file.write) for file in files]]
    assert len([error for error in errors if error is None]) == 1
    assert all(isinstance(error, ClusterError) for error in errors if error is not None)
    assert list(path.parent.iterdir()) == [path]
    for file in files:
        file.remove()
    assert list(path.parent.iterdir()) == []


def test_what_is_no_regular_file_stays(path: Path) -> None:
    """/dev/null above all, for whoever is root."""
    os.mkfifo(path)
    with pytest.raises(ClusterError, match="is no regular file"):
        PidFile(str(path)).write()
    assert (path.is_fifo(), list(path.parent.iterdir())) == (True, [path])


def ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("content", ["", "nonsense\n", "0\n", f"{2**22}\n", "ours"])
def test_a_stale_one_is_replaced(path: Path, content: str) -> None:
    path.write_text(OURS if content == "ours" else content)
    file = PidFile(str(path))
    file.write()
    assert path.read_text() == OURS
    file.remove()


def test_one_of_a_process_that_has_ended_is_replaced(path: Path) -> None:
    path.write_text(f"{ended()}\n")
    file = PidFile(str(path))
    file.write()
    assert path.read_text() == OURS
    file.remove()


def test_another_programs_is_left_alone(path: Path) -> None:
    """gunicorn's, for one, which locks nothing."""
    path.write_text("1\n")
    with pytest.raises(ClusterError, match="names process 1, which is running"):
        PidFile(str(path)).write()
    assert path.read_text() == "1\n"


def test_a_process_that_was_not_there_when_it_was_written_has_its_number_by_chance(path: Path) -> None:
    """As in a container that was killed and started again: the same few numbers every time."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        path.write_text(f"{process.pid}\n")
        long_ago = time.time() - 3600
        os.utime(path, (long_ago, long_ago))
        file = PidFile(str(path))
        file.write()
        assert path.read_text() == OURS
        file.remove()
        process.communicate(b"\n")


def test_what_somebody_else_has_put_there_is_not_removed(path: Path) -> None:
    file = PidFile(str(path))
    file.write()
    path.unlink()
    path.write_text("another's\n")
    file.remove()
    assert path.read_text() == "another's\n"


def test_of_many_that_start_at_once_one_has_it(path: Path) -> None:
    source = (
        "import sys\nfrom clusterserve.master.pidfile import PidFile\nfrom clusterserve.errors import ClusterError\n"
        "file = PidFile(sys.argv[1])\nsys.stdin.readline()\n"
        "try:\n    file.write(); print('mine', flush=True)\nexcept ClusterError:\n    print('refused', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    path.write_text(f"{ended()}\n")
    many = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    for each in many:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    said = [each.stdout.readline().strip() for each in many if each.stdout is not None]
    assert sorted(said) == ["mine", *["refused"] * 5]
    assert path.read_text() == f"{many[said.index('mine')].pid}\n"
    for each in many:
        each.communicate("end\n")


@pytest.mark.parametrize(
    ("name", "reason"), [("no-such/master.pid", "no such file or directory"), ("", "is a directory")]
)
def test_a_place_where_it_cannot_be(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ClusterError, match=f"^cannot write the pid file .*: {reason}$"):
        PidFile(f"{tmp_path}/{name}").write()
    assert list(tmp_path.iterdir()) == []


class TestFromOneMasterToTheNext:
    def test_the_file_is_replaced_and_never_gone(self, tmp_path: Path) -> None:
        old, new = PidFile(str(tmp_path / "x")), PidFile(str(tmp_path / "x"))
        old.write()
        first = (tmp_path / "x").stat().st_ino
        new.prepare()
        assert (tmp_path / "x").stat().st_ino == first
        # Who is killed before it takes over leaves nothing behind.
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        new.take_over()
        assert (tmp_path / "x").stat().st_ino != first
        old.remove()
        assert (tmp_path / "x").read_text() == f"{os.getpid()}\n"
        with pytest.raises(ClusterError, match="is in use"):
            PidFile(str(tmp_path / "x")).write()
        new.remove()
        assert list(tmp_path.iterdir()) == []

    def test_one_that_never_takes_over_leaves_nothing(self, tmp_path: Path) -> None:
        old, new = PidFile(str(tmp_path / "x")), PidFile(str(tmp_path / "x"))
        old.write()
        new.prepare()
        new.remove()
        new.remove()
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        old.remove()
        assert list(tmp_path.iterdir()) == []
