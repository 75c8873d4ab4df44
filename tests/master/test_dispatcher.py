"""The hot path with real sockets: from accept to the worker's last word, and what becomes of a dead worker's."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from clusterserve.channel.board import Board
from clusterserve.channel.connection import MAX_BATCH
from clusterserve.core.distributor import REFUSED_PAUSE
from clusterserve.core.lateness import PATIENCE, RETRY
from clusterserve.core.policies import Hash, Least, RoundRobin
from clusterserve.core.records import IPV4, IPV6, NO_ADDRESS, Kind, pack_answer
from clusterserve.core.worker import EXPENSIVE
from clusterserve.errors import ProtocolError
from clusterserve.master.answers import BAD_GATEWAY
from clusterserve.master.listeners import Listener
from tests.helpers import proc

from .rig import FakeWorker, Offer, Rig, SkewedLoop, no_more_descriptors, readable, reset

REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


def ended(client: socket.socket) -> bytes:
    """What the client still gets until the connection's end."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def speaks(offer: Offer, client: socket.socket) -> bool:
    """Whether this offer is this client's connection."""
    return bool(offer.sock.getpeername() == client.getsockname())


def queued_in_order(rig: Rig) -> list[int]:
    """The ids that wait, listener after listener, lane after lane."""
    handles = rig.distributor.handles.values()
    return [connection.id for handle in handles for lane in handle.lanes.values() for connection in lane]


def unread(worker: FakeWorker) -> bool:
    """Whether an offer lies in its channel."""
    return readable(worker.socket)


# ── from accept to offer ────────────────────────────────────────────────────────────────────────────────────────────


def test_round_robin(rig: Rig) -> None:
    listener = rig.listen()
    workers = [rig.worker(listener) for _ in range(3)]
    clients = [rig.connect(listener) for _ in range(6)]
    for worker in workers:
        offers = worker.receive(2)
        assert [speaks(offer, clients[worker.id - 1 + 3 * turn]) for turn, offer in enumerate(offers)] == [True, True]
    assert rig.distributor.statistics().offered == 6


def test_an_offer_says_who_and_where(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener, REQUEST)
    (offer,) = worker.receive()
    assert (offer.id, offer.listener, offer.family) == (1, listener.key, IPV4)
    assert socket.inet_ntop(socket.AF_INET6, offer.client) == "::ffff:127.0.0.1"
    assert offer.port == client.getsockname()[1]
    assert offer.waited < 5.0
    assert offer.sock.recv(65536) == REQUEST
    offer.sock.sendall(b"answer")
    assert client.recv(65536) == b"answer"
    assert not offer.sock.get_inheritable()


def test_an_offer_of_an_ipv6_client(rig: Rig) -> None:
    listener = rig.listen("[::1]:0")
    worker = rig.worker(listener)
    client = rig.connect(listener)
    (offer,) = worker.receive()
    assert offer.family == IPV6
    assert socket.inet_ntop(socket.AF_INET6, offer.client) == "::1"
    assert offer.port == client.getsockname()[1]


def test_ipv4_at_a_dual_stack_listener_has_one_spelling(rig: Rig) -> None:
    listener = rig.listen("[::]:0")
    worker = rig.worker(listener)
    with socket.create_connection(("127.0.0.1", listener.sock.getsockname()[1])):
        (offer,) = worker.receive()
        assert socket.inet_ntop(socket.AF_INET6, offer.client) == "::ffff:127.0.0.1"


def test_an_offer_of_a_unix_client(rig: Rig, tmp_path: Path) -> None:
    listener = rig.listen(f"unix:{tmp_path}/s")
    worker = rig.worker(listener)
    rig.connect(listener)
    (offer,) = worker.receive()
    assert (offer.family, offer.client, offer.port) == (NO_ADDRESS, bytes(16), 0)


