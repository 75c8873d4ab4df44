"""Workers that have served enough, long enough, or hold too much memory are replaced, and no client notices."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.load import under_load
from tests.helpers.server import WORKER_LISTENS, Serve, Server
from tests.helpers.waiting import eventually

FULL = "tests.helpers.apps.full:app"

REPLACES = re.compile(r"Worker (\d+) is to replace worker (\d+) \(slot (\d+), pid (\d+)\), which (.*)")

EVERYWHERE = pytest.mark.parametrize(
    "mode",
    [("--dispatch", "connection"), ("--dispatch", "request"), ("--policy", "none")],
    ids=["connection", "request", "none"],
)


def gone(server: Server, *ids: int) -> None:
    """These workers have left."""
    eventually(lambda: not {worker.id for worker in server.workers} & set(ids), f"workers {ids} are gone")


def order_of_events(server: Server) -> list[str]:
    """What was told of replacements, in words: "3 for 1" when it starts, "3" when it listens."""
    events = []
    for line in server.lines:
        if match := REPLACES.search(line.text):
            events.append(f"{match[1]} for {match[2]}")
        elif match := WORKER_LISTENS.search(line.text):
            events.append(match[1])
    return events


@pytest.mark.parametrize("dispatch", ["connection", "request"])
def test_nothing_is_lost_under_load(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, "--limit-max-requests", "100", "--no-access-log", app=FULL, workers=2)
    server.warm()
    with under_load(server.address, clients=2) as load:
        server.wait_for(REPLACES, count=3)
        load.answered(5)
    # Only one replacement boots at a time: who starts next does when the last one listens.
    events = [event for event in order_of_events(server) if event not in ("1", "2")]
    for start, listens in zip(events[::2], events[1::2], strict=False):
        assert start.startswith(f"{listens} for "), events
    assert not server.found("ERROR|WARNING")


@EVERYWHERE
def test_a_worker_that_has_served_enough(serve: Serve, mode: tuple[str, str]) -> None:
    server = serve(*mode, "--max-requests", "5", workers=1)
    old = server.workers[0]
    with server.connect() as client:
        assert [client.ask("GET", "/whoami").json()["id"] for _ in range(4)] == [1] * 4
        assert not server.found(REPLACES)
        assert client.ask("GET", "/whoami").json()["id"] == 1
        (told,) = server.wait_for(REPLACES)
        assert told.groups() == ("2", "1", "0", str(old.pid), "has served 5 requests")
        gone(server, 1)
    assert server.ask_id() == 2
    assert order_of_events(server) == ["1", "2 for 1", "2"]


def test_requests_are_counted_by_what_was_answered(serve: Serve) -> None:
    server = serve("--limit-max-requests", "1", workers=1)
    with server.connect() as client:
        # Connections alone wear nobody out.
        assert server.connect().close() is None
        assert client.ask("GET", "/whoami").json()["id"] == 1
    gone(server, 1)
    assert server.ask_id() == 2


def test_each_has_its_own_jitter(serve: Serve) -> None:
    server = serve("--workers-lifetime", "0.5", "--workers-lifetime-jitter", "1000000", workers=2)
    server.warm()
    # Else both had been replaced by now, one after the other.
    assert not server.found(REPLACES)
    server = serve("--limit-max-requests", "1", "--limit-max-requests-jitter", "1000000", workers=1)
    assert [server.ask_id() for _ in range(20)] == [1] * 20


def test_a_worker_that_has_served_long_enough(serve: Serve) -> None:
    server = serve("--workers-lifetime", "2", workers=2)
    listened = server.times(WORKER_LISTENS)
    server.wait_for(REPLACES, count=2)
    (first, second) = server.times(REPLACES)
    # Less what these tests may be late in reading that it listens.
    assert first >= listened[0] + 1.0
    gone(server, 1, 2)
    # They were of one age, and went one after the other all the same.
    assert second >= server.times(WORKER_LISTENS)[2]
    assert {match[5] for match in server.found(REPLACES)} == {"has served for 2 s"}
    assert server.get("/").status == 200


def test_a_worker_that_holds_too_much_memory(serve: Serve) -> None:
    memory = ("--workers-max-rss", "200M", "--rss-sample-interval", "0.05", "--rss-samples", "3")
    server = serve(*memory, "--timeout-keep-alive", "60", app="tests.helpers.apps.greedy:app", workers=2).warm()
    assert not server.found(REPLACES)
    with server.connect() as client:
        pid = int(client.ask("GET", "/grow?mib=200").text)
        (told,) = server.wait_for(REPLACES)
        assert told[4] == str(pid)
        assert re.fullmatch(r"holds 2\d\d MiB of memory, more than 200", told[5])
        eventually(lambda: not proc.alive(pid), "it has left")
        assert client.ask("GET", "/whoami").json()["id"] != int(told[2])
    assert len(server.found(REPLACES)) == 1


def test_a_replacement_that_cannot_start_leaves_the_old_one_serving(serve: Serve, tmp_path: Path) -> None:
    switch = tmp_path / "off"
    server = serve(
        *("--limit-max-requests", "3", "--restart-backoff", "0.1", "--restart-backoff-max", "0.4"),
        *("--timeout-keep-alive", "60", "--dispatch", "connection"),
        app="tests.helpers.apps.switch:app",
        workers=2,
        env={"SWITCH_FILE": str(switch)},
        noise=True,
    )
    switch.touch()
    began = time.monotonic()
    with server.connect() as client:
        first = client.ask("GET", "/whoami").json()["id"]
        assert [client.ask("GET", "/whoami").json()["id"] for _ in range(9)] == [first] * 9
        server.wait_for("RuntimeError: switched off", count=4)
        assert time.monotonic() - began >= 0.1 + 0.2 + 0.4
        # One slot tries, and the worker it is for goes on.
        assert {match[2] for match in server.found(REPLACES)} == {str(first)}
        assert client.ask("GET", "/whoami").json()["id"] == first
        switch.unlink()
        gone(server, first)
        assert client.ask("GET", "/whoami").status == 200


def test_a_reload_beside_it(serve: Serve) -> None:
    server = serve("--limit-max-requests", "30", "--no-access-log", app=FULL, workers=2)
    with under_load(server.address, clients=1) as load:
        for generation in (2, 3):
            server.wait_for(REPLACES, count=generation - 1)
            server.signal(signal.SIGHUP)
            server.wait_for(f"Reloading: generation {generation}")
            load.answered(5)
    assert not server.found("ERROR|WARNING")


def test_an_end_while_a_replacement_boots(serve: Serve) -> None:
    server = serve("--limit-max-requests", "1", workers=2)
    server.get("/")
    server.wait_for(REPLACES)
    assert server.stop() == 0
