"""Which changed files count: uvicorn's rules, compared with uvicorn, and where ours go further."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.supervisors.watchfilesreload import FileFilter

from clusterserve.core.watched import EXCLUDES, INCLUDES, Watched, base, outermost, with_defaults


def watched(
    *includes: str, but: tuple[str, ...] = (), excluded: tuple[str, ...] = (), files: tuple[str, ...] = ()
) -> Watched:
    return Watched(("/site",), *with_defaults(includes, but), excluded, files)


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/site/app.py", True),
        ("/site/deep/in/there/app.py", True),
        ("/site/app.pyc", False),
        ("/site/page.html", False),
        ("/site/.app.py", False),
        ("/site/~app.py", False),
        # What editors leave lying about.
        ("/site/.app.py.swp", False),
        ("/site/app.py~", False),
        ("/elsewhere/app.py", False),
        ("/sites/app.py", False),
        # What is not the application's.
        ("/site/.git/hooks/hook.py", False),
        ("/site/.venv/lib/python3.12/site-packages/starlette/app.py", False),
        ("/site/env/lib/python3.12/site-packages/starlette/app.py", False),
        ("/site/node_modules/gyp/gyp.py", False),
        ("/site/__pycache__/app.py", False),
    ],
)
def test_what_counts_when_nothing_is_said(path: str, counts: bool) -> None:
    assert watched().counts(path) is counts


def test_includes_come_on_top_and_excludes_take_away() -> None:
    files = watched("*.html", "templates/*.css", but=("*_test.py", "old/*.py"))
    assert [files.counts(f"/site/{name}") for name in ("a.py", "a.html", "templates/a.css", "x/templates/a.css")] == [
        True
    ] * 4
    assert not any(files.counts(f"/site/{name}") for name in ("a_test.py", "a.css", "old/a.py", "x/old/a.py"))
    assert files.counts("/site/old/deep/a.py")


def test_a_default_is_taken_back() -> None:
    assert not watched("*.html", but=("*.py",)).counts("/site/app.py")
    assert watched(".*").counts("/site/.env")
    assert with_defaults((), ()) == (INCLUDES, EXCLUDES)


def test_a_name_without_wildcards_wins() -> None:
    assert watched(".env", but=("*",)).counts("/site/.env")
    assert not watched("*.env", but=("*",)).counts("/site/x.env")


@given(st.lists(st.sampled_from(["*", "*.py", "a*"]), max_size=3), st.sampled_from(["", ".", "./", "././."]))
def test_a_pattern_of_no_name_fits_nothing(others: list[str], empty: str) -> None:
    """It ends in the directory itself, which is no file; alone or among others it neither adds nor takes away."""
    for path in ("/site/app.py", "/site/deep/a", "/site/x.html"):
        assert watched(*others, empty).counts(path) is watched(*others).counts(path)
        assert watched(*others, but=(empty,)).counts(path) is watched(*others, but=(".nothing.",)).counts(path)


def test_an_excluded_directory() -> None:
    files = watched(excluded=("/site/tests",))
    assert not files.counts("/site/tests/deep/a.py")
    assert files.counts("/site/testsuite/a.py")


def test_a_hidden_directory_that_is_watched_itself() -> None:
    files = Watched(("/site", "/site/.plugins", "/home/.me/site"))
    assert files.counts("/site/.plugins/a.py")
    assert files.counts("/home/.me/site/deep/a.py")
    assert not files.counts("/site/.plugins/.git/a.py")


def test_files_count_wherever_they_are() -> None:
    files = watched(files=("/etc/site.conf", "/srv/*/x[12].yml", "/site/.git/HEAD", "/all/**/*.sql"))
    assert all(
        files.counts(path)
        for path in ("/etc/site.conf", "/srv/a/x1.yml", "/site/.git/HEAD", "/all/a.sql", "/all/a/b/c.sql")
    )
    assert not any(
        files.counts(path)
        for path in ("/etc/site.conf.new", "/srv/a/b/x1.yml", "/srv/.a/x1.yml", "/all/.a/b.sql", "/all/.a.sql", "/all")
    )


@pytest.mark.parametrize(
    ("pattern", "directory", "deep"),
    [
        ("/etc/site.conf", "/etc", False),
        ("/etc/*.conf", "/etc", False),
        ("/etc/*/x.conf", "/etc", True),
        ("/etc/**", "/etc", True),
        ("/*", "/", False),
        ("/x", "/", False),
    ],
)
def test_where_files_are_looked_for(pattern: str, directory: str, deep: bool) -> None:
    assert base(pattern) == (directory, deep)


def test_what_lies_below_need_not_be_watched_twice() -> None:
    assert outermost(["/b", "/a/c", "/a", "/ab", "/a"]) == ("/a", "/ab", "/b")
    assert outermost(["/a", "/"]) == ("/",)


# Few letters, so that patterns meet names; nothing hidden inside a path, where we go further than uvicorn.
names = st.text("abx", min_size=1, max_size=3)
last = st.sampled_from(["", "."]).flatmap(lambda dot: names.map(lambda name: dot + name))
ending = st.sampled_from(["", ".py", ".pyc", ".sw.x", ".html"])
paths = st.tuples(st.lists(names, max_size=3), last, ending).map(
    # Deep enough: to pathlib, the root is a part like others.
    lambda it: "/site/on/disk/" + "/".join([*it[0], it[1] + it[2]])
)
part = st.sampled_from(["*", "a*", "*.py", "*.py[cod]", ".*", "~*", "?", "[ab]*", "a", "x.html"])
patterns = st.lists(part, min_size=1, max_size=3).map("/".join)


@given(paths, st.lists(patterns, max_size=3), st.lists(patterns, max_size=3))
def test_it_is_as_with_uvicorn(path: str, includes: list[str], excludes: list[str]) -> None:
    theirs = FileFilter(SimpleNamespace(reload_includes=includes, reload_excludes=excludes))  # type: ignore[arg-type]
    # Its own excludes may name directories, if they are some here.
    assert theirs.exclude_dirs == []
    assert watched(*includes, but=tuple(excludes)).counts(path) is theirs(Path(path))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for directory in (".", "a", "a/b", "a/.h", ".h", "a/b/x"):
        (root / directory).mkdir(exist_ok=True)
        for name in ("c", "b.py", ".h.py", "x.py"):
            (root / directory / name).touch()
    return root


@given(
    st.lists(st.sampled_from(["**", "*", "a", "c", ".*", "*.py", "[bx]*", "?"]), min_size=1, max_size=4).map("/".join)
)
def test_patterns_of_files_find_what_glob_finds(tree: Path, pattern: str) -> None:
    files = Watched((), files=(f"{tree}/{pattern}",))
    every = [os.path.join(directory, name) for directory, _, names in os.walk(tree) for name in names]
    found = {path for path in glob.glob(f"{tree}/{pattern}", recursive=True) if os.path.isfile(path)}
    assert {path for path in every if files.counts(path)} == found
