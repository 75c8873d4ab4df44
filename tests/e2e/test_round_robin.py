"""Which worker gets a connection, under each policy."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.raw import Client, fetch
from tests.helpers.server import IN_TURN, Serve, Server, Worker, serving
from tests.helpers.waiting import eventually


def worker_of(client: Client) -> int:
    """Which worker answers on this connection."""
    worker_id = client.ask("GET", "/whoami").json()["id"]
    assert isinstance(worker_id, int)
    return worker_id


def close(server: Server, clients: list[Client]) -> None:
    """Close connections, and wait until no process of the server holds its end of any of them."""
    inodes = set(proc.accepted_inodes(server.address.port, [client.port for client in clients]).values())
    assert len(inodes) == len(clients)
    for client in clients:
        client.close()
    pids = server.processes()
    eventually(
        lambda: not any(inodes & proc.socket_inodes(pid) for pid in pids),
        "the server has let go of the closed connections",
    )


@pytest.fixture(scope="module")
def rr() -> Iterator[Server]:
    """Connections are for as long as they last: on a busy machine, too, nobody is passed over."""
    with serving() as serve:
        yield serve("--policy", "rr", *IN_TURN, workers=4).warm()


@pytest.fixture(scope="module")
def auto() -> Iterator[Server]:
    with serving() as serve:
        yield serve("--policy", "rr", workers=4).warm()


@pytest.fixture(scope="module")
def least() -> Iterator[Server]:
    with serving() as serve:
        yield serve("--policy", "least", *IN_TURN, workers=2).warm()


@pytest.fixture(scope="module")
def hashed() -> Iterator[tuple[Server, int]]:
    """A server under `hash`, and the port where the same workers see IPv4 clients as IPv4-mapped ones."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as dual, serving() as serve:
        dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        dual.bind(("::", 0))
        dual.listen(128)
        server = serve(
            "--policy",
            "hash",
            workers=4,
            bind=["127.0.0.1:0", f"fd://{dual.fileno()}"],
            pass_fds=[dual.fileno()],
        )
        yield server, dual.getsockname()[1]


# ── rr ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_four_hundred_connections_are_a_hundred_each_in_turn(rr: Server) -> None:
    ids = [rr.ask_id() for _ in range(400)]
    assert Counter(ids) == dict.fromkeys((1, 2, 3, 4), 100)
    cycle = ids[:4]
    assert sorted(cycle) == [1, 2, 3, 4]
    assert ids == cycle * 100


def test_four_hundred_connections_are_spread_evenly_by_auto_too(auto: Server) -> None:
    """A worker that the machine lets wait may be passed over now and then: not waiting counts for more."""
    counts = Counter(auto.ask_id() for _ in range(400))
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(60 <= count <= 140 for count in counts.values()), counts


def test_open_connections_are_spread_evenly_too(rr: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(rr.connect()) for _ in range(40)]
        counts = Counter(worker_of(client) for client in clients)
    assert counts == dict.fromkeys((1, 2, 3, 4), 10)


def test_a_kept_connection_stays_with_its_worker(rr: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(rr.connect()) for _ in range(8)]
        first = [worker_of(client) for client in clients]
        for _ in range(10):
            assert [worker_of(client) for client in clients] == first


def test_the_greeting_shows_the_turn(rr: Server) -> None:
    greetings = {rr.get("/").text for _ in range(4)}
    assert greetings == {f"Hello from worker {each.id} (slot {each.slot}, pid {each.pid})\n" for each in rr.workers}


def test_ids_slots_and_pids_are_what_the_output_says(rr: Server) -> None:
    answers = {Worker(**rr.get("/whoami").json()) for _ in range(4)}
    assert sorted(answers, key=lambda each: each.slot) == rr.workers
    assert sorted(each.id for each in answers) == [1, 2, 3, 4]
    assert [each.slot for each in rr.workers] == [0, 1, 2, 3]


