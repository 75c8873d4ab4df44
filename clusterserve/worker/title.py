"""The worker's title: who it is, what it does, and how much of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ..current import current_worker
from ..settings import Settings
from ..titles import titler

#: How often it is looked at (seconds).
_PAUSE: Final = 1.0


class Title:
    """Kept up to date from `start` on, as long as the loop runs.  `load` says what the worker does, in a few words."""

    def __init__(self, settings: Settings, load: Callable[[], str]) -> None:
        self._set = titler()
        self._load = load
        self._shown = ""
        worker = current_worker()
        who = "" if worker is None else f" {worker.id} (slot {worker.slot})"
        self._begin = f"clusterserve: worker{who} [{settings.title}]"
        self._show("starting")

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the load every second, if there is anything to show it with."""
        if self._set is not None:
            self._show(self._load())
            loop.call_later(_PAUSE, self.start, loop)

    def _show(self, state: str) -> None:
        if self._set is not None and state != self._shown:
            self._shown = state
            self._set(f"{self._begin} {state}")
