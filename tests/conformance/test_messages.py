"""Rows M01-M23: messages, requests and sockets between a master and real worker processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterserve import ChannelClosed, Cluster, Worker
from tests.conformance.races import races
from tests.helpers import loops  # noqa: F401 - the first loop of libuv leaves a pipe open
from tests.helpers.descriptors import no_descriptor_is_left  # noqa: F401 - no test here leaves one
from tests.helpers.server import ROOT, environment, new_mark, python
from tests.helpers.waiting import eventually

#: What every worker of these tests begins with, and how one goes on that only has handlers.
PREAMBLE = """
import asyncio, os, socket, sys, threading
from clusterserve import ChannelClosed, ClusterError, current_worker
worker = current_worker()
"""
WAIT = "asyncio.run(asyncio.Event().wait())\n"

#: Nobody waits as long as this: it says that something hangs.
LONG = 40.0


class Rig:
    """A cluster of scripts, and what it told."""

    def __init__(self, directory: Path, script: str, workers: int, **settings: Any) -> None:
        path = directory / "worker.py"
        path.write_text(PREAMBLE + textwrap.dedent(script))
        self.cluster = Cluster(exec=str(path), workers=workers, respawn=False, **settings)
        #: (worker's id, message) as the cluster tells them, the sockets with them, and everything else it tells.
        self.heard: list[tuple[int, Any]] = []
        self.sockets: list[socket.socket] = []
        self.events: list[tuple[Any, ...]] = []
        self.errors: list[Exception] = []
        self.cluster.on("message", self._hear)
        self.cluster.on("disconnect", lambda worker: self.events.append(("disconnect", worker.id)))
        self.cluster.on("exit", lambda worker, code, signal: self.events.append(("exit", worker.id, code, signal)))
        self.cluster.on("error", lambda worker, error: self.errors.append(error))

    def _hear(self, worker: Worker, message: Any, sockets: list[socket.socket]) -> None:
        self.sockets += sockets
        self.heard.append((worker.id, message))

    @property
    def worker(self) -> Worker:
        return self.cluster.workers[1]

    @property
    def messages(self) -> list[Any]:
        return [message for _, message in self.heard]

    def hears(self, count: int) -> list[Any]:
        eventually(lambda: len(self.heard) >= count, f"{count} messages are heard", within=LONG)
        assert len(self.heard) == count
        return self.messages

    def exits(self, worker: int = 1) -> tuple[int | None, int | None]:
        """The code and the signal with which a worker ends."""

        def ended() -> list[tuple[Any, ...]]:
            return [event for event in self.events if event[:2] == ("exit", worker)]

        (event,) = eventually(ended, f"worker {worker} has ended", within=LONG)
        return event[2], event[3]

    def goes(self, worker: int = 1) -> None:
        """It is told to leave, and ends in order."""
        self.cluster.workers[worker].disconnect()
        assert self.exits(worker) == (0, None)

    def ask(self, obj: Any, *sockets: socket.socket, **options: Any) -> Any:
        """Of the first worker."""
        return self.worker.request(obj, *sockets, **options).result(LONG)


Start = Callable[..., "contextlib.AbstractContextManager[Rig]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    @contextlib.contextmanager
    def start(script: str, workers: int = 1, before: Callable[[Rig], object] = id, **settings: Any) -> Iterator[Rig]:
        rig = Rig(tmp_path, script, workers, **settings)
        before(rig)
        try:
            with rig.cluster:
                yield rig
        finally:
            for sock in rig.sockets:
                sock.close()

    return start


ECHO = (
    """
@worker.on("message")
def echo(message, sockets):
    worker.send(message, *sockets)
