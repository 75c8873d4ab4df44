"""What is made once, before workers are forked, and is the same for all of them: the place for it.

`prepare` is called by a template process, and what it returns is inherited by every worker that is forked from it:
copy-on-write, so that what nobody changes is in memory once.  A worker that was not forked has an empty `Prepared`, and
makes for itself what it needs.  So whoever adds something here adds a field whose absence (None) means "not prepared",
fills it in `prepare`, if the settings want it, and looks for it in `serve` (asgi.py), to which it is passed.  When
`Settings.templated` is true there is a template at all.

A process that is forked from has one thread, no event loop, and no descriptor that only one of its forks may use:
`worker.template` sees to the first two of these.  What is prepared must leave it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..settings import Settings


@dataclass(frozen=True)
class Prepared:
    """What a worker has from its template."""

    #: The application, its factory called: `--preload`.
    app: Any = None


def prepare(settings: Settings) -> Prepared:
    """Make it.  Raises `BootError` for what of the application's cannot be had."""
    # Imported even if nothing is to be made with it: the workers need not import uvicorn any more.
    from .asgi import preload

    return Prepared(app=preload(settings) if settings.preload else None)
