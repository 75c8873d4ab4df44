"""The registry of listeners: who shares which, and when each ends."""

from __future__ import annotations

import errno
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve.binds import Bind
from clusterserve.core.messages import Listen
from clusterserve.core.policies import Policy, RoundRobin
from clusterserve.errors import BindError, ProtocolError
from clusterserve.master.handles import ORPHAN_TIME, Handles
from clusterserve.master.listeners import Listener

from .rig import FakeWorker, Rig, connect, no_more_descriptors


@pytest.fixture
def handles(rig: Rig) -> Iterator[Handles]:
    """The registry of a cluster whose master accepts."""
    yield from _handles(rig, RoundRobin)


@pytest.fixture
def shared(rig: Rig) -> Iterator[Handles]:
    """The registry of a cluster whose workers accept."""
    yield from _handles(rig, None)


def _handles(rig: Rig, make_policy: Callable[[], Policy] | None) -> Iterator[Handles]:
    handles = Handles(rig.loop, rig.dispatcher, make_policy)
    yield handles
    handles.close()


def ask(
    handles: Handles,
    worker: FakeWorker,
    bind: str,
    backlog: int = 16,
    *,
    first: bool = False,
    pinned: bool = False,
    **options: Any,
) -> Listener:
    """The listener that the worker asks for, with its server in place."""
    listener = handles.listen(worker.id, Listen(1, bind, backlog, first, pinned, **options))
    handles.attach(worker.id, listener.key)
    return listener


def address(listener: Listener) -> str:
    return listener.address.removeprefix("http://")


def refused(listener: Listener) -> bool:
    """Whether a new client is turned down."""
    host, port = listener.address.removeprefix("http://").rsplit(":", 1)
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


# ── who shares which ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_address_is_the_same_listener(rig: Rig, handles: Handles) -> None:
    one, other = rig.worker(), rig.worker()
    listener = ask(handles, one, "127.0.0.1:0")
    assert ask(handles, other, "127.0.0.1:0") is listener
    assert listener.workers == {one.id, other.id}
    assert list(handles) == [listener]
    clients = [connect(listener) for _ in range(2)]
    assert len(one.receive()) == len(other.receive()) == 1
    for client in clients:
        client.close()


def test_the_same_address_in_another_spelling(rig: Rig, handles: Handles) -> None:
    name = f"@clusterserve-{uuid.uuid4().hex}"
    listener = ask(handles, rig.worker(), f"unix:{name}")
    assert ask(handles, rig.worker(), f"unix://{name}") is listener


def test_a_second_server_on_port_0_is_another_listener(rig: Rig, handles: Handles) -> None:
    one, other = rig.worker(), rig.worker()
    first, second = ask(handles, one, "127.0.0.1:0"), ask(handles, one, "127.0.0.1:0")
    assert first.address != second.address
    assert ask(handles, other, "127.0.0.1:0") is first
    assert ask(handles, other, "127.0.0.1:0") is second


def test_the_largest_backlog_counts(rig: Rig, handles: Handles) -> None:
    listener = ask(handles, rig.worker(), "127.0.0.1:0", backlog=5)
    assert listener.backlog == 5
    ask(handles, rig.worker(), "127.0.0.1:0", backlog=9)
    assert listener.backlog == 9
    ask(handles, rig.worker(), "127.0.0.1:0", backlog=2)
    assert listener.backlog == 9


@pytest.mark.parametrize("backlog", [-7, 10**30])
def test_a_backlog_that_is_none(rig: Rig, handles: Handles, backlog: int) -> None:
    listener = ask(handles, rig.worker(), "127.0.0.1:0", backlog=backlog)
    assert ask(handles, rig.worker(), "127.0.0.1:0", backlog=10**30) is listener
    with connect(listener):
        pass