"""
    + WAIT
)


def test_M01_messages_reach_the_worker_object_and_the_cluster_with_the_worker_first(start: Start) -> None:
    with start(ECHO, workers=2) as rig:
        own: list[Any] = []
        rig.cluster.workers[1].on("message", own.append)
        for id, worker in rig.cluster.workers.items():
            assert worker.send({"to": id})
        rig.hears(2)
        assert sorted(rig.heard, key=str) == [(1, {"to": 1}), (2, {"to": 2})]
        assert own == [{"to": 1}]


def test_M02_once_per_listener_and_send_returns_true(start: Start) -> None:
    script = """
    told = []
    worker.on("message", lambda message: told.append("first"))
    worker.on("message", lambda message: told.append("second"))
    worker.once("message", lambda message: told.append("once"))
    worker.on("message", lambda message: worker.send([bool(worker.send(0)), told]))
    """
    with start(script + WAIT) as rig:
        assert rig.worker.send(1)
        assert rig.hears(2) == [0, [True, ["first", "second", "once"]]]


def test_M02_what_a_handler_throws_at_the_worker_reaches_its_error_listeners(start: Start) -> None:
    script = """
    worker.on("error", lambda error: worker.send(str(error)))
    worker.emit("error", ClusterError("bang"))
    """
    with start(script + WAIT) as rig:
        assert rig.hears(1) == ["bang"]


def test_M03_a_message_waits_for_a_listener_that_registers_during_start_up(start: Start) -> None:
    def greets(rig: Rig) -> None:
        rig.cluster.on("online", lambda worker: worker.send("welcome"))
        # It is on its way when this is answered, and messages keep their order.
        rig.cluster.on_request(lambda worker, obj: "go on")

    script = """
    assert worker.request("shall I?").result(40) == "go on"
    worker.on("message", lambda message: worker.send(message))
    """
    with start(script + WAIT, before=greets) as rig:
        assert rig.hears(1) == ["welcome"]


def test_M03_in_an_application_during_its_start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m03app.py").write_text(
        PREAMBLE
        + textwrap.dedent("""
        async def app(scope, receive, send):
            assert scope["type"] == "lifespan"
            await receive()
            await worker.request("shall I?")
            worker.on("message", lambda message: worker.send(message))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        """)
    )
    heard: list[Any] = []
    cluster = Cluster("m03app:app", workers=1, bind="127.0.0.1:0", app_dir=str(tmp_path))
    cluster.on("online", lambda worker: worker.send("welcome"))
    cluster.on_request(lambda worker, obj: "go on")
    cluster.on("message", lambda worker, message: heard.append(message))
    with cluster:
        eventually(lambda: heard == ["welcome"], "it came back", within=LONG)


def test_M04_a_message_that_looks_like_one_of_ours_does_nothing(start: Start) -> None:
    """In either direction."""
    messages = [
        {"ack": 0x7FFFFFFF, "cmd": "NODE_CLUSTER"},
        ["Drain", 0.0, True, False],
        ["Listening", 99],
        ["Online", -1],
    ]
    with start(ECHO) as rig:
        for message in messages:
            rig.worker.send(message)
        assert rig.hears(4) == messages
        assert rig.worker.state == "online"
        rig.goes()


def test_M05_no_dictionary_is_reserved(start: Start) -> None:
    messages = [{"cmd": command} for command in ("NODE_internal", "NODE_", "a NODE_", "Drain")]
    with start(ECHO) as rig:
        for message in messages:
            rig.worker.send(message)
        assert rig.hears(4) == messages
        rig.goes()


def test_M06_what_refers_to_itself_survives_with_pickle(start: Start) -> None:
    with start(ECHO, serialization="pickle") as rig:
        ring: list[Any] = [{1, 2}, b"bytes"]
        ring.append(ring)
        rig.worker.send(ring)
        (there,) = rig.hears(1)
        assert there[:2] == [{1, 2}, b"bytes"]
        assert there[2] is there


def test_M06_and_is_the_senders_mistake_with_json(start: Start) -> None:
    with start(ECHO) as rig:
        ring: list[Any] = []
        ring.append(ring)
        with pytest.raises(ValueError, match="Circular"):
            rig.worker.send(ring)
        with pytest.raises(TypeError):
            rig.worker.send({1, 2})


def test_M07_large_messages_arrive_whole_and_in_order(start: Start) -> None:
    sent = [str(number) * (8 << 20) for number in range(4)] + [str(number) * 65521 for number in range(10)]
    with start(ECHO) as rig:
        for message in sent:
            rig.worker.send(message)
        assert rig.hears(len(sent)) == sent
        rig.goes()


JUNK = {
    "a length that cannot be": b"\xff\xff\xff\xff" + bytes(2),
    "of a message": b"\xff\xff\xff\xff\x01\x00",
    "no JSON": b"\x0b\x00\x00\x00\x01\x00" + bytes(8) + b"{x}",
    "a pickle": b"\x0c\x00\x00\x00\x11\x00" + bytes(8) + b"cx\n.",
    "an answer to nothing": b"\x09\x00\x00\x00\x03\x00" + b"\x63" + bytes(7) + b"1",
    "an order to the master": b"\x0d\x00\x00\x00\x00\x00" + b'["Drain",1,2]',
}


def test_M08_junk_on_the_channel_costs_that_worker_and_no_other(start: Start) -> None:
    script = f"""
    junk = {list(JUNK.values())!r}

    @worker.on("message")
    def attack(message):
        if worker.id > 1:
            for name in os.listdir("/proc/self/fd"):
                sock = None
                try:
                    sock = socket.socket(fileno=int(name))
                    if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
                        sock.send(junk[worker.id - 2])
                except OSError:
                    pass
                finally:
                    sock and sock.detach()
        else:
            worker.send("alive")
    """
    with start(script + WAIT, workers=1 + len(JUNK)) as rig:
        for id, kind in enumerate(JUNK, 2):
            rig.cluster.workers[id].send("go")
            # Killed, if it has not noticed before that its channel is closed.
            assert rig.exits(id) in ((None, 9), (0, None)), kind
        rig.worker.send("still there?")
        assert rig.hears(1) == ["alive"]
        rig.goes(1)


def test_M09_an_exception_in_a_handler_does_not_stop_delivery(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    script = """
    @worker.on("message")
    def broken(message):
        worker.send(message)
        raise ValueError("bang") if message != 3 else KeyError
    """

    def broken(rig: Rig) -> None:
        @rig.cluster.on("message")
        async def broken_too(worker: Worker) -> None:
            raise ValueError("bang")

    with start(script + WAIT, before=broken) as rig:
        for number in range(10):
            rig.worker.send(number)
        assert rig.hears(10) == list(range(10))
        rig.goes()
    assert len([record for record in caplog.records if "raised" in record.getMessage()]) == 10


def test_M10_what_send_returns(start: Start) -> None:
    with start("import signal\n" + ECHO) as rig:
        delivery = rig.worker.send("small")
        assert delivery
        assert delivery.result(LONG) is None
        rig.hears(1)
        large = [rig.worker.send(["x" * (1 << 20), number]) for number in range(8)]
        # So much waits now that a sender should wait as well; nothing is lost by not doing so.
        assert [bool(each) for each in large] == [True] + [False] * 7
        for each in large:
            each.result(LONG)
        assert [number for _, number in rig.hears(9)[1:]] == list(range(8))
        rig.goes()
        gone = rig.cluster.workers.get(1)
        assert gone is None


def test_M10_after_the_channel_is_closed(start: Start) -> None:
    with start(ECHO) as rig:
        worker = rig.worker
        rig.goes()
        delivery = worker.send("too late")
        assert not delivery
        with pytest.raises(ChannelClosed, match="worker 1"):
            delivery.result(LONG)
        with pytest.raises(ChannelClosed, match="worker 1"):
            worker.request("too late").result(LONG)
        # A race is a result, and never an error that nobody asked for.
        assert rig.errors == []


def test_M11_disconnect_is_told_later_and_then_it_is_not_connected(start: Start) -> None:
    script = """
    told = []
    @worker.on("disconnect")
    def gone():
        told.append(worker.is_connected())
        try:
            worker.send("too late").result(40)
        except ChannelClosed:
            os._exit(40 + told[0])

    @worker.on("message")
    def leave(message):
        worker.disconnect()
        assert worker.disconnect() is worker
        worker.send(["connected", worker.is_connected(), told])
    """
    with start(script + WAIT) as rig:
        connected: list[bool] = []
        worker = rig.worker
        worker.on("disconnect", lambda: connected.append(worker.is_connected()))
        worker.send("leave")
        assert rig.exits() == (40, None)
        assert rig.messages == [["connected", True, []]]
        eventually(lambda: connected, "the master was told", within=LONG)
        assert connected == [False]


@pytest.mark.parametrize("end", ["os._exit(7)", "sys.exit(7)", "os.kill(os.getpid(), 9)"])
def test_M12_messages_sent_just_before_the_end_are_delivered_before_it_is_told(start: Start, end: str) -> None:
    script = f"""
    for number in range(20):
        worker.send(["x" * 1000, number])
    {end}
    """
    with start(script) as rig:
        code, signal = rig.exits()
        assert (code, signal) == ((None, 9) if "kill" in end else (7, None))
        assert [number for _, number in rig.hears(20)] == list(range(20))


def test_M12_what_waits_at_an_orderly_end_as_well(start: Start) -> None:
    script = """
    worker.send("x" * (8 << 20))
    worker.send("last")
    """
    with start(script) as rig:
        assert rig.exits() == (0, None)
        assert rig.hears(2)[1] == "last"


def test_M12_messages_sent_before_disconnect_are_received_before_it(start: Start) -> None:
    """Row D14, from the master: it says farewell behind all of them."""
    script = """
    count = 0
    @worker.on("message")
    def count_it(message):
        global count
        count += 1

    worker.on("disconnect", lambda: os._exit(count))
    """
    with start(script + WAIT) as rig:
        for _ in range(50):
            rig.worker.send("x" * 65536)
        rig.worker.disconnect()
        assert rig.exits() == (50, None)


@races()
def test_M13_a_socket_works_though_its_sender_closes_its_own_at_once(start: Start) -> None:
    """Eighty, from eight workers in parallel."""
    script = """
    for number in range(10):
        near, far = socket.socketpair()
        far.sendall(f"{worker.id}:{number}".encode())
        far.close()
        worker.send([worker.id, number], near)
        near.close()
    """
    with start(script + WAIT, workers=8) as rig:
        rig.hears(80)
        assert len(rig.sockets) == 80
        for (id, number), sock in zip(rig.messages, rig.sockets, strict=True):
            assert sock.recv(99) == f"{id}:{number}".encode()
            assert sock.recv(99) == b""
        for id in range(1, 9):
            assert [number for who, number in rig.messages if who == id] == list(range(10))


@races()
def test_M14_one_socket_twice(start: Start) -> None:
    script = """
    @worker.on("message")
    def use(message, sockets):
        with sockets[0] as sock:
            sock.sendall(str(message).encode())
        worker.send(message)
    """
    with start(script + WAIT) as rig:
        near, far = socket.socketpair()
        with near, far:
            rig.worker.send(1, near, keep_open=True)
            rig.worker.send(2, near)
            rig.hears(2)
            assert far.recv(9) == b"12"
            assert near.fileno() == -1
            assert far.recv(9) == b""
        rig.goes()


@races()
def test_M15_sockets_from_both_sides_at_once(start: Start) -> None:
    script = """
    got = []

    @worker.on("message")
    def count(message, sockets):
        for sock in sockets:
            got.append(sock.recv(9))
            sock.close()
        if len(got) == 100:
            worker.send(["all", [data.decode() for data in got]])

    @worker.on_request
    def begin(obj):
        for number in range(100):
            near, far = socket.socketpair()
            far.sendall(str(number).encode())
            far.close()
            worker.send("x" * 3000, near)
    """
    with start(script + WAIT) as rig:
        begun = rig.worker.request("begin")
        for number in range(100):
            near, far = socket.socketpair()
            far.sendall(str(number).encode())
            far.close()
            rig.worker.send("x" * 3000, near)
        begun.result(LONG)
        messages = rig.hears(101)
        (all_of_them,) = [message for message in messages if isinstance(message, list)]
        assert all_of_them == ["all", [str(number) for number in range(100)]]
        assert [sock.recv(9) for sock in rig.sockets] == [str(number).encode() for number in range(100)]
        rig.goes()


@races()
@pytest.mark.parametrize("slow", [False, True], ids=["", "a stopped reader"])
def test_M16_a_large_message_arrives_intact_with_its_socket(start: Start, slow: bool) -> None:
    size = 800_004
    with start(ECHO) as rig:
        near, far = socket.socketpair()
        with far:
            if slow:
                # It reads nothing: what the kernel does not take is sent in parts, later.
                rig.worker.kill("SIGSTOP")
            first = rig.worker.send("before" * 100_000)
            rig.worker.send("y" * size, near)
            rig.worker.send("after")
            if slow:
                assert not first.done()
                rig.worker.kill("SIGCONT")
            assert rig.hears(3) == ["before" * 100_000, "y" * size, "after"]
            (sock,) = rig.sockets
            sock.sendall(b"both ways")
            assert far.recv(99) == b"both ways"
        rig.goes()


@races()
def test_M17_a_socket_arrives_with_exactly_its_message(start: Start) -> None:
    script = """
    @worker.on("message")
    def tell(message, sockets):
        worker.send([message, len(sockets)])
        for sock in sockets:
            sock.close()
    """
    with start(script + WAIT) as rig:
        rig.worker.kill("SIGSTOP")
        with socket.create_server(("127.0.0.1", 0)) as server:
            for number in range(30):
                rig.worker.send(number, *[server] * (number % 3))
            rig.worker.kill("SIGCONT")
            assert rig.hears(30) == [[number, number % 3] for number in range(30)]
        rig.goes()


@pytest.mark.parametrize("dispatch", ["auto", "connection"])
@pytest.mark.parametrize("policy", ["rr", "none"])
def test_M18_a_connection_sent_by_hand_is_served_by_the_workers_http_server(
    tmp_path: Path, dispatch: str, policy: str
) -> None:
    name = f"m18_{dispatch}_{policy}"
    (tmp_path / f"{name}.py").write_text(
        PREAMBLE
        + textwrap.dedent("""
        @worker.on("message")
        def serve(message, sockets):
            worker.serve(sockets[0])

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                while (await receive())["type"] == "lifespan.startup":
                    await send({"type": "lifespan.startup.complete"})
                await send({"type": "lifespan.shutdown.complete"})
                return
            body = f"{worker.id} {scope['path']}".encode()
            headers = [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        """)
    )
    settings = {"policy": policy, "dispatch": dispatch, "bind": "127.0.0.1:0", "app_dir": str(tmp_path)}
    with (
        Cluster(f"{name}:app", workers=2, **settings) as cluster,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        for id, worker in cluster.workers.items():
            with socket.create_connection(server.getsockname(), timeout=LONG) as client:
                connection, _ = server.accept()
                worker.send("serve it", connection)
                # Twice, on one connection.
                for path in ("/one", "/two"):
                    client.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                    answer = b""
                    while not answer.endswith(f"{id} {path}".encode()):
                        data = client.recv(9999)
                        assert data, answer
                        answer += data


def test_M18_and_by_any_asyncio_server_of_a_program(start: Start) -> None:
    script = """
    async def main():
        async def answer(reader, writer):
            writer.write(b"hello " + await reader.readline())
            writer.close()

        @worker.on_request
        def serve(message, sockets):
            worker.serve(sockets[0])

        try:
            worker.serve(None)
        except ClusterError as error:
            worker.send(str(error))
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            worker.send(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    asyncio.run(main())
    """
    with start(script) as rig, socket.create_server(("127.0.0.1", 0)) as server:
        complaint, port = rig.hears(2)
        assert complaint == "this worker has no server for a connection"
        with socket.create_connection(server.getsockname(), timeout=LONG) as client:
            rig.ask("serve it", server.accept()[0])
            client.sendall(b"by hand\n")
            assert client.recv(99) == b"hello by hand\n"
        with socket.create_connection(("127.0.0.1", port), timeout=LONG) as client:
            client.sendall(b"by the master\n")
            assert client.recv(99) == b"hello by the master\n"
        rig.goes()


def test_M19_a_listening_socket_is_used_on_both_sides(start: Start) -> None:
    script = """
    @worker.on_request
    def serve(obj, sockets):
        with sockets[0] as server:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"worker")
        return "done"
    """
    with start(script + WAIT) as rig, socket.create_server(("127.0.0.1", 0)) as server:
        done = rig.worker.request("accept one", server)
        with socket.create_connection(server.getsockname()) as client:
            assert client.recv(99) == b"worker"
        assert done.result(LONG) == "done"
        # Ours is still ours.
        with socket.create_connection(server.getsockname()) as client:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"master")
            assert client.recv(99) == b"master"
        rig.goes()


TAKE = """
@worker.on_request
def write(obj, sockets):
    with sockets[0] as sock:
        sock.sendall(b"child")
"""


def test_M20_the_senders_own_is_closed_when_the_kernel_has_the_message(start: Start) -> None:
    with start(TAKE + WAIT) as rig, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            connection, _ = server.accept()
            rig.ask("write", connection)
            assert connection.fileno() == -1
            assert client.recv(99) == b"child"
            assert client.recv(99) == b""
        rig.goes()


def test_M20_keep_open_lets_both_write(start: Start) -> None:
    with start(TAKE + WAIT) as rig, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            connection, _ = server.accept()
            with connection:
                rig.ask("write", connection, keep_open=True)
                connection.sendall(b"parent")
            assert client.recv(99) == b"childparent"
        rig.goes()


def test_M22_a_udp_socket_is_shared(start: Start) -> None:
    script = """
    @worker.on_request
    def receive(obj, sockets):
        with sockets[0] as udp:
            data, sender = udp.recvfrom(99)
            udp.sendto(b"worker got " + data, sender)
        return data.decode()
    """
    with start(script + WAIT) as rig, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(LONG)
            asked = rig.worker.request("receive", udp)
            client.sendto(b"one", udp.getsockname())
            assert asked.result(LONG) == "one"
            assert client.recv(99) == b"worker got one"
            client.sendto(b"two", udp.getsockname())
            assert udp.recv(99) == b"two"
        rig.goes()


@races()
def test_M23_the_worker_goes_on_the_first_of_two_sockets(start: Start) -> None:
    script = """
    @worker.on("message")
    def leave(message, sockets):
        os._exit(3)

    worker.on_request(lambda obj: obj)
    """
    with start(script + WAIT) as rig:
        worker = rig.worker
        assert rig.ask("ready?") == "ready?"
        pairs = [socket.socketpair() for _ in range(2)]
        with contextlib.ExitStack() as stack:
            for sock in itertools.chain(*pairs):
                stack.enter_context(sock)
            worker.send("first", pairs[0][0])
            # More than it could read in the time that it takes to end.
            second = worker.send("x" * (60 << 20), pairs[1][0])
            with pytest.raises(ChannelClosed):
                second.result(LONG)
            assert rig.exits() == (3, None)
            # It was not taken: it is ours still, and the copy that was under way is closed.
            assert pairs[1][0].fileno() >= 0
            pairs[1][0].close()
            assert pairs[1][1].recv(1) == b""
            assert pairs[0][1].recv(1) == b""


# ── requests and broadcast ──────────────────────────────────────────────────────────────────────────────────────────


def test_requests_both_ways(start: Start) -> None:
    script = """
    @worker.on_request
    async def answer(obj):
        return {"worker": worker.id, "says": await worker.request(obj)}
    """

    def answers(rig: Rig) -> None:
        rig.cluster.on_request(lambda worker, obj: [worker.id, obj])

    with start(script + WAIT, workers=2, before=answers) as rig:
        pending = {id: worker.request("hello") for id, worker in rig.cluster.workers.items()}
        for id, each in pending.items():
            assert each.result(LONG) == {"worker": id, "says": [id, "hello"]}


def test_an_exception_is_the_askers_with_its_text(start: Start) -> None:
    script = """
    @worker.on_request
    def answer(obj):
        raise LookupError(f"no {obj} here")
    """
    with start(script + WAIT) as rig, pytest.raises(Exception, match=r"^LookupError: no bread here$"):
        rig.ask("bread")


def test_nobody_answers_in_time(start: Start) -> None:
    script = """
    gates = {}

    @worker.on_request
    async def answer(obj):
        if obj == "open":
            for gate in gates.values():
                gate.set()
            return "opened"
        gates[obj] = asyncio.Event()
        await gates[obj].wait()
        return obj
    """
    with start(script + WAIT) as rig:
        with pytest.raises(TimeoutError, match=r"^worker 1 has not answered within 0\.05 s$"):
            rig.ask("slow", timeout=0.05)
        # It is answered after all, which harms nobody.
        assert rig.ask("open") == "opened"
        assert rig.worker.state == "online"


def test_a_worker_that_dies_fails_what_it_was_asked(start: Start) -> None:
    script = """
    @worker.on_request
    async def answer(obj):
        if obj == "die":
            os._exit(1)
        await asyncio.Event().wait()
    """
    with start(script + WAIT) as rig:
        worker = rig.worker
        waiting = [worker.request(number) for number in range(5)]
        waiting.append(worker.request("die"))
        for each in waiting:
            with pytest.raises(ChannelClosed, match="worker 1 is gone"):
                each.result(LONG)


def test_broadcast_reaches_every_worker_that_is_connected(start: Start) -> None:
    with start(ECHO, workers=3) as rig:
        rig.goes(2)
        assert rig.cluster.broadcast({"all": 1}).result(LONG) == 2
        rig.hears(2)
        assert sorted(rig.heard) == [(1, {"all": 1}), (3, {"all": 1})]


def test_no_descriptor_is_left_in_either_process(start: Start) -> None:
    """Sockets that a handler drops, that nobody listens for, that come at the limit: all are closed."""
    script = """
    import gc, resource

    @worker.on_request
    def count(obj):
        gc.collect()
        used = len(os.listdir("/proc/self/fd"))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if obj == "limit":
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, hard))
        elif obj == "no limit":
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return used

    @worker.on("message")
    def message(message, sockets):
        if message == "count":
            worker.send(len(sockets))

    worker.on("error", lambda error: worker.send(str(error)))
    """
    with start(script + WAIT) as rig:
        before = rig.ask("count")
        for number in range(50):
            near, far = socket.socketpair()
            rig.worker.send(number, near)
            far.close()
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert rig.ask("limit") == before
            rig.worker.send("count", *[server] * 16)
            lost, arrived = rig.hears(2)
            assert rig.ask("no limit") == before
            assert lost.endswith("of 16 sockets of a message have not arrived: at the limit of open files?")
            assert arrived == 16 - int(lost.split()[0])
            # The next one's are its own.
            rig.worker.send("count", server)
            assert rig.hears(3)[2] == 1
        rig.goes()


def test_M07_a_message_of_nearly_the_greatest_size_holds_nobody_up(start: Start) -> None:
    """§2.22: another worker comes online meanwhile."""
    with start(ECHO) as rig:
        large = rig.worker.send("x" * (60 << 20))
        assert rig.worker.send("behind it") is not None
        other = rig.cluster.fork()
        eventually(lambda: other.state == "online", "it came online", within=LONG)
        large.result(LONG)
        assert rig.hears(2)[1] == "behind it"


def test_this_process_has_no_more_descriptors_than_before(start: Start) -> None:
    count = len(os.listdir("/proc/self/fd"))
    with start(ECHO) as rig:
        for number in range(20):
            near, far = socket.socketpair()
            rig.worker.send(number, near)
            far.close()
        rig.hears(20)
    assert len(os.listdir("/proc/self/fd")) == count


def test_the_master_of_the_command_line_answers_no_requests(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        PREAMBLE
        + textwrap.dedent("""
        worker.send("dropped")
        try:
            worker.request("anybody?").result(40)
        except ClusterError as error:
            print("told:", error, flush=True)
        os.kill(os.getppid(), 15)
        asyncio.run(asyncio.Event().wait())
        """)
    )
    mark, _ = new_mark()
    done = subprocess.run(
        python("exec", "--workers", "1", "asks.py"),
        cwd=tmp_path,
        env=environment(mark, {"PYTHONPATH": str(ROOT)}, tmp_path),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert "told: nobody answers requests there" in done.stdout, done.stderr
