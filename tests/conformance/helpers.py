"""What the conformance tests are made of: clusters of plain scripts, and everything such a cluster tells, in order.

    def test_K01_…(scene: Scene) -> None:
        async def main() -> None:
            async with scene.cluster("sys.exit(42)") as (cluster, told):
                worker = cluster.fork()
                await told.until("exit", worker)
        scene.run(main())

A script begins with `PRELUDE`: it may `say(…)` things, which `Scene.said` returns, and has itself as `worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from clusterserve import Cluster, Worker
from tests.helpers import proc

T = TypeVar("T")

#: A passing test never notices how long it is; on a crowded machine a worker needs seconds to come up.
PATIENCE: Final = 45.0

PRELUDE: Final = """
import asyncio, json, os, signal, socket, sys, threading, time
import clusterserve
from clusterserve import current_worker

worker = current_worker()

def say(*words):
    with open(os.environ["REPORT"], "a") as file:
        file.write(json.dumps(words) + "\\n")

async def serve(host="127.0.0.1", port=0, answer=None):
    async def answers(reader, writer):
        await reader.readline()
        writer.write((answer or str(os.getpid())).encode())
        writer.close()
    return await asyncio.start_server(answers, host, port)

async def forever():
    await asyncio.Event().wait()

"""

#: Listens on one port, whose clients are told the worker's pid, until it is disconnected.
LISTENS: Final = """
async def main():
    async with await serve():
        await forever()
asyncio.run(main())
"""

#: Never listens, and lives until it is disconnected.
IDLES: Final = "asyncio.run(forever())"


class Told(NamedTuple):
    """One event, and the worker as it was in its handlers."""

    event: str
    #: Its id; 0 if the event is about none.
    worker: int
    state: str
    #: What came with the event, without the worker.
    details: tuple[Any, ...]
    connected: bool
    dead: bool
    flag: bool | None
    #: The ids in `cluster.workers` at that moment.
    listed: tuple[int, ...]
    at: float


EVENTS: Final = (
    "setup", "fork", "online", "listening", "message", "draining", "kill", "disconnect", "exit", "error", "ready",
    "reload", "scale", "shutdown", "stopped",
)  # fmt: skip
OF_WORKERS: Final = ("online", "listening", "message", "draining", "disconnect", "exit", "error")


class Recorder:
    """Everything a cluster and its workers tell, in order."""

    def __init__(self, cluster: Cluster, patience: float = PATIENCE) -> None:
        self._cluster = cluster
        self._patience = patience
        #: On the cluster; and on the workers themselves.
        self.all: list[Told] = []
        self.own: list[Told] = []
        self._news = asyncio.Event()
        for name in EVENTS:
            cluster.on(name, self._listener(name))
        cluster.on("fork", self.follow)

    def follow(self, worker: Worker) -> None:
        """Listen to the worker itself, too."""
        for name in OF_WORKERS:
            worker.on(name, lambda *details, name=name: self._note(self.own, name, worker, details))

    def _listener(self, name: str) -> Callable[..., None]:
        def listener(*details: Any) -> None:
            if details and isinstance(details[0], Worker):
                self._note(self.all, name, details[0], details[1:])
            else:
                self._note(self.all, name, Worker(), details)

        return listener

    def _note(self, where: list[Told], name: str, worker: Worker, details: tuple[Any, ...]) -> None:
        state = (worker.is_connected(), worker.is_dead(), worker.exited_after_disconnect)
        where.append(Told(name, worker.id, worker.state, details, *state, tuple(self._cluster.workers), time.time()))
        self._news.set()

    def names(self, worker: Worker, *, own: bool = False) -> list[str]:
        """The names of what was told of it."""
        return [each.event for each in (self.own if own else self.all) if each.worker == worker.id]

    def the(self, name: str, worker: Worker | None = None, *, own: bool = False) -> Told:
        """The one event of this name, of this worker."""
        (only,) = self.every(name, worker, own=own)
        return only

    def every(self, name: str, worker: Worker | None = None, *, own: bool = False) -> list[Told]:
        told = self.own if own else self.all
        return [each for each in told if each.event == name and (worker is None or each.worker == worker.id)]

    async def until(self, name: str, worker: Worker | None = None, count: int = 1) -> list[Told]:
        """Wait for `count` events of this name, and return all there are."""
        await self.when(lambda: len(self.every(name, worker)) >= count, f"{count} × {name} of {worker}")
        return self.every(name, worker)

    async def when(self, predicate: Callable[[], T], what: str) -> T:
        """Wait until the answer is true, and return it; asked again at every event, and now and then in between."""
        deadline = time.monotonic() + self._patience
        while not (answer := predicate()):
            if time.monotonic() > deadline:
                story = [each[:4] for each in self.all]
                raise AssertionError(
                    f"not within {self._patience:g} s: {what} (last answer: {answer!r}); told: {story}"
                )
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), 0.02)
        return answer


class Scene:
    """A directory for a test's scripts, and what these say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._report = path / "report"
        self._count = 0
        #: For how long a recorder waits (seconds): a test that is to fail need not wait for long.
        self.patience = PATIENCE
        #: The workers': what `say` needs, and what a test adds.
        self.environment = {"REPORT": str(self._report)}

    def script(self, source: str) -> str:
        """The path of a script with this source behind the prelude."""
        self._count += 1
        file = self.path / f"script{self._count}.py"
        file.write_text(PRELUDE + textwrap.dedent(source))
        return str(file)

    @contextlib.asynccontextmanager
    async def cluster(self, source: str = IDLES, **settings: Any) -> AsyncIterator[tuple[Cluster, Recorder]]:
        """A cluster whose program decides how many workers there are, each of which runs this script."""
        env = {**self.environment, **settings.pop("env", {})}
        options: dict[str, Any] = {"respawn": False, **settings}
        if "app" not in options:
            options.setdefault("exec", self.script(source))
        cluster = Cluster(env=env, **options)
        told = Recorder(cluster, self.patience)
        async with cluster:
            yield cluster, told

    def said(self) -> list[list[Any]]:
        """What the scripts have said so far, in order."""
        if not self._report.exists():
            return []
        return [json.loads(line) for line in self._report.read_text().splitlines()]

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a test's coroutine; no worker may be left behind."""
        result = asyncio.run(main)
        assert proc.children(os.getpid()) == []
        return result


async def ask(port: int, host: str = "127.0.0.1") -> str:
    """What a worker answers a fresh connection."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"hello\n")
        return (await asyncio.wait_for(reader.read(), PATIENCE)).decode()
    finally:
        writer.close()
