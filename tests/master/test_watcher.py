"""Watching real files: what is told, when, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from clusterserve.errors import ClusterError
from clusterserve.master.watcher import described, survey, watching
from clusterserve.settings import Settings
from tests.helpers import proc
from tests.helpers.waiting import DEADLINE, eventually

from .rig import SkewedLoop


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    (site / "app.py").write_text("one")
    monkeypatch.chdir(site)
    return site


@pytest.fixture(autouse=True)
def closed(nothing_left: None) -> Iterator[None]:
    """watchfiles has a thread of its own, which closes what it has a moment after it was told to."""
    before = proc.descriptors(os.getpid()).keys()
    yield
    eventually(lambda: proc.descriptors(os.getpid()).keys() <= before, "what watchfiles had open is closed")


def settings(**values: object) -> Settings:
    return Settings.create(app="a:b", workers=1, reload=True, reload_delay=0, **values)


class Told:
    """The paths that were told, in order."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._more = asyncio.Event()

    def __call__(self, paths: list[str]) -> None:
        self.paths += paths
        self._more.set()

    async def of(self, path: Path) -> None:
        """Wait until this one was told."""
        while str(path) not in self.paths:
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), DEADLINE)


@contextlib.asynccontextmanager
async def watched(**values: object) -> AsyncIterator[Told]:
    told = Told()
    with watching(settings(**values), asyncio.get_running_loop(), told):
        yield told


def run(loop: SkewedLoop, scene: Callable[[], object]) -> None:
    before = threading.active_count()
    loop.run_until_complete(scene())  # type: ignore[arg-type]
    assert threading.active_count() == before


def test_changes_are_told_from_the_first_moment_on(loop: SkewedLoop, site: Path) -> None:
    async def scene() -> None:
        async with watched() as told:
            (site / "app.py").write_text("two")
            await told.of(site / "app.py")
            (site / "new").mkdir()
            (site / "page.html").touch()
            (site / "new.py").touch()
            await told.of(site / "new.py")
            (site / "app.py").unlink()
            (site / "new.py").rename(site / "app.py")
            await told.of(site / "app.py")
        assert set(told.paths) == {f"{site}/app.py", f"{site}/new.py"}

    run(loop, scene)


def test_a_file_outside_and_one_that_is_a_link(loop: SkewedLoop, site: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "real").mkdir()
    conf, real, link = tmp_path / "etc" / "site.conf", tmp_path / "real" / "r.conf", site / "link.conf"
    real.touch()
    link.symlink_to(real)

    async def scene() -> None:
        async with watched(reload_extra_files=[str(conf), "link.conf"]) as told:
            conf.write_text("made later")
            await told.of(conf)
            # As editors save: another file takes its place.
            other = conf.with_name("site.conf.new")
            other.write_text("more")
            told.paths.clear()
            other.rename(conf)
            await told.of(conf)
            real.write_text("changed")
            await told.of(real)
        assert set(told.paths) == {str(conf), str(real)}

    run(loop, scene)


def test_a_source_that_is_saved_twice_within_a_second_is_compiled_twice(loop: SkewedLoop, site: Path) -> None:
    source = site / "app.py"
    cache = Path(importlib.util.cache_from_source(str(source)))
    cache.parent.mkdir()
    cache.touch()

    async def scene() -> None:
        async with watched() as told:
            source.write_text("two")
            await told.of(source)

    run(loop, scene)
    assert not cache.exists()


def test_without_a_word_it_is_here_and_where_the_application_is(site: Path, tmp_path: Path) -> None:
    assert survey(settings()).directories == (str(site),)
    assert survey(settings(app_dir=str(tmp_path))).directories == (str(site), str(tmp_path))
    (tmp_path / "tool.py").touch()
    program = Settings.create(exec=str(tmp_path / "tool.py"), workers=1, reload=True)
    assert survey(program).directories == (str(site), str(tmp_path))


def test_directories_as_uvicorn_finds_them(site: Path, tmp_path: Path) -> None:
    for name in ("src/one", "src/two", "docs", ".hidden"):
        (site / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(site / "docs")

    def directories(**values: object) -> set[str]:
        return {os.path.relpath(each, site) for each in survey(settings(**values)).directories}

    assert directories(reload_dirs=["src", str(tmp_path / "link")]) == {"src", "docs"}
    # One that an include names, or fits, is watched instead of the working directory.
    assert directories(reload_includes=["docs"]) == {"docs"}
    assert directories(reload_includes=["src/*", "*.html"]) == {"src/one", "src/two"}
    assert directories(reload_includes=[".*"]) == {"."}
    # What is excluded, or lies below, is not watched, even if nothing is left then.
    assert directories(reload_dirs=["src/one", "docs"], reload_excludes=["src"]) == {"docs"}
    assert directories(reload_dirs=["docs"], reload_excludes=["doc*"]) == {"."}
    assert not survey(settings(reload_excludes=["doc*"])).counts(str(site / "docs" / "a.py"))


def test_what_cannot_be_watched(loop: SkewedLoop, site: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with (
        pytest.raises(ClusterError, match=rf"cannot watch {nowhere} for changes"),
        watching(settings(reload_extra_files=[str(nowhere / "x")]), loop, lambda paths: None),
    ):
        raise AssertionError
    assert not [thread for thread in threading.enumerate() if thread.name == "clusterserve-watcher"]


def test_what_the_log_says_of_many(site: Path) -> None:
    assert described([f"{site}/{name}.py" for name in "abc"]) == "a.py, b.py, c.py"
    assert described([f"{site}/{name}.py" for name in "abcde"]) == "a.py, b.py, c.py and 2 more"
    assert described(["/elsewhere/x.py"]) == "/elsewhere/x.py"
    # Everything is gone, our working directory too.
    shutil.rmtree(site)
    assert described([f"{site}/a.py"]) == f"{site}/a.py"
