"""Hooks that write down what they hear, a line of JSON each, into the file named by HOOKS_FILE."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading

from clusterserve.core.address import Address
from clusterserve.core.events import WorkerName


def _note(name: str, worker: WorkerName | None = None, *details: object) -> None:
    about = None if worker is None else [worker.id, worker.slot, worker.pid]
    where = [os.getpid(), threading.current_thread().name]
    with open(os.environ["HOOKS_FILE"], "a") as file:
        file.write(json.dumps([name, about, list(details), where]) + "\n")


def on_fork(worker: WorkerName) -> None:
    _note("fork", worker)


async def on_online(worker: WorkerName) -> None:
    await asyncio.sleep(0)
    _note("online", worker)


def on_listening(worker: WorkerName, address: Address) -> None:
    _note("listening", worker, str(address))


def on_draining(worker: WorkerName) -> None:
    _note("draining", worker)


def on_disconnect(worker: WorkerName) -> None:
    _note("disconnect", worker)


def on_kill(worker: WorkerName, reason: str) -> None:
    _note("kill", worker, reason)


def on_exit(worker: WorkerName, code: int | None, signal: int | None) -> None:
    _note("exit", worker, code, signal)
    if code == 7:
        raise RuntimeError("the hook's own trouble")


def on_ready() -> None:
    _note("ready", None, gc.get_freeze_count() > 0)


def on_reload() -> None:
    _note("reload")


def on_scale(workers: int, before: int) -> None:
    _note("scale", None, workers, before)


def on_shutdown() -> None:
    _note("shutdown")


async def on_stopped() -> None:
    _note("stopped")
