"""What a configuration puts into this process's environment: it can be read again as if it had put nothing there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


class Environment:
    """`os.environ`, and who set what of it.  Only what is set within `anew` is taken back."""

    def __init__(self) -> None:
        #: By name: what it was before us (None: nothing), and what we have made it.
        self._set: dict[str, tuple[str | None, str]] = {}
        #: The variables that the last block has changed.
        self.changed: tuple[str, ...] = ()

    @contextlib.contextmanager
    def anew(self) -> Iterator[None]:
        """Inside the block, what the last one has set is as it was before; if this one raises, it is set again."""
        known = dict(os.environ)
        for name, (before, ours) in self._set.items():
            # Somebody else may have changed it since: then it is theirs.
            if os.environ.get(name) == ours:
                _put(name, before)
        bare = dict(os.environ)
        try:
            yield
        except BaseException:
            for name in known.keys() | os.environ.keys():
                _put(name, known.get(name))
            raise
        self._set = {name: (bare.get(name), value) for name, value in os.environ.items() if bare.get(name) != value}
        self.changed = tuple(
            sorted(name for name in known.keys() | os.environ.keys() if known.get(name) != os.environ.get(name))
        )

    def memory(self) -> Callable[[], None]:
        """What is called to have everything of ours as it is now, whatever blocks come in between."""
        known, ours = dict(os.environ), dict(self._set)

        def again() -> None:
            for name in self._set.keys() | ours.keys():
                made = self._set[name][1] if name in self._set else ours[name][0]
                # As in `anew`.
                if os.environ.get(name) == made:
                    _put(name, known.get(name))
            self._set = ours

        return again


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
