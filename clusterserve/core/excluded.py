"""`Excluded`: the requests that `--access-log-exclude` keeps out of the access log."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from urllib.parse import unquote


class Excluded:
    """Paths by patterns as a shell has them: `*` stands for anything, slashes too, as in `/health*`."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._matches = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)").match

    def __call__(self, path: str, status: int) -> bool:
        """Whether a request is left out: one that failed never is."""
        return status < 400 and self._matches(path) is not None

    def of_target(self, target: str, status: int) -> bool:
        """The same for a path that is quoted, and maybe has a query."""
        return self(unquote(target.partition("?")[0]), status)
