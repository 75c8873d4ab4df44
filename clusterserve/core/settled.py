"""`Settled`: whether what one looks at from time to time has changed, and has come to rest."""

from __future__ import annotations

from collections.abc import Hashable


class Settled:
    """Several files change one after the other: a change counts when two looks in a row have found the same."""

    def __init__(self, first: Hashable) -> None:
        self._known = self._last = first

    def look(self, seen: Hashable) -> bool:
        """Whether this is new, and was seen at the last look too.  True once for each change."""
        before, self._last = self._last, seen
        if seen == self._known or seen != before:
            return False
        self._known = seen
        return True

    def heed(self, seen: Hashable) -> None:
        """It is known: no change."""
        self._known = self._last = seen