def test_silent_clients_are_waited_for_only_where_they_speak_first(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    speaking = ask(handles, worker, "127.0.0.1:0", first=True)
    waiting = ask(handles, worker, "127.0.0.1:0", first=False)
    with connect(speaking), connect(waiting):
        (offer,) = worker.receive()
        assert offer.listener == waiting.key


def test_workers_that_accept_get_the_socket_itself(rig: Rig, shared: Handles) -> None:
    worker = rig.worker()
    listener = ask(shared, worker, "127.0.0.1:0", first=True)
    assert shared.shared
    with connect(listener):
        rig.loop.turn(10)
        # It is the worker's to accept, not the master's.
        assert rig.distributor.statistics().queued == 0
        listener.sock.accept()[0].close()
    shared.leave(worker.id, listener.key, crashed=False)
    assert not listener.is_open


# ── pinned ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pinned_listeners_wait_for_the_first_worker(rig: Rig, handles: Handles) -> None:
    (listener,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    assert handles.pinned == {listener.key}
    with connect(listener):
        rig.loop.turn()
        assert rig.distributor.handles == {}
        worker = rig.worker()
        assert ask(handles, worker, "127.0.0.1:0", pinned=True) is listener
        worker.receive()


def test_pinned_listeners_outlive_their_workers(rig: Rig, handles: Handles) -> None:
    (listener,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    for crashed in (False, True):
        worker = rig.worker()
        ask(handles, worker, "127.0.0.1:0", pinned=True)
        worker.die()
        handles.leave_all(worker.id, crashed=crashed)
        rig.loop.forward(ORPHAN_TIME)
        rig.loop.turn()
        assert listener.is_open


def test_port_0_pinned_several_times(rig: Rig, handles: Handles) -> None:
    bind = Bind.parse("127.0.0.1:0")
    listeners = handles.open_pinned([bind, bind, Bind.parse("[::1]:0")], 16)
    assert len({listener.address for listener in listeners}) == 3
    worker = rig.worker()
    assert [ask(handles, worker, "127.0.0.1:0", pinned=True) for _ in range(2)] == listeners[:2]


def test_a_workers_own_of_the_same_spelling_is_another_one(rig: Rig, handles: Handles) -> None:
    (pinned,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    worker = rig.worker()
    own = ask(handles, worker, "127.0.0.1:0")
    assert own is not pinned
    assert ask(handles, worker, "127.0.0.1:0", pinned=True) is pinned
    handles.leave(worker.id, own.key, crashed=False)
    assert (own.is_open, pinned.is_open) == (False, True)


def test_a_worker_cannot_make_one(rig: Rig, handles: Handles) -> None:
    handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    worker = rig.worker()
    ask(handles, worker, "127.0.0.1:0", pinned=True)
    for bind in ("127.0.0.1:0", "127.0.0.1:1"):
        with pytest.raises(ProtocolError, match="no --bind"):
            ask(handles, worker, bind, pinned=True)


def test_one_that_cannot_be_had_and_those_before_it(handles: Handles, tmp_path: Path) -> None:
    binds = [Bind.parse(f"unix:{tmp_path}/s"), Bind.parse("192.0.2.1:80")]
    with pytest.raises(BindError, match=r"192\.0\.2\.1:80"):
        handles.open_pinned(binds, 16)
    handles.close()
    assert not handles.open
    assert list(tmp_path.iterdir()) == []


# ── the workers' own ────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_goes_with_the_last_worker(rig: Rig, handles: Handles) -> None:
    one, other = rig.worker(), rig.worker()
    listener = ask(handles, one, "127.0.0.1:0")
    ask(handles, other, "127.0.0.1:0")
    handles.leave(one.id, listener.key, crashed=False)
    handles.leave(one.id, listener.key, crashed=False)
    with connect(listener) as client:
        other.receive()
        handles.leave_all(other.id, crashed=False)
        assert refused(listener)
        # What it holds it keeps.
        next(iter(other.offers.values())).sock.sendall(b"still")
        assert client.recv(5) == b"still"
    assert list(handles) == []
    assert rig.distributor.handles == {}


def test_what_waits_for_it_goes_with_it(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = handles.listen(worker.id, Listen(1, "127.0.0.1:0", 16, False, False))
    with connect(listener) as client:
        rig.queued(1)
        handles.leave(worker.id, listener.key, crashed=False)
        assert client.recv(1) == b""


def test_the_next_one_of_that_name_is_new(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    first = ask(handles, worker, "127.0.0.1:0")
    handles.leave(worker.id, first.key, crashed=False)
    second = ask(handles, worker, "127.0.0.1:0")
    assert second.key > first.key
    # Port 0 has become a port for good.
    assert second.address == first.address
    with connect(second):
        worker.receive()


def test_it_is_kept_for_a_while_after_a_crash(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0")
    worker.die()
    handles.leave_all(worker.id, crashed=True)
    with connect(listener):
        rig.queued(1)
        rig.loop.forward(ORPHAN_TIME - 1)
        rig.loop.turn()
        successor = rig.worker()
        assert ask(handles, successor, "127.0.0.1:0") is listener
        successor.receive()


def test_and_no_longer_than_that(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0")
    worker.die()
    handles.leave_all(worker.id, crashed=True)
    with connect(listener) as client:
        rig.queued(1)
        rig.loop.forward(ORPHAN_TIME)
        rig.loop.until(lambda: not listener.is_open, "it is closed")
        assert client.recv(1) == b""
    assert refused(listener)
    assert list(handles) == []


def test_each_crash_starts_the_time_anew(rig: Rig, handles: Handles) -> None:
    crashed = rig.worker()
    listener = ask(handles, crashed, "127.0.0.1:0")
    crashed.die()
    handles.leave_all(crashed.id, crashed=True)
    rig.loop.forward(ORPHAN_TIME - 1)
    rig.loop.turn()
    successor = rig.worker()
    ask(handles, successor, "127.0.0.1:0")
    successor.die()
    handles.leave_all(successor.id, crashed=True)
    rig.loop.forward(ORPHAN_TIME - 1)
    rig.loop.turn()
    assert listener.is_open
    rig.loop.forward(1)
    rig.loop.until(lambda: not listener.is_open, "it is closed")


def test_who_asked_and_died_before_it_listened_counts(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = handles.listen(worker.id, Listen(1, "127.0.0.1:0", 16, False, False))
    worker.die()
    handles.leave_all(worker.id, crashed=False)
    assert not listener.is_open


# ── one address, many names ─────────────────────────────────────────────────────────────────────────────────────────


def port_of(listener: Listener) -> int:
    assert listener.endpoint is not None
    return listener.endpoint.port


def test_port_0_and_the_number_it_became_are_one(rig: Rig, handles: Handles) -> None:
    listener = ask(handles, rig.worker(), "127.0.0.1:0")
    assert ask(handles, rig.worker(), f"127.0.0.1:{port_of(listener)}") is listener


def test_all_addresses_include_all_of_ipv4(rig: Rig, handles: Handles) -> None:
    listener = ask(handles, rig.worker(), "*:0")
    port = port_of(listener)
    assert listener.sockname[0] == "::"
    assert ask(handles, rig.worker(), f"0.0.0.0:{port}") is listener
    assert ask(handles, rig.worker(), f"*:{port}") is listener
    assert ask(handles, rig.worker(), f"[::]:{port}") is listener
    for bind, v6only in ((f"127.0.0.1:{port}", False), (f"[::]:{port}", True), (f"[::1]:{port}", False)):
        with pytest.raises(BindError, match=rf"this cluster listens on \[::\]:{port}") as caught:
            ask(handles, rig.worker(), bind, v6only=v6only)
        assert caught.value.errno == errno.EADDRINUSE


def test_one_family_does_not_include_the_other(rig: Rig, handles: Handles) -> None:
    listener = ask(handles, rig.worker(), "0.0.0.0:0")
    port = port_of(listener)
    with pytest.raises(BindError, match=rf"listens on 0\.0\.0\.0:{port}"):
        ask(handles, rig.worker(), f"*:{port}")
    only = ask(handles, rig.worker(), f"[::]:{port}", v6only=True)
    assert only is not listener
    assert ask(handles, rig.worker(), f"[::]:{port}", v6only=True) is only


def test_a_worker_listens_once_on_one_address(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0")
    with pytest.raises(BindError, match="this worker listens there already") as caught:
        ask(handles, worker, f"127.0.0.1:{port_of(listener)}")
    assert caught.value.errno == errno.EADDRINUSE
    with connect(listener):
        worker.receive()
    # Where it is on a port that 0 has become, 0 is the next one.
    other = rig.worker()
    assert ask(handles, other, f"127.0.0.1:{port_of(listener)}") is listener
    assert ask(handles, other, "127.0.0.1:0") is not listener


def test_a_bind_is_nobody_elses(rig: Rig, handles: Handles) -> None:
    (pinned,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    with pytest.raises(BindError, match=r"it is the cluster's --bind 127\.0\.0\.1:0") as caught:
        ask(handles, rig.worker(), f"127.0.0.1:{port_of(pinned)}")
    assert caught.value.errno == errno.EADDRINUSE


def test_what_port_0_has_become_stays(rig: Rig, handles: Handles) -> None:
    one, other = rig.worker(), rig.worker()
    first = ask(handles, one, "127.0.0.1:0")
    second = ask(handles, one, "127.0.0.1:0")
    for listener in (first, second):
        handles.leave(one.id, listener.key, crashed=False)
    assert refused(first)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port_of(first)))
    assert port_of(ask(handles, other, f"127.0.0.1:{port_of(second)}")) == port_of(second)
    assert port_of(ask(handles, other, "127.0.0.1:0")) == port_of(first)


def test_another_program_has_it_all_the_same(rig: Rig, handles: Handles, caplog: pytest.LogCaptureFixture) -> None:
    worker = rig.worker()
    first = ask(handles, worker, "127.0.0.1:0")
    handles.leave(worker.id, first.key, crashed=False)
    with socket.create_server(("127.0.0.1", port_of(first))):
        second = ask(handles, worker, "127.0.0.1:0")
    assert port_of(second) != port_of(first)
    assert "for port 0, workers get another" in caplog.text


@pytest.mark.parametrize("option", ["reuse_address", "keep_alive"])
def test_all_want_the_same(rig: Rig, handles: Handles, option: str) -> None:
    ask(handles, rig.worker(), "127.0.0.1:0", **{option: True})
    with pytest.raises(BindError, match=f"{option}=") as caught:
        ask(handles, rig.worker(), "127.0.0.1:0", **{option: False, "reuse_address": option != "reuse_address"})
    assert caught.value.errno == errno.EINVAL


def test_accepted_sockets_keep_alive(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0", keep_alive=True)
    with connect(listener):
        worker.receive()
        (offer,) = worker.offers.values()
        assert offer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_the_first_workers_data_is_for_all(rig: Rig, handles: Handles) -> None:
    first = rig.worker()
    listener = ask(handles, first, "127.0.0.1:0", data="jfirst")
    assert ask(handles, rig.worker(), "127.0.0.1:0", data="jsecond").data == "jfirst"
    handles.leave_all(first.id, crashed=False)
    assert ask(handles, rig.worker(), "127.0.0.1:0").data == "jfirst"
    assert listener.workers


def test_a_unix_socket_by_another_path(rig: Rig, handles: Handles, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    worker = rig.worker()
    listener = ask(handles, worker, f"unix:{tmp_path}/s")
    assert ask(handles, rig.worker(), f"unix:{tmp_path}/link/s") is listener
    with pytest.raises(BindError, match="already"):
        ask(handles, worker, f"unix:{tmp_path}/link/s")


def test_a_long_path(rig: Rig, handles: Handles, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    worker = rig.worker()
    for _ in range(2):
        listener = ask(handles, worker, f"unix:{directory}/s")
        assert listener.sockname == f"{directory}/s"
        assert listener.address == f"unix:{directory}/s"
        with socket.socket(socket.AF_UNIX) as client:
            descriptor = os.open(directory, os.O_PATH)
            client.connect(f"/proc/self/fd/{descriptor}/s")
            os.close(descriptor)
            worker.receive()
        handles.leave(worker.id, listener.key, crashed=False)
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_descriptor_of_the_masters(rig: Rig, handles: Handles, tmp_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_UNIX) as inherited:
        inherited.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / "s"))
        inherited.listen()
        one, other = rig.worker(), rig.worker()
        listener = ask(handles, one, f"fd://{inherited.fileno()}")
        assert ask(handles, other, f"fd://{inherited.fileno()}") is listener
        with pytest.raises(BindError, match="already"):
            ask(handles, one, f"fd://{inherited.fileno()}")
        if kind == "tcp":
            assert ask(handles, rig.worker(), f"127.0.0.1:{port_of(listener)}") is listener
        handles.leave_all(one.id, crashed=False)
        handles.leave_all(other.id, crashed=False)
        # It is whose it was, and so is its file.
        assert inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert kind == "tcp" or (tmp_path / "s").exists()


# ── UDP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["handles", "shared"])
def test_udp_is_shared_under_every_policy(rig: Rig, request: pytest.FixtureRequest, kind: str) -> None:
    handles: Handles = request.getfixturevalue(kind)
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0", datagram=True)
    assert handles.is_shared(listener.datagram)
    assert handles.address(listener.key) == ("127.0.0.1", port_of(listener), "udp4", None, False)
    assert ask(handles, rig.worker(), f"127.0.0.1:{port_of(listener)}", datagram=True) is listener
    # A free port of TCP is another.
    assert ask(handles, worker, "127.0.0.1:0") is not listener
    assert rig.distributor.handles.keys() <= {2}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", ("127.0.0.1", port_of(listener)))
    assert listener.sock.recv(10) == b"hello"
    handles.leave_all(worker.id, crashed=False)
    assert listener.is_open


def test_both_families_of_udp(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    first = ask(handles, worker, "[::]:0", datagram=True, v6only=True)
    second = ask(handles, worker, f"0.0.0.0:{port_of(first)}", datagram=True)
    assert handles.address(first.key).address_type == "udp6"
    assert second is not first


@pytest.mark.parametrize(("kind", "fits"), [(socket.SOCK_DGRAM, True), (socket.SOCK_STREAM, False)])
def test_a_descriptor_of_the_masters_for_udp(rig: Rig, handles: Handles, kind: socket.SocketKind, fits: bool) -> None:
    with socket.socket(socket.AF_INET, kind) as inherited:
        inherited.bind(("127.0.0.1", 0))
        bind = f"fd://{inherited.fileno()}"
        if fits:
            assert port_of(ask(handles, rig.worker(), bind, datagram=True)) == inherited.getsockname()[1]
        else:
            with pytest.raises(BindError, match="not a udp socket"):
                ask(handles, rig.worker(), bind, datagram=True)


# ── what cannot be had ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text", ["", "x:99999", "http://localhost", "unix:", "[::1", "fd://x", "unix:a\0b", "\udcff:1", "a b:1"]
)
def test_what_is_no_address_is_that_workers_error(rig: Rig, handles: Handles, text: str) -> None:
    worker = rig.worker()
    with pytest.raises(BindError) as caught:
        ask(handles, worker, text)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.address == text
    ask(handles, worker, "127.0.0.1:0")


def test_an_error_leaves_nothing_and_the_next_try_starts_clean(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        for _ in range(2):
            with pytest.raises(BindError) as caught:
                ask(handles, worker, bind)
            assert caught.value.errno == errno.EADDRINUSE
        assert list(handles) == []
        assert rig.distributor.handles == {}
    listener = ask(handles, worker, bind)
    with connect(listener):
        worker.receive()


def test_no_descriptor_for_a_listener(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    with no_more_descriptors(), pytest.raises(BindError) as caught:
        ask(handles, worker, "127.0.0.1:0")
    assert caught.value.errno == errno.EMFILE
    ask(handles, worker, "127.0.0.1:0")


def test_listening_on_what_was_never_asked_for(rig: Rig, handles: Handles) -> None:
    one, other = rig.worker(), rig.worker()
    listener = ask(handles, one, "127.0.0.1:0")
    for key in (listener.key, 99, -1):
        with pytest.raises(ProtocolError, match="did not ask for"):
            handles.attach(other.id, key)
    handles.leave(other.id, listener.key, crashed=False)
    handles.leave(other.id, 99, crashed=False)
    assert listener.is_open


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_when_all_is_closed_a_late_worker_may_still_serve_what_waits(rig: Rig, handles: Handles) -> None:
    (listener,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    first = rig.worker()
    handles.listen(first.id, Listen(1, "127.0.0.1:0", 16, False, True))
    with connect(listener):
        rig.queued(1)
        handles.close()
        late = rig.worker()
        assert ask(handles, late, "127.0.0.1:0", backlog=100, pinned=True) is listener
        late.receive()
        with pytest.raises(BindError, match="the cluster is stopping") as caught:
            ask(handles, late, "127.0.0.1:0")
        assert caught.value.errno == errno.ESHUTDOWN
    handles.close()


def test_a_pinned_listener_nobody_had_asked_for_yet(rig: Rig, handles: Handles) -> None:
    (listener,) = handles.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    handles.close()
    assert ask(handles, rig.worker(), "127.0.0.1:0", pinned=True) is listener


def test_when_all_is_closed_nobody_gets_the_socket_itself(rig: Rig, shared: Handles) -> None:
    shared.open_pinned([Bind.parse("127.0.0.1:0")], 16)
    shared.close()
    with pytest.raises(BindError, match="the cluster is stopping"):
        ask(shared, rig.worker(), "127.0.0.1:0", pinned=True)


def test_the_last_worker_leaves_after_the_end(rig: Rig, handles: Handles) -> None:
    worker = rig.worker()
    listener = ask(handles, worker, "127.0.0.1:0")
    handles.close()
    handles.leave_all(worker.id, crashed=False)
    assert list(handles) == []
    assert not listener.is_open
