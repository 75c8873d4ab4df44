"""What a configuration changes of the process that reads it, its directory and its variables, and the way back."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from clusterserve.environment import Environment
from clusterserve.settings import Settings


class Surroundings:
    """As they are now: `restore` goes back, `close` does not want to any more.  Either ends it.

    `environment` is told what is set again.  Owns a descriptor of the directory; raises OSError if it cannot be had.
    """

    def __init__(self, environment: Environment) -> None:
        # Not its name: it may have been removed, and then has none.
        self._directory = os.open(".", os.O_PATH | os.O_DIRECTORY)
        self._set_again = environment.memory()

    def restore(self) -> None:
        self._set_again()
        # One that may not be entered any more is no place to go back to.
        with contextlib.suppress(OSError):
            os.fchdir(self._directory)
        self.close()

    def close(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


class Reading(NamedTuple):
    """A configuration that was read again, and what was before; `before` is the reader's to end."""

    settings: Settings
    before: Surroundings
