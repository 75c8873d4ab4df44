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

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..credentials import new_context
from ..log_files import WorkerFiles, lifted
from ..settings import Settings


@dataclass(frozen=True)
class Prepared:
    """What a worker has from its template."""

    #: The application, its factory called: `--preload`.
    app: Any = None
    #: Where the log goes, whose loggers are set up then.
    log: WorkerFiles | None = None
    #: What the contexts of all workers are, so that they resume each other's TLS sessions: the keys of session tickets
    #: are made with the context, and nothing else can set them.
    tls: ssl.SSLContext | None = None
    #: What the sessions of `tls` are for: `credentials.terms`.
    terms: str = ""


def prepare(settings: Settings, files: Sequence[int] = (), terms: str = "") -> Prepared:
    """Make it.  Raises `BootError` for what of the application's cannot be had.

    `files` are the descriptors of the log's files, from now on this function's own.  `terms` are those of TLS.
    """
    # Most of a worker's start are these imports: uvicorn, and its protocols.
    from .asgi import import_protocols, preload

    tls = new_context(settings) if settings.tls else None
    if not settings.preload:
        for fd in files:
            os.close(fd)
        import_protocols(settings)
        return Prepared(tls=tls, terms=terms)
    # Out of the way of the numbers that workers are given with `stdio`.
    log = WorkerFiles(settings, lifted(files))
    return Prepared(app=preload(settings, log), log=log, tls=tls, terms=terms)
