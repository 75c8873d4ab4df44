"""Hooks that write down when a worker was forked and when it listens, to the file BENCHMARK_TOLD."""

from __future__ import annotations

import os
import time
from typing import Any


def _write(what: str, worker: Any) -> None:
    with open(os.environ["BENCHMARK_TOLD"], "a") as file:
        file.write(f"{what} {worker.id} {worker.pid} {time.monotonic()}\n")


def on_fork(worker: Any) -> None:
    _write("fork", worker)


def on_listening(worker: Any, address: Any) -> None:
    _write("listening", worker)
