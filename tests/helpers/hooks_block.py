"""Hooks of which one does not return."""

from __future__ import annotations

import logging
import threading


def on_ready() -> None:
    logging.getLogger("clusterserve").info("The hook blocks")
    threading.Event().wait()