def test_rr_is_the_default_and_each_worker_serves_every_address(serve: Serve) -> None:
    server = serve(*IN_TURN, workers=2, bind=["127.0.0.1:0", "127.0.0.1:0"]).warm()
    ids = [server.ask_id() for _ in range(10)]
    assert ids == ids[:2] * 5
    assert sorted(ids[:2]) == [1, 2]
    for address in server.addresses:
        assert Counter(fetch(address, "/whoami").json()["id"] for _ in range(10)) == {1: 5, 2: 5}


def test_the_option_outranks_the_environment(serve: Serve) -> None:
    server = serve("--policy", "rr", *IN_TURN, workers=2, env={"CLUSTERSERVE_POLICY": "none"}).warm()
    ids = [server.ask_id() for _ in range(10)]
    assert ids == ids[:2] * 5


# ── least ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_least_fills_up_who_has_fewest(least: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(least.connect()) for _ in range(10)]
        owners = [worker_of(client) for client in clients]
        assert Counter(owners) == {1: 5, 2: 5}
        close(least, [client for client, owner in zip(clients, owners, strict=True) if owner == 2])
        again = [worker_of(stack.enter_context(least.connect())) for _ in range(5)]
        assert again == [2] * 5
        # Level once more: the next two go to one each.
        assert sorted(worker_of(stack.enter_context(least.connect())) for _ in range(2)) == [1, 2]


def test_least_takes_turns_when_all_are_equal(least: Server) -> None:
    counts: Counter[int] = Counter()
    for _ in range(20):
        client = least.connect()
        counts[worker_of(client)] += 1
        close(least, [client])
    assert counts == {1: 10, 2: 10}


# ── hash ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CLIENTS = [f"127.0.0.{last}" for last in range(2, 34)]


def slots(server: Server, port: int) -> dict[str, int]:
    address = server.address.reached_by("127.0.0.1")
    if port != address.port:
        address = next(each for each in server.addresses if each.port == port).reached_by("127.0.0.1")
    return {client: fetch(address, "/whoami", source=client).json()["slot"] for client in CLIENTS}


def test_hash_gives_a_client_always_the_same_worker(hashed: tuple[Server, int]) -> None:
    server, _ = hashed
    first = slots(server, server.address.port)
    assert len(set(first.values())) > 1
    for _ in range(3):
        assert slots(server, server.address.port) == first


def test_hash_takes_a_mapped_address_for_the_ipv4_address_that_it_is(hashed: tuple[Server, int]) -> None:
    server, dual_port = hashed
    assert slots(server, dual_port) == slots(server, server.address.port)


def test_hash_keeps_its_choice_when_a_worker_is_replaced(serve: Serve) -> None:
    server = serve("--policy", "hash", "--restart-backoff", "0.01", workers=2)
    before = slots(server, server.address.port)
    victim = server.workers[before[CLIENTS[0]]]
    os.kill(victim.pid, signal.SIGKILL)
    # The slot's clients wait for its next worker; nobody is moved to the other slot meanwhile.
    assert slots(server, server.address.port) == before
    server.wait_for(rf"Worker 3 \(slot {victim.slot},")


def test_hash_without_a_client_address_takes_turns(serve: Serve, tmp_path: Path) -> None:
    server = serve("--policy", "hash", *IN_TURN, workers=2, bind=f"unix:{tmp_path / 's'}").warm()
    assert Counter(server.ask_id() for _ in range(10)) == {1: 5, 2: 5}


# ── none ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["CLUSTERSERVE_POLICY", "CLUSTERSERVE_SCHED_POLICY"])
def test_none_from_the_environment_serves_whoever_accepts(serve: Serve, name: str) -> None:
    server = serve(workers=2, bind=["127.0.0.1:0", "[::1]:0"], env={name: "none"})
    listening = proc.listening_inodes(server.address.port)
    for worker in server.workers:
        assert listening & proc.socket_inodes(worker.pid), "under none every worker holds the listening socket"
    for address in server.addresses:
        assert fetch(address, "/").status == 200
    assert {server.ask_id() for _ in range(20)} <= {1, 2}
    with server.stopped_workers() as workers:
        os.kill(workers[0].pid, signal.SIGCONT)
        # Only one of them can accept now.
        assert [server.ask_id() for _ in range(10)] == [workers[0].id] * 10
