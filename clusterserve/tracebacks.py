"""Tracebacks for whoever wrote the application."""

from __future__ import annotations

import traceback


def of_application(exc: BaseException) -> str:
    """The traceback as the application's author knows it: from the first frame that is neither ours nor uvicorn's.

    Without any frame, for a file that is no Python at all: the error itself names file and line.
    """
    frame = exc.__traceback__
    while frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in (
        "clusterserve", "uvicorn", "importlib",
    ):  # fmt: skip
        frame = frame.tb_next
    if frame is None and not isinstance(exc, SyntaxError):
        frame = exc.__traceback__
    return "".join(traceback.format_exception(type(exc), exc, frame))