def test_ids_are_never_used_again(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    for number in range(1, 4):
        client = rig.connect(listener)
        (offer,) = worker.receive()
        assert offer.id == number
        worker.answer(Kind.ACK | Kind.CLOSED, offer.id)
        rig.loop.until(partial(readable, client), "the client sees the end")


def test_a_worker_gets_only_what_it_listens_on(rig: Rig) -> None:
    one, other = rig.listen(), rig.listen()
    workers = rig.worker(one), rig.worker(other)
    clients = [rig.connect(listener) for listener in (other, one, other, one)]
    offers = [worker.receive(2) for worker in workers]
    assert {offer.listener for offer in offers[0]} == {one.key}
    assert {offer.listener for offer in offers[1]} == {other.key}
    assert speaks(offers[0][0], clients[1])
    assert speaks(offers[1][0], clients[0])


def test_what_is_accepted_waits_for_a_worker(rig: Rig) -> None:
    listener = rig.listen()
    clients = [rig.connect(listener) for _ in range(3)]
    rig.queued(3)
    idle = rig.idle
    worker = rig.worker()
    rig.loop.turn()
    assert not unread(worker)
    rig.dispatcher.attach(worker.id, listener.key)
    assert [speaks(offer, client) for offer, client in zip(worker.receive(3), clients, strict=True)] == [True] * 3
    assert rig.idle > idle
    with pytest.raises(KeyError):
        rig.dispatcher.attach(99, listener.key)


def test_a_cheap_worker_gets_many_in_one_message(rig: Rig) -> None:
    listener = rig.listen()
    for _ in range(MAX_BATCH + 3):
        rig.connect(listener)
    rig.queued(MAX_BATCH + 3)
    worker = rig.worker(listener)
    worker.receive(MAX_BATCH + 3)
    assert worker.batches == [MAX_BATCH, 3]


def test_an_expensive_worker_gets_them_one_by_one(rig: Rig) -> None:
    listener = rig.listen(policy=RoundRobin())
    slow = rig.worker(listener)
    rig.connect(listener)
    slow.accept(held=EXPENSIVE + 200)
    rig.loop.until(lambda: slow.record.held > EXPENSIVE, "the master knows that it is slow")
    fast = rig.worker(listener)
    rig.dispatcher.remove_listener(listener)
    for _ in range(6):
        rig.connect(listener)
    rig.dispatcher.add_listener(listener, client_speaks_first=False)
    slow.receive(3)
    fast.receive(3)
    assert slow.batches == [1, 1, 1, 1]
    assert fast.batches == [3]


# ── clients that do not speak ───────────────────────────────────────────────────────────────────────────────────────


def test_a_silent_tcp_client_stays_with_the_kernel(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    worker = rig.worker(listener)
    silent = rig.connect(listener)
    loud = rig.connect(listener, REQUEST)
    (offer,) = worker.receive()
    assert speaks(offer, loud)
    assert rig.distributor.statistics().parked == 0
    silent.sendall(REQUEST)
    assert speaks(worker.receive()[0], silent)


@pytest.fixture
def unix(rig: Rig, tmp_path: Path) -> Listener:
    """A listener on which the kernel cannot wait for the clients to speak."""
    return rig.listen(f"unix:{tmp_path}/s", client_speaks_first=True)


def test_a_silent_unix_client_is_parked(rig: Rig, unix: Listener) -> None:
    worker = rig.worker(unix)
    client = rig.connect(unix)
    rig.parked(1)
    assert not unread(worker)
    client.sendall(REQUEST)
    (offer,) = worker.receive()
    assert offer.sock.recv(65536) == REQUEST
    assert rig.distributor.statistics().parked == 0


def test_a_parked_client_that_hangs_up_costs_no_worker(rig: Rig, unix: Listener) -> None:
    worker = rig.worker(unix)
    before = proc.descriptors(os.getpid()).keys()
    client = rig.connect(unix)
    rig.parked(1)
    client.close()
    rig.parked(0)
    assert proc.descriptors(os.getpid()).keys() == before
    assert not unread(worker)


def test_a_parked_client_that_hangs_up_at_the_descriptor_limit(rig: Rig, unix: Listener) -> None:
    client = rig.connect(unix)
    rig.parked(1)
    spare = [os.dup(0)]
    try:
        with no_more_descriptors():
            client.shutdown(socket.SHUT_RDWR)
            rig.loop.until(lambda: not rig.distributor.parking.connections, "it is closed")
    finally:
        os.close(spare[0])


def test_a_parked_client_that_half_closes_in_silence(rig: Rig, unix: Listener) -> None:
    worker = rig.worker(unix)
    client = rig.connect(unix)
    rig.parked(1)
    client.shutdown(socket.SHUT_WR)
    rig.parked(0)
    assert ended(client) == b""
    assert not unread(worker)


def test_a_client_that_half_closes_behind_its_request(rig: Rig, unix: Listener) -> None:
    worker = rig.worker(unix)
    client = rig.connect(unix, REQUEST)
    client.shutdown(socket.SHUT_WR)
    (offer,) = worker.receive()
    assert offer.sock.recv(65536) == REQUEST
    assert offer.sock.recv(65536) == b""


def test_parked_clients_do_not_count_as_pending(loop: SkewedLoop, tmp_path: Path) -> None:
    rig = Rig(loop, max_pending=2)
    listener = rig.listen(f"unix:{tmp_path}/s", client_speaks_first=True)
    for _ in range(5):
        rig.connect(listener)
    rig.parked(5)
    rig.close()


# ── what workers answer ─────────────────────────────────────────────────────────────────────────────────────────────


def test_acknowledged_and_later_closed(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener)
    (offer,) = worker.accept()
    rig.loop.until(lambda: rig.distributor.statistics().borrowed == 1, "it is borrowed")
    offer.sock.sendall(b"bye")
    worker.answer(Kind.CLOSED, offer.id)
    rig.loop.until(lambda: not rig.distributor.statistics().borrowed, "it is over")
    # The master's close is the last one.
    assert ended(client) == b"bye"


def test_all_in_one_answer(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    clients = [rig.connect(listener) for _ in range(40)]
    worker.answer(Kind.ACK | Kind.CLOSED, *(offer.id for offer in worker.receive(40)))
    rig.loop.until(lambda: all(readable(client) for client in clients), "all are closed")
    assert rig.distributor.statistics().offered == 0


def test_taken_for_good(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener)
    sockets = len(proc.socket_inodes(os.getpid()))
    rig.queued(0)
    (offer,) = worker.receive()
    worker.answer(Kind.TAKEN, offer.id)
    rig.loop.until(lambda: not rig.distributor.statistics().offered, "the master has let go")
    offer.sock.sendall(b"mine")
    assert client.recv(4) == b"mine"
    # One inode in two descriptors was counted once: now it is the worker's only.
    assert len(proc.socket_inodes(os.getpid())) == sockets + 1
    worker.offers.pop(offer.id).sock.close()
    assert ended(client) == b""


def test_returned_and_readable_again(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    one, other = rig.worker(listener), rig.worker(listener)
    client = rig.connect(listener, REQUEST)
    (offer,) = one.receive()
    offer.sock.recv(65536)
    offer.sock.sendall(b"answer")
    one.answer(Kind.ACK | Kind.RETURNED, offer.id)
    rig.parked(1)
    assert client.recv(65536) == b"answer"
    client.sendall(REQUEST)
    (again,) = other.receive()
    assert again.id == offer.id
    assert again.sock.recv(65536) == REQUEST


def test_returned_with_more_waiting_in_it(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    worker = rig.worker(listener)
    rig.connect(listener, REQUEST + b"more")
    (offer,) = worker.receive()
    offer.sock.recv(len(REQUEST))
    worker.answer(Kind.ACK | Kind.RETURNED, offer.id)
    assert worker.receive()[0].sock.recv(65536) == b"more"


def test_returned_and_closed_by_its_client(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener, REQUEST)
    (offer,) = worker.receive()
    offer.sock.recv(65536)
    worker.answer(Kind.ACK | Kind.RETURNED, offer.id)
    rig.parked(1)
    client.close()
    rig.parked(0)
    assert not unread(worker)


def test_refused_is_another_workers(rig: Rig) -> None:
    listener = rig.listen()
    one, other = rig.worker(listener), rig.worker(listener)
    client = rig.connect(listener)
    (offer,) = one.receive()
    one.answer(Kind.REFUSED, offer.id)
    assert speaks(other.receive()[0], client)
    assert not one.record.ready
    rig.loop.forward(REFUSED_PAUSE)
    rig.loop.until(lambda: one.record.ready, "it is asked again after a pause")


def test_refused_by_the_only_worker_does_not_spin(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener)
    (offer,) = worker.receive()
    worker.answer(Kind.REFUSED, offer.id)
    rig.queued(1)
    rig.loop.turn(20)
    assert not unread(worker)
    rig.loop.forward(REFUSED_PAUSE)
    assert speaks(worker.receive()[0], client)


# ── recall ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_stalled_worker_has_not_read_goes_to_another(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    stalled = rig.worker(listener)
    clients = [rig.connect(listener) for _ in range(4)]
    rig.loop.until(lambda: len(stalled.record.unacked) == 4, "all are offered to the only worker")
    other = rig.worker(listener)
    rig.late()
    offers = other.receive(4)
    assert [speaks(offer, client) for offer, client in zip(offers, clients, strict=True)] == [True] * 4
    assert [offer.id for offer in offers] == [1, 2, 3, 4]
    assert not unread(stalled)
    assert not stalled.record.unacked


def test_what_a_stalled_worker_has_read_stays_with_it(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    stalled = rig.worker(listener)
    rig.connect(listener)
    stalled.receive()
    for _ in range(2):
        rig.connect(listener)
    rig.loop.until(lambda: len(stalled.record.unacked) == 3, "all are offered to the only worker")
    other = rig.worker(listener)
    rig.late()
    assert [offer.id for offer in other.receive(2)] == [2, 3]
    assert list(stalled.record.unacked) == [1]
    # It goes on where it was.
    stalled.answer(Kind.ACK, 1)
    rig.loop.until(lambda: stalled.record.ready, "it is ready again")
    assert list(stalled.record.borrowed) == [1]
    assert rig.broken == []


def test_nothing_is_recalled_while_nobody_else_is_ready(rig: Rig) -> None:
    listener, elsewhere = rig.listen(), rig.listen()
    stalled = rig.worker(listener)
    # Ready, but for another address.
    rig.worker(elsewhere)
    clients = [rig.connect(listener) for _ in range(2)]
    rig.loop.until(lambda: len(stalled.record.unacked) == 2, "both are offered")
    for _ in range(5):
        rig.late()
        assert stalled.record.stalled
    rig.loop.forward(RETRY)
    rig.loop.turn()
    offers = stalled.receive(2)
    assert [speaks(offer, client) for offer, client in zip(offers, clients, strict=True)] == [True, True]
    stalled.answer(Kind.ACK, 1, 2)
    rig.loop.until(lambda: stalled.record.ready, "it is ready again")
    assert rig.broken == []


def test_a_recalled_client_whose_listener_is_gone_is_closed(rig: Rig) -> None:
    listener, other = rig.listen(policy=Least()), rig.listen(policy=Least())
    stalled = rig.worker(listener, other)
    client = rig.connect(listener)
    rig.loop.until(lambda: len(stalled.record.unacked) == 1, "it is offered")
    rig.dispatcher.remove_listener(listener)
    rig.dispatcher.forget(listener.key)
    rig.connect(other)
    rig.loop.until(lambda: len(stalled.record.unacked) == 2, "it is offered")
    ready = rig.worker(other)
    rig.late()
    ready.receive()
    assert ended(client) == b""


def test_an_early_look_is_not_missed_for_a_late_one(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    resting, stalled = rig.worker(listener), rig.worker(listener)
    rig.connect(listener)
    (offer,) = resting.receive()
    resting.answer(Kind.REFUSED, offer.id)
    stalled.accept()
    rig.loop.until(lambda: stalled.record.borrowed, "all is acknowledged")
    rig.loop.forward(PATIENCE * 2)
    rig.loop.turn()
    # The next look is due when the other has had its rest.  The one that follows from this offer is due sooner.
    rig.connect(listener)
    rig.loop.until(lambda: stalled.record.unacked, "it is offered")
    other = rig.worker(listener)
    rig.loop.forward(PATIENCE)
    rig.loop.turn()
    assert [offer.id for offer in other.read()] == [2]


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_at_max_pending_it_stops_accepting(loop: SkewedLoop) -> None:
    rig = Rig(loop, max_pending=2)
    listener = rig.listen()
    clients = [rig.connect(listener) for _ in range(5)]
    rig.queued(2)
    turns = loop.turns
    loop.turn(50)
    # The listener is readable all the while, and wakes nobody.
    assert rig.distributor.queued == 2
    assert loop.turns - turns < 60
    assert len(select.select([listener.sock], [], [], 0)[0]) == 1
    worker = rig.worker(listener)
    offers = worker.receive(5)
    assert [speaks(offer, client) for offer, client in zip(offers, clients, strict=True)] == [True] * 5
    rig.close()


def test_a_listener_that_comes_late_waits_as_well(loop: SkewedLoop) -> None:
    rig = Rig(loop, max_pending=1)
    first = rig.listen()
    rig.connect(first)
    rig.queued(1)
    second = rig.listen()
    rig.connect(second)
    loop.turn(20)
    assert rig.distributor.queued == 1
    rig.worker(first, second).receive(2)
    rig.close()


def test_no_descriptor_for_a_new_client(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    listener, other = rig.listen(), rig.listen()
    worker = rig.worker(listener, other)
    clients = [rig.connect(each) for each in (listener, listener, other)]

    # Here it is about time, and about what it costs.
    rig.loop.thaw()

    def warnings() -> int:
        return sum("Cannot accept" in record.message for record in caplog.records)

    with caplog.at_level(logging.WARNING, logger="clusterserve.dispatch"), no_more_descriptors():
        rig.loop.until(lambda: warnings() == 1, "it says that it cannot accept")
        turns, busy, end = rig.loop.turns, time.thread_time(), time.monotonic() + 0.25
        rig.loop.until(lambda: time.monotonic() >= end, "it has tried again, and again")
        # It is said once.  A few turns for each look of this test, thousands if it were spinning.
        assert warnings() == 1
        assert rig.loop.turns - turns < 1000
        assert time.thread_time() - busy < 0.15
    assert caplog.records[0].message == "Cannot accept: Too many open files; waiting (said once in 10 s)"
    offers = worker.receive(3)
    assert {offer.sock.getpeername() for offer in offers} == {client.getsockname() for client in clients}


def test_accepting_what_is_left_at_the_descriptor_limit(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    listeners = rig.listen(), rig.listen()
    worker = rig.worker(*listeners)
    for listener in listeners:
        rig.connect(listener)
    with caplog.at_level(logging.WARNING, logger="clusterserve.dispatch"), no_more_descriptors():
        rig.dispatcher.accept_rest()
    # Once for both of them.
    assert [record.message for record in caplog.records] == [
        "Cannot accept: Too many open files; waiting (said once in 10 s)"
    ]
    rig.loop.forward(0.1)
    worker.receive(2)


def test_an_end_while_it_cannot_accept(loop: SkewedLoop, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(loop)
    listener = rig.listen()
    rig.connect(listener)
    with caplog.at_level(logging.WARNING, logger="clusterserve.dispatch"), no_more_descriptors():
        loop.until(lambda: caplog.records, "it says that it cannot accept")
    rig.close()
    loop.forward(1.0)
    loop.turn()
    assert len(caplog.records) == 1


def test_a_full_channel_gives_the_worker_a_pause_and_its_offers_to_another(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    narrow = rig.worker(listener, send_buffer=4608)
    # Expensive: each in a message of its own.
    narrow.record.held = EXPENSIVE * 10
    clients = [rig.connect(listener) for _ in range(40)]
    rig.loop.until(lambda: narrow.record.resting, "its channel is full")
    sent = len(narrow.record.unacked)
    assert 0 < sent < 40
    assert rig.distributor.queued == 40 - sent
    assert queued_in_order(rig) == list(range(sent + 1, 41))
    wide = rig.worker(listener)
    offers = wide.receive(40 - sent)
    assert [speaks(offer, client) for offer, client in zip(offers, clients[sent:], strict=True)] == [True] * (40 - sent)


def test_what_a_full_channel_did_not_take_goes_to_a_ready_worker_at_once(rig: Rig) -> None:
    listener = rig.listen(policy=RoundRobin())
    narrow = rig.worker(listener, send_buffer=4608)
    wide = rig.worker(listener)
    # Expensive: each in a message of its own.
    narrow.record.held = EXPENSIVE * 10
    for _ in range(40):
        rig.connect(listener)
    rig.loop.until(lambda: narrow.record.resting, "its channel is full")
    rig.loop.turn()
    assert rig.distributor.queued == 0
    assert len(wide.record.unacked) + len(narrow.record.unacked) == 40


# ── hostile workers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "nonsense",
    [
        pack_answer(Kind.ACK, 99),
        pack_answer(Kind.CLOSED, 1),
        pack_answer(0, 2),
        pack_answer(Kind.ACK | Kind.REFUSED, 2),
        pack_answer(255, 2),
        b"x",
        b"x" * 160,
        pack_answer(Kind.ACK, 2)[:-1],
        b"\1" + pack_answer(Kind.ACK, 2)[1:],
    ],
)
def test_nonsense_is_that_workers_fault_alone(rig: Rig, nonsense: bytes) -> None:
    listener = rig.listen()
    honest, hostile = rig.worker(listener), rig.worker(listener)
    clients = [rig.connect(listener) for _ in range(2)]
    honest.accept()
    hostile.receive()
    hostile.say(nonsense)
    rig.loop.until(lambda: rig.broken, "the fault is reported")
    ((worker, error),) = rig.broken
    assert worker == hostile.id
    assert isinstance(error, ProtocolError)
    hostile.die()
    # Not a byte of it was read: it is the other's now.
    (offer,) = honest.receive()
    assert speaks(offer, clients[1])
    honest.answer(Kind.CLOSED, 1)
    honest.answer(Kind.ACK | Kind.CLOSED, 2)
    rig.loop.until(lambda: all(readable(client) for client in clients), "both are served")
    assert len(rig.broken) == 1


def test_true_answers_before_nonsense_count(rig: Rig) -> None:
    listener = rig.listen()
    worker = rig.worker(listener)
    client = rig.connect(listener)
    (offer,) = worker.receive()
    worker.offers.pop(offer.id).sock.close()
    worker.say(pack_answer(Kind.ACK | Kind.CLOSED, offer.id) + pack_answer(Kind.ACK, 77))
    rig.loop.until(lambda: rig.broken, "the fault is reported")
    assert ended(client) == b""


def test_an_answer_for_what_it_has_not_read(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    hostile = rig.worker(listener)
    clients = [rig.connect(listener) for _ in range(2)]
    rig.loop.until(lambda: len(hostile.record.unacked) == 2, "both are offered to it")
    # A lie: the first still lies in its channel, as the recall will show.
    hostile.say(pack_answer(Kind.ACK, 1))
    rig.loop.until(lambda: len(hostile.record.unacked) == 1, "it is believed for now")
    honest = rig.worker(listener)
    rig.late()
    assert [worker for worker, _ in rig.broken] == [hostile.id]
    hostile.die()
    offers = honest.receive(2)
    assert [speaks(offer, client) for offer, client in zip(offers, clients, strict=True)] == [True, True]


def test_the_same_lie_of_a_worker_that_is_dead(rig: Rig) -> None:
    listener = rig.listen(policy=Least())
    hostile = rig.worker(listener)
    client = rig.connect(listener)
    rig.loop.until(lambda: len(hostile.record.unacked) == 1, "it is offered")
    hostile.say(pack_answer(Kind.ACK, 1))
    hostile.die()
    assert [worker for worker, _ in rig.broken] == [hostile.id]
    assert speaks(rig.worker(listener).receive()[0], client)


def test_nonsense_of_a_worker_that_is_dead(rig: Rig) -> None:
    listener = rig.listen()
    hostile = rig.worker(listener)
    client = rig.connect(listener)
    hostile.receive()
    hostile.say(b"x")
    hostile.die()
    assert [worker for worker, _ in rig.broken] == [hostile.id]
    assert speaks(rig.worker(listener).receive()[0], client)


# ── dead workers ────────────────────────────────────────────────────────────────────────────────────────────────────


def offered(rig: Rig, worker: FakeWorker, listener: Listener, data: bytes = REQUEST) -> tuple[socket.socket, Offer]:
    """A client and its connection as `worker` has it."""
    client = rig.connect(listener, data)
    (offer,) = worker.receive()
    assert select.select([offer.sock], [], [], 10)[0]
    return client, offer


@pytest.mark.parametrize("acknowledged", [False, True])
def test_untouched_is_offered_to_another(rig: Rig, acknowledged: bool) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    if acknowledged:
        dying.answer(Kind.ACK, offer.id)
        rig.loop.until(lambda: dying.record.borrowed, "it is acknowledged")
    dying.die()
    assert rig.distributor.queued == 1
    (again,) = rig.worker(listener).receive()
    assert again.id == offer.id
    assert again.sock.recv(65536) == REQUEST
    again.sock.sendall(b"answer")
    assert client.recv(65536) == b"answer"


@pytest.mark.parametrize("acknowledged", [False, True])
def test_read_is_answered_502(rig: Rig, acknowledged: bool) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(1)
    if acknowledged:
        dying.answer(Kind.ACK, offer.id)
        rig.loop.until(lambda: dying.record.borrowed, "it is acknowledged")
    dying.die()
    assert ended(client) == BAD_GATEWAY
    assert rig.distributor.queued == 0


def test_502_for_a_client_that_is_still_uploading(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(1)
    dying.die()
    outcome: list[bytes | OSError] = []

    def upload() -> None:
        try:
            client.sendall(bytes(20_000_000))
            client.shutdown(socket.SHUT_WR)
            outcome.append(ended(client))
        except OSError as exc:
            outcome.append(exc)

    uploading = threading.Thread(target=upload)
    uploading.start()
    rig.loop.until(lambda: outcome, "the client has its answer")
    uploading.join()
    assert outcome == [BAD_GATEWAY]


def test_an_end_while_a_502_is_still_being_read(loop: SkewedLoop) -> None:
    rig = Rig(loop)
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    dying.die()
    rig.dispatcher.close()
    assert ended(client) == BAD_GATEWAY
    rig.dispatcher.close = lambda: None  # type: ignore[method-assign]
    rig.close()


def test_no_502_and_no_503_within_tls(rig: Rig) -> None:
    """The client could not read it, and a stranger might have put it there."""
    listener = rig.listen(client_speaks_first=True, tls=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(1)
    dying.die()
    assert ended(client) == b""
    rig.distributor.queue_timeout = 1.0
    waiting = rig.connect(listener, REQUEST)
    rig.loop.until(lambda: rig.distributor.queued, "nobody is there for it")
    rig.loop.forward(1.0)
    rig.loop.until(lambda: not rig.distributor.queued, "it has waited for too long")
    assert ended(waiting) == b""


def test_no_502_in_a_protocol_that_is_not_ours(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=False)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    dying.die()
    assert ended(client) == b""


def test_a_response_that_was_begun_is_cut(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    offer.sock.sendall(b"HTTP/1.1 200 OK\r\n")
    rig.loop.until(lambda: readable(client), "the client has its beginning")
    dying.die()
    assert ended(client) == b"HTTP/1.1 200 OK\r\n"


def test_unread_offers_of_the_dead_go_to_another_in_order(rig: Rig) -> None:
    listener = rig.listen(policy=Least(), client_speaks_first=True)
    dying = rig.worker(listener)
    read_client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    clients = [rig.connect(listener, REQUEST) for _ in range(3)]
    rig.loop.until(lambda: len(dying.record.unacked) == 4, "all are offered")
    late = rig.connect(listener, REQUEST)
    rig.loop.until(lambda: len(dying.record.unacked) == 5, "all are offered")
    dying.die()
    offers = rig.worker(listener).receive(4)
    assert [speaks(each, client) for each, client in zip(offers, [*clients, late], strict=True)] == [True] * 4
    assert ended(read_client) == BAD_GATEWAY


def test_what_the_dead_said_last_counts(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    offer.sock.sendall(b"answer")
    dying.answer(Kind.ACK | Kind.CLOSED, offer.id)
    dying.die()
    assert ended(client) == b"answer"
    assert rig.distributor.statistics().workers == ()


def test_a_dead_workers_unix_clients_are_closed(rig: Rig, unix: Listener) -> None:
    dying = rig.worker(unix)
    client, _ = offered(rig, dying, unix)
    dying.die()
    # The kernel cannot tell what was done to it: an end, and no reset, which would eat what is still to be read.
    assert ended(client) == b""


def test_a_dead_workers_unread_unix_clients_are_offered_to_another(rig: Rig, unix: Listener) -> None:
    dying = rig.worker(unix)
    rig.connect(unix, REQUEST)
    rig.loop.until(lambda: dying.record.unacked, "it is offered")
    dying.die()
    assert rig.worker(unix).receive()[0].sock.recv(65536) == REQUEST


def test_a_dead_workers_returned_clients_stay_parked(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    client, offer = offered(rig, dying, listener)
    offer.sock.recv(65536)
    dying.answer(Kind.ACK | Kind.RETURNED, offer.id)
    rig.parked(1)
    dying.die()
    client.sendall(REQUEST)
    assert rig.worker(listener).receive()[0].id == offer.id


def test_a_worker_that_dies_at_the_descriptor_limit(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    dying = rig.worker(listener)
    pairs = [offered(rig, dying, listener) for _ in range(2)]
    pairs[0][1].sock.recv(65536)
    # Read from now on in one descriptor only: the worker's own would free some when it is gone.
    spare = [os.dup(0) for _ in range(8)]
    with no_more_descriptors():
        rig.dispatcher.remove_worker(dying.id)
    for number in spare:
        os.close(number)
    dying.release()
    assert ended(pairs[0][0]) == BAD_GATEWAY
    assert speaks(rig.worker(listener).receive()[0], pairs[1][0])


def test_hash_waits_for_the_slots_next_worker(rig: Rig) -> None:
    listener = rig.listen(policy=Hash(1), client_speaks_first=True)
    dying = rig.worker(listener)
    client, _ = offered(rig, dying, listener)
    dying.die()
    other = rig.worker(listener)
    rig.loop.turn()
    # The rig's second worker has slot 1.
    assert rig.distributor.queued == 1
    assert not unread(other)
    assert not readable(client)


# ── clients that leave ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("leave", [reset, socket.socket.close])
def test_a_client_that_leaves_while_it_waits(rig: Rig, leave: Callable[[socket.socket], None]) -> None:
    listener = rig.listen(client_speaks_first=True)
    clients = [rig.connect(listener, REQUEST) for _ in range(2)]
    rig.queued(2)
    leave(clients[0])
    worker = rig.worker(listener)
    gone, there = worker.receive(2)
    assert speaks(there, clients[1])
    worker.answer(Kind.ACK | Kind.CLOSED, gone.id, there.id)
    rig.loop.until(lambda: not rig.distributor.statistics().offered, "both are over")


# ── listeners that leave ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_removed_listener_accepts_no_more(rig: Rig) -> None:
    listener = rig.listen()
    rig.dispatcher.remove_listener(listener)
    client = rig.connect(listener)
    rig.loop.turn(10)
    assert rig.distributor.queued == 0
    rig.dispatcher.remove_listener(listener)
    listener.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_an_inherited_socket_that_its_owner_shuts_down(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        shared, other = rig.listen(f"fd://{given.fileno()}"), rig.listen()
        worker = rig.worker(shared, other)
        given.shutdown(socket.SHUT_RDWR)
        rig.connect(other)
        worker.receive()
        rig.loop.turn(10)
    assert caplog.messages == [f"Nobody listens on {shared.address} any more: it was shut down by another process"]
    rig.dispatcher.remove_listener(shared)


def test_everything_the_kernel_has_accepted_can_be_taken(loop: SkewedLoop, tmp_path: Path) -> None:
    rig = Rig(loop, max_pending=3)
    listeners = rig.listen(client_speaks_first=True), rig.listen(f"unix:{tmp_path}/s", client_speaks_first=True)
    worker = rig.worker(*listeners)
    clients = [rig.connect(listener, REQUEST) for listener in listeners for _ in range(100)]
    rig.dispatcher.accept_rest()
    for listener in listeners:
        rig.dispatcher.remove_listener(listener)
        listener.close()
    served = 0
    while served < len(clients):
        loop.until(lambda: unread(worker), "there are more")
        ids = [offer.id for offer in worker.read()]
        worker.answer(Kind.ACK, *ids)
        served += len(ids)
    assert {offer.sock.recv(65536) for offer in worker.offers.values()} == {REQUEST}
    rig.close()


def test_what_waits_for_a_forgotten_listener_is_closed(rig: Rig, unix: Listener) -> None:
    silent, loud = rig.connect(unix), rig.connect(unix, REQUEST)
    rig.parked(1)
    rig.queued(1)
    rig.dispatcher.remove_listener(unix)
    rig.dispatcher.forget(unix.key)
    assert ended(silent) == b""
    with pytest.raises(ConnectionResetError):
        ended(loud)
    assert rig.distributor.statistics().parked == rig.distributor.statistics().queued == 0


def test_returned_to_a_listener_that_is_forgotten(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    worker = rig.worker(listener)
    client, offer = offered(rig, worker, listener)
    offer.sock.recv(65536)
    rig.dispatcher.remove_listener(listener)
    rig.dispatcher.forget(listener.key)
    worker.answer(Kind.ACK | Kind.RETURNED, offer.id)
    rig.loop.until(lambda: readable(client), "it is closed")
    assert ended(client) == b""


# ── in the long run ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_clients_many_workers_nothing_is_lost(rig: Rig) -> None:
    listener = rig.listen(client_speaks_first=True)
    workers = [rig.worker(listener) for _ in range(3)]
    clients: list[socket.socket] = []
    served: list[int] = []

    def serve() -> None:
        for worker in workers:
            while offers := worker.read():
                for offer in offers:
                    assert offer.sock.recv(65536) == REQUEST
                    offer.sock.sendall(b"answer")
                    served.append(offer.id)
                worker.answer(Kind.ACK | Kind.CLOSED, *(offer.id for offer in offers))

    def all_served() -> bool:
        serve()
        return len(served) == 200

    for number in range(200):
        clients.append(rig.connect(listener, REQUEST))
        if number % 10 == 9:
            rig.loop.turn()
        if number % 20 == 19:
            serve()
        if number % 50 == 49:
            # With unread offers of its own, most likely.
            workers.pop(0).die()
            workers.append(rig.worker(listener))
    rig.loop.until(all_served, "everybody was served")
    assert sorted(served) == list(range(1, 201))
    rig.loop.until(lambda: not rig.distributor.statistics().offered, "all is said")
    assert {ended(client) for client in clients} == {b"answer"}
    assert rig.distributor.statistics().borrowed == rig.distributor.queued == 0
    assert rig.broken == []


def test_a_worker_of_whom_the_kernel_does_not_tell_is_none(rig: Rig) -> None:
    """Whoever started it closes what is its own."""
    listener = rig.listen()
    worker = rig.worker(listener)
    board, kept = Board.create(), select.epoll()
    end = rig.dispatcher._ends[worker.id]
    with pytest.raises(FileExistsError):
        rig.dispatcher.add_worker(99, 1, end, board, kept)
    board.close()
    kept.close()
    assert [id for id, *_ in rig.distributor.statistics().workers] == [worker.id]
    client = rig.connect(listener)
    (offer,) = worker.receive(1)
    assert speaks(offer, client)
