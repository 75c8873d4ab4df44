"""SIGPWR to the master: every worker tells what its threads and its tasks do."""

from __future__ import annotations

import os
import re
import signal

from tests.helpers.raw import request
from tests.helpers.server import Serve, Server, Worker
from tests.helpers.waiting import eventually

HEADER = re.compile(r"Worker (\d+) \(slot \d+, pid \d+\), (?:stacks of its threads and tasks|continued):$")
IN_A_STACK = re.compile(r'Thread |Current thread |Task |  File "|  \.\.\.|  <|It|$')


def blocks(server: Server) -> dict[int, list[str]]:
    """What each worker told, by its id; fails on a line that belongs nowhere."""
    told: dict[int, list[str]] = {}
    block: list[str] = []
    for line in server.lines:
        header = HEADER.search(line.text)
        if header is not None:
            block = told.setdefault(int(header[1]), [])
        elif line.stream == "err" and told:
            if IN_A_STACK.match(line.text):
                block.append(line.text)
            else:
                # A line of the log is whole, and begins with its level.
                assert re.match(r"[A-Z]+: +\S", line.text), line.text
    return told


def dump(server: Server, *workers: Worker) -> dict[int, list[str]]:
    server.signal(signal.SIGPWR)
    for worker in workers:
        server.wait_for(rf"Worker {worker.id} \(slot {worker.slot}, pid {worker.pid}\), stacks of")
    # What follows a header is written with it.
    eventually(lambda: all(blocks(server).get(worker.id) for worker in workers), "every block has lines")
    return blocks(server)


def test_each_thread_and_each_task(serve: Serve) -> None:
    server = serve(workers=2)
    with server.connect() as first, server.connect() as second:
        for client in (first, second):
            client.send(request("GET", "/sleep?ms=60000"))
        eventually(lambda: dump_has_both(server), "both handlers stand in a stack")
        server.signal(signal.SIGQUIT)
        server.wait()


def dump_has_both(server: Server) -> bool:
    told = dump(server, *server.workers)
    texts = ["\n".join(told[worker.id]) for worker in server.workers]
    task = r'^Task .*\(most recent call first\):\n(  File ".*\n)*  File ".*asgi_app\.py", line \d+ in sleep'
    thread = r"^Current thread MainThread \(0x[0-9a-f]{16}\).*\(most recent call first\):\n  File "
    return all(re.search(task, text, re.MULTILINE) and re.search(thread, text, re.MULTILINE) for text in texts)


def test_a_worker_that_holds_its_loop_tells_its_threads(serve: Serve) -> None:
    server = serve(workers=2)
    with server.connect() as client:
        client.send(request("GET", "/block?ms=60000"))
        # It is in the handler when its stack says so.
        held: list[str] = []

        def told() -> bool:
            held[:] = ["\n".join(lines) for lines in dump(server, *server.workers).values()]
            return any("asgi_app.py" in text and " in block" in text for text in held)

        eventually(told, "the handler stands in a stack")
        (text,) = (each for each in held if " in block" in each)
        assert "Its event loop has not turned for 1 s: its tasks are not known." in text
        (other,) = (each for each in held if " in block" not in each)
        assert re.search(r"^Task .* in serve$", other, re.MULTILINE | re.DOTALL)
        server.signal(signal.SIGQUIT)
        server.wait()


def test_a_stopped_worker_keeps_nobody_waiting(serve: Serve) -> None:
    server = serve(workers=2)
    stopped, other = server.workers
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        server.signal(signal.SIGPWR)
        server.wait_for(rf"Worker {stopped.id} .* has not told its stacks: it is stopped, or had no time")
        server.wait_for(rf"Worker {other.id} .*, stacks of")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    assert server.get("/").status == 200
    assert len(server.workers) == 2


def test_a_worker_that_dies_in_between(serve: Serve) -> None:
    server = serve("--restart-backoff", "0.01", workers=2)
    victim = server.workers[0]
    for _ in range(5):
        server.signal(signal.SIGPWR)
    os.kill(victim.pid, signal.SIGKILL)
    server.wait_for(r"Worker 3 \(.*is listening")
    dump(server, *server.workers)
    assert server.get("/").status == 200


def test_the_whole_group_may_be_told(serve: Serve) -> None:
    """`kill -PWR -- -PGID`: the workers hear it themselves as well."""
    server = serve(workers=2)
    before = server.workers
    os.killpg(server.pid, signal.SIGPWR)
    server.wait_for(r", stacks of", count=2)
    assert server.workers == before
    assert server.get("/").status == 200
