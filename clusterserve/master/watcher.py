"""`--reload`: watching files, on threads of their own, and telling the engine's loop which have changed.

What counts is decided in core/watched.py.  Nothing of the application is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final

import watchfiles

from ..core.watched import Watched, base, is_below, is_pattern, outermost, with_defaults
from ..errors import ClusterError
from ..settings import Settings

logger = logging.getLogger("clusterserve")

#: How often a thread looks whether there are changes (milliseconds); told are those after which one look has found no
#: more.  Whoever saves waits for up to two, a machine in which nothing happens has thirty to do a second.
_STEP: Final = 33

#: Changes that never end are told nevertheless, after so long (milliseconds).
_DEBOUNCE: Final = 1600

Changed = Callable[[list[str]], None]
_Change = set[tuple[watchfiles.Change, str]]
_Changes = Generator[_Change, None, None]


@contextlib.contextmanager
def watching(settings: Settings, loop: asyncio.AbstractEventLoop, changed: Changed) -> Iterator[None]:
    """Inside the block, have `changed` called on `loop` with the paths of the files that changed.

    No change is missed from the beginning of the block on.  Raises `ClusterError` if the files cannot be watched.
    """
    watched = survey(settings)
    with contextlib.ExitStack() as stack:
        stop = threading.Event()
        for directories, deep in _watches(watched):
            watch = _Watch(watched, directories, deep, settings.reload_delay, stop)
            thread = threading.Thread(target=watch.run, args=(loop, changed), name="clusterserve-watcher", daemon=True)
            thread.start()
            stack.callback(thread.join)
            # First told, then waited for; also if the next one cannot be had.
            stack.callback(stop.set)
        logger.info("Watching for changes: %s", ", ".join(map(_shown, outermost(watched.directories))))
        yield


def survey(settings: Settings) -> Watched:
    """What is to be watched, as the file system is now."""
    includes, excludes = with_defaults(settings.reload_includes, settings.reload_excludes)
    excluded = tuple(_directories(settings.reload_excludes))
    chosen = [os.path.realpath(each) for each in (*settings.reload_dirs, *_directories(settings.reload_includes))]
    chosen = [each for each in chosen if each not in excluded and not any(is_below(each, other) for other in excluded)]
    directories = tuple(dict.fromkeys(chosen or map(os.path.realpath, _usual(settings))))
    return Watched(directories, includes, excludes, excluded, tuple(_extra(settings.reload_extra_files)))


def _usual(settings: Settings) -> Iterator[str]:
    """Where an application is looked for, or a program stands: what else would be edited?"""
    yield os.getcwd()
    if settings.app and settings.app_dir is not None:
        yield settings.app_dir
    if settings.exec and not settings.exec.startswith("-m "):
        yield os.path.dirname(settings.exec) or "."


def _directories(patterns: Iterable[str]) -> Iterator[str]:
    """Those among the patterns, or that fit them in the working directory."""
    for pattern in patterns:
        # uvicorn's exception: `.*` is meant for files.
        for found in [] if pattern == ".*" else [pattern] if os.path.isdir(pattern) else glob.glob(pattern):
            if os.path.isdir(found):
                yield os.path.realpath(found)


def _extra(files: Iterable[str]) -> Iterator[str]:
    for name in files:
        path = os.path.abspath(name)
        directory, file = os.path.split(path)
        yield path
        if is_pattern(path):
            continue
        # As the watch will call it, and where a link leads: who edits the target writes nothing beside the link.
        yield os.path.join(os.path.realpath(directory), file)
        yield os.path.realpath(path)


def _watches(watched: Watched) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Directories, and whether to watch what is below them: a file's neighbours, not what lies below it, may be many.

    A file is watched by its directory: who saves it may well put another in its place.
    """
    bases = {base(file) for file in watched.files}
    deep = outermost([*watched.directories, *(directory for directory, below in bases if below)])
    yield deep, True
    rest = {
        directory
        for directory, below in bases
        if not below and directory not in deep and not any(is_below(directory, other) for other in deep)
    }
    if rest:
        yield tuple(sorted(rest)), False


class _Watch:
    """One set of directories; it is watched from the moment this is made."""

    def __init__(
        self, watched: Watched, directories: tuple[str, ...], deep: bool, delay: float, stop: threading.Event
    ) -> None:
        self._watched = watched
        self._delay = delay
        self._stop = stop
        try:
            try:
                self._changes, self._first = self._begin(directories, deep, tolerant=False)
            except PermissionError:
                # Something below is not for us to see, and is not the application's then.  Not at once: what is
                # tolerated is every error, also that the kernel watches no more files for this user.
                self._changes, self._first = self._begin(directories, deep, tolerant=True)
        except OSError as error:
            raise ClusterError(f"cannot watch {', '.join(directories)} for changes: {error}") from error

    def _begin(self, directories: tuple[str, ...], deep: bool, tolerant: bool) -> tuple[_Changes, _Change]:
        changes = watchfiles.watch(
            *directories,
            watch_filter=lambda change, path: self._watched.counts(path),
            debounce=_DEBOUNCE,
            step=_STEP,
            stop_event=self._stop,
            # Each step comes back to us, or the first would not before something has changed.
            rust_timeout=1,
            yield_on_timeout=True,
            recursive=deep,
            ignore_permission_denied=tolerant,
        )
        # It begins with the first step.  Who edits a file while the workers start must not do so in vain.
        return changes, next(changes)

    def run(self, loop: asyncio.AbstractEventLoop, changed: Changed) -> None:
        """Watch until told to stop."""
        with contextlib.closing(self._changes):
            changes = self._first
            while not self._stop.is_set():
                if changes:
                    self._tell(sorted({path for _, path in changes}), loop, changed)
                    self._stop.wait(self._delay)
                try:
                    changes = next(self._changes, set())
                except (OSError, RuntimeError) as error:  # the second is what watchfiles has for inner trouble
                    logger.error("Files are not watched any more, SIGHUP reloads: %s", error)
                    return

    def _tell(self, paths: list[str], loop: asyncio.AbstractEventLoop, changed: Changed) -> None:
        for path in paths:
            _forget(path)
        # A closed loop has ended: nobody is left to reload.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed, paths)


def _forget(path: str) -> None:
    """Remove what Python has compiled of a source that changed.

    It takes a compiled file for current if time (in seconds) and size are those of the source.  Who saves twice within
    a second would see the first.
    """
    if path.endswith(".py"):
        with contextlib.suppress(OSError, NotImplementedError):
            os.unlink(importlib.util.cache_from_source(path))


def described(paths: list[str]) -> str:
    """For the log: the first few, as seen from here."""
    shown = ", ".join(map(_shown, paths[:3]))
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown


def _shown(path: str) -> str:
    try:
        near = os.path.relpath(path)
    except FileNotFoundError:
        # Our directory was among what was removed.
        return path
    return path if near.startswith("..") or near == "." else near
