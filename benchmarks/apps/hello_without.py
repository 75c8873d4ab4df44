"""`hello`, in a worker with one of its steps undone; see `benchmarks.without`."""

from __future__ import annotations

import gc
import os
from typing import Any

from benchmarks.apps.hello import app
from clusterserve.worker.server import Entrance

__all__ = ["app"]

_made = Entrance.__init__


def _never_lazy(self: Entrance, *arguments: Any, **options: Any) -> None:
    _made(self, *arguments, **options)
    # One whose client need not speak first gets a transport of the loop's at once.
    self.client_speaks_first = False


if os.environ["BENCHMARKS_WITHOUT"] == "lazy":
    Entrance.__init__ = _never_lazy  # type: ignore[method-assign]
elif os.environ["BENCHMARKS_WITHOUT"] == "freeze":
    gc.freeze = lambda: None
