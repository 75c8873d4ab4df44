"""What the master does with connections that were given back: it waits, and closes, and never loses a word."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest

from clusterserve.core.parking import KEEP_ALIVE
from clusterserve.core.records import Kind
from clusterserve.master.listeners import Listener
from tests.helpers.waiting import eventually

from .rig import FakeWorker, Rig, readable, reset

GIVEN_BACK = Kind.ACK | Kind.RETURNED


@pytest.fixture
def listener(rig: Rig) -> Listener:
    return rig.listen(client_speaks_first=True)


@pytest.fixture
def worker(rig: Rig, listener: Listener) -> FakeWorker:
    return rig.worker(listener)


def give_back(rig: Rig, worker: FakeWorker, count: int = 1) -> list[int]:
    """Serve what comes and give it back; the master's descriptors."""
    offers = worker.receive(count)
    for offer in offers:
        assert offer.sock.recv(100)
    before = len(rig.distributor.parking.connections)
    worker.answer(GIVEN_BACK, *(offer.id for offer in offers))
    rig.parked(before + count)
    return [rig.distributor.parking.connections[offer.id].fd for offer in offers]


def test_it_is_offered_again_when_its_client_goes_on(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    for _ in range(3):
        give_back(rig, worker)
        assert not readable(client)
        client.sendall(b"more")
    assert [offer.id for offer in worker.receive()] == [1]
    assert rig.distributor.statistics().parked == 0


def test_words_that_came_before_it_was_given_back_are_seen(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    (offer,) = worker.receive()
    assert offer.sock.recv(3) == b"one"
    client.sendall(b"two")
    eventually(lambda: readable(offer.sock), "it has arrived")
    worker.answer(GIVEN_BACK, offer.id)
    (again,) = worker.receive()
    assert again.sock.recv(100) == b"two"


def test_it_waits_no_longer_than_since_it_spoke(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    rig.loop.forward(2.0)
    client.sendall(b"more")
    (offer,) = worker.receive()
    assert offer.waited < 1.0


def test_idle_ones_are_closed_in_time(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    early = rig.connect(listener, b"one")
    give_back(rig, worker)
    rig.loop.forward(KEEP_ALIVE - 1.0)
    late = rig.connect(listener, b"one")
    give_back(rig, worker)
    rig.loop.turn()
    assert not readable(early)
    rig.loop.forward(1.0)
    rig.parked(1)
    assert early.recv(1) == b""
    assert not readable(late)
    rig.loop.forward(KEEP_ALIVE)
    rig.parked(0)
    assert late.recv(1) == b""


def test_nothing_is_looked_for_while_it_waits(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    rig.connect(listener, b"one")
    give_back(rig, worker)
    rig.loop.turn(10)
    before = rig.loop.turns
    rig.loop.turn(10)
    assert rig.loop.turns - before < 15


def test_who_speaks_in_the_last_moment_is_served(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    """1. Its time is over.  2. Its client has spoken, which the master does not know yet.
    Result: it is served, because to close it would reset the client.
    """
    client = rig.connect(listener, b"one")
    (fd,) = give_back(rig, worker)
    client.sendall(b"more")
    eventually(lambda: _unread(fd), "it has arrived")
    rig.loop.forward(KEEP_ALIVE + 1.0)
    rig.dispatcher._tick()
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"more"
    assert not readable(client)


def test_who_speaks_is_not_closed_later_while_it_is_served(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    client.sendall(b"more")
    worker.accept()
    rig.loop.forward(KEEP_ALIVE * 3)
    rig.loop.turn(5)
    assert not readable(client)


@pytest.mark.parametrize("how", ["leaves", "resets"])
def test_a_client_that_hangs_up(rig: Rig, listener: Listener, worker: FakeWorker, how: str) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    reset(client) if how == "resets" else client.close()
    rig.parked(0)
    assert worker.read() == []
    rig.loop.forward(KEEP_ALIVE * 2)
    rig.loop.turn(5)


def test_a_client_that_speaks_and_hangs_up_is_served(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    client.sendall(b"last")
    client.close()
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"last"
    worker.answer(GIVEN_BACK, offer.id)
    rig.loop.until(lambda: not rig.distributor.parking.connections and not rig.distributor.queued, "it is closed")


def test_a_listener_that_goes_takes_them_along(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    rig.dispatcher.remove_listener(listener)
    rig.dispatcher.forget(listener.key)
    assert client.recv(1) == b""
    rig.loop.forward(KEEP_ALIVE * 2)
    rig.loop.turn(5)


def test_what_is_given_back_to_a_listener_that_is_gone_is_closed(
    rig: Rig, listener: Listener, worker: FakeWorker
) -> None:
    client = rig.connect(listener, b"one")
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"one"
    rig.dispatcher.remove_listener(listener)
    rig.dispatcher.forget(listener.key)
    worker.answer(GIVEN_BACK, offer.id)
    rig.loop.until(lambda: readable(client), "it is closed")
    assert client.recv(1) == b""
    assert rig.broken == []


def test_end_idle(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    """The cluster stops: idle ones are closed, those that have asked are served, and later ones closed as they come."""
    idle, asks, late = (rig.connect(listener, b"one") for _ in range(3))
    offers = worker.receive(3)
    for offer in offers:
        assert offer.sock.recv(100) == b"one"
    ports = {offer.port: offer.id for offer in offers}
    of = {client: ports[client.getsockname()[1]] for client in (idle, asks, late)}
    worker.answer(GIVEN_BACK, of[idle], of[asks])
    rig.parked(2)
    asks.sendall(b"two")
    eventually(lambda: _unread(rig.distributor.parking.connections[of[asks]].fd), "it has arrived")
    rig.dispatcher.end_idle()
    assert idle.recv(1) == b""
    (offer,) = worker.receive()
    assert (offer.id, offer.sock.recv(100)) == (of[asks], b"two")
    worker.answer(GIVEN_BACK, of[late])
    worker.answer(Kind.ACK | Kind.RETURNED, of[asks])
    rig.loop.until(lambda: readable(late) and readable(asks), "both are closed")
    assert (late.recv(1), asks.recv(1)) == (b"", b"")
    assert rig.distributor.statistics().parked == 0


def test_end_idle_before_the_epoll_was_asked(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    """What was asked before the end is in the queue at once: an empty one is what the workers leave by."""
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    client.sendall(b"two")
    eventually(lambda: _unread(next(iter(rig.distributor.parking.connections.values())).fd), "it has arrived")
    rig.dispatcher.end_idle()
    rig.dispatcher.expect_no_workers()
    assert rig.distributor.statistics().parked == 0
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"two"


def test_one_number_for_two_connections_in_one_batch(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    """1. A parked client hangs up, and one is given back; the master has not looked yet.
    2. The stop closes what is idle when the second is parked, and so the first, whose event is still to come.
    Result: that event is nobody's.
    """
    first = rig.connect(listener, b"one")
    give_back(rig, worker)
    second = rig.connect(listener, b"one")
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"one"
    rig.dispatcher.end_idle()
    third = rig.connect(listener, b"one")
    (another,) = worker.receive()
    assert another.sock.recv(100) == b"one"
    worker.answer(GIVEN_BACK, offer.id, another.id)
    second.close()
    third.close()
    first.close()
    rig.loop.turn(10)
    assert rig.distributor.statistics().parked == 0


def test_what_became_of_the_last_one_of_that_number_is_not_this_ones_end(
    rig: Rig, listener: Listener, worker: FakeWorker
) -> None:
    """As it comes when one that hangs up is closed for want of descriptors, and its number is the next client's."""
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    parked = rig.dispatcher._parked
    (number,) = parked._connections
    parked.woken(number, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP, rig.loop.time())
    rig.loop.turn(10)
    assert rig.distributor.statistics().parked == 1
    client.sendall(b"two")
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"two"


def test_a_worker_that_dies_loses_nothing_of_what_it_gave_back(
    rig: Rig, listener: Listener, worker: FakeWorker
) -> None:
    client = rig.connect(listener, b"one")
    give_back(rig, worker)
    worker.die()
    other = rig.worker(listener)
    client.sendall(b"two")
    (offer,) = other.receive()
    assert offer.sock.recv(100) == b"two"


def test_what_it_gave_back_with_its_last_breath_counts(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    client = rig.connect(listener, b"one")
    (offer,) = worker.receive()
    assert offer.sock.recv(100) == b"one"
    worker.answer(GIVEN_BACK, offer.id)
    worker.die()
    assert rig.distributor.statistics().parked == 1
    assert not readable(client)
    other = rig.worker(listener)
    client.sendall(b"two")
    assert other.receive()[0].sock.recv(100) == b"two"


def test_giving_back_what_was_given_back_already_is_a_fault(rig: Rig, listener: Listener, worker: FakeWorker) -> None:
    rig.connect(listener, b"one")
    give_back(rig, worker)
    worker.answer(Kind.RETURNED, 1)
    rig.loop.until(lambda: rig.broken, "it is found out")
    assert rig.distributor.statistics().parked == 1


def _unread(fd: int) -> bool:
    """Whether something has arrived at a descriptor of the master's."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        return readable(sock)


def test_the_kernel_watches_no_more(
    rig: Rig, listener: Listener, worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """Entries of epolls are bounded per user: what cannot be watched is closed, and nothing else happens."""

    class Full:
        """The dispatcher's epoll, out of room."""

        def __init__(self, epoll: select.epoll) -> None:
            self.epoll = epoll

        def register(self, fd: int, events: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> object:
            return getattr(self.epoll, name)

    client, other = rig.connect(listener, b"one"), rig.connect(listener, b"one")
    offers = worker.receive(2)
    epoll = rig.dispatcher._parked._epoll
    rig.dispatcher._parked._epoll = Full(epoll)  # type: ignore[assignment]
    for offer in offers:
        assert offer.sock.recv(100)
        offer.sock.close()
        worker.answer(GIVEN_BACK, offer.id)
    rig.loop.until(lambda: readable(client) and readable(other), "both have ended")
    assert client.recv(1) == other.recv(1) == b""
    rig.dispatcher._parked._epoll = epoll
    assert rig.distributor.statistics().parked == 0
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    rig.connect(listener, b"one")
    give_back(rig, worker)
