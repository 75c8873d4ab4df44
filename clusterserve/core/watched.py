"""Which changed files call for a reload.  Paths are absolute, and text; nothing here looks at a disk.

uvicorn's rules, with what its documentation says of directories: a file counts if its name, or as much of the end of
its path as the pattern has parts, fits one of the includes and none of the excludes.  An include without wildcards wins
over the excludes.  What lies below hidden directories, `__pycache__`, `node_modules` and `site-packages` (so all that
is installed in a virtual environment) never counts, unless that directory is itself one of those that are watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

#: uvicorn's.
INCLUDES: Final = ("*.py",)
EXCLUDES: Final = (".*", ".py[cod]", ".sw.*", "~*")

#: Besides hidden ones.
_NOBODYS: Final = frozenset({"__pycache__", "node_modules", "site-packages"})

_WILD: Final = frozenset("*?[")


@dataclass(frozen=True)
class Watched:
    """`directories` are watched with all that lies below, and `excluded` ones are not.

    `files` are paths, or patterns of paths as glob has them, that count wherever they are.
    """

    directories: tuple[str, ...]
    includes: tuple[str, ...] = INCLUDES
    excludes: tuple[str, ...] = EXCLUDES
    excluded: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def counts(self, path: str) -> bool:
        """Whether a change of this file calls for a reload."""
        if any(_globs(path, pattern) if is_pattern(pattern) else path == pattern for pattern in self.files):
            return True
        homes = [directory for directory in self.directories if is_below(path, directory)]
        if not homes:
            return False
        between = _parts(path)[len(_parts(max(homes, key=len))) : -1]
        if any(part.startswith(".") or part in _NOBODYS for part in between):
            return False
        fitting = [pattern for pattern in self.includes if _ends(path, pattern)]
        if any(not is_pattern(pattern) for pattern in fitting):
            return True
        return (
            bool(fitting)
            and not any(is_below(path, directory) for directory in self.excluded)
            and not any(_ends(path, pattern) for pattern in self.excludes)
        )


def with_defaults(includes: Iterable[str], excludes: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both with uvicorn's defaults, save for those that the other one takes back."""
    more, less = tuple(includes), tuple(excludes)
    return (
        (*(each for each in INCLUDES if each not in less), *more),
        (*(each for each in EXCLUDES if each not in more), *less),
    )


def is_pattern(text: str) -> bool:
    """Whether it has wildcards."""
    return not _WILD.isdisjoint(text)


def is_below(path: str, directory: str) -> bool:
    """Whether `path` lies in `directory`, however deep."""
    return path != directory and path.startswith(directory.rstrip("/") + "/")


def outermost(directories: Iterable[str]) -> tuple[str, ...]:
    """Those that lie below no other, which are all that need be watched."""
    every = sorted(set(directories))
    return tuple(each for each in every if not any(is_below(each, other) for other in every))


def base(pattern: str) -> tuple[str, bool]:
    """The directory below which everything lies that fits a pattern of `files`, and whether it may be deep below."""
    parts = pattern.split("/")
    # A pattern's name is never part of it, nor is what follows the first wildcard.
    fixed = next((index for index, part in enumerate(parts) if is_pattern(part)), len(parts) - 1)
    return "/".join(parts[:fixed]) or "/", fixed < len(parts) - 1 or parts[-1] == "**"


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _ends(path: str, pattern: str) -> bool:
    """Whether the end of the path fits, part by part (pathlib's `match`); all of it, for an absolute pattern."""
    found, wanted = _parts(path), _parts(pattern)
    if not wanted or len(found) < len(wanted) or (pattern.startswith("/") and len(found) != len(wanted)):
        return False
    return all(map(fnmatchcase, found[-len(wanted) :], wanted))


def _globs(path: str, pattern: str) -> bool:
    """Whether glob would find the path: wildcards find nothing hidden, and `**` stands for any directories."""
    return _spans(_parts(path), _parts(pattern))


def _spans(found: list[str], wanted: list[str]) -> bool:
    if not wanted or not found:
        return not wanted and not found
    if wanted == ["**"]:
        return not any(part.startswith(".") for part in found)
    if wanted[0] == "**":
        return _spans(found, wanted[1:]) or (not found[0].startswith(".") and _spans(found[1:], wanted))
    hidden = found[0].startswith(".") and not wanted[0].startswith(".")
    return not hidden and fnmatchcase(found[0], wanted[0]) and _spans(found[1:], wanted[1:])
