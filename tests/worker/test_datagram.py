"""UDP in a worker: what is asked for, and the transport on a socket that others read too."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from clusterserve import listen_options
from clusterserve.core.messages import Closed, Listen, Listening
from clusterserve.worker.datagram import SharedDatagramTransport
from tests.helpers.loops import turns, until
from tests.worker.clustered import FakeMaster

Loop = asyncio.AbstractEventLoop


@pytest.fixture
def loop(fake: FakeMaster) -> Loop:
    """The cluster loop."""
    return fake.loop


@pytest.fixture
def sock(fake: FakeMaster) -> Iterator[socket.socket]:
    """The master's socket, which it gives to whoever asks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        fake.answers = fake.share(sock)
        yield sock


class Recorder(asyncio.DatagramProtocol):
    """Writes down what its transport tells it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.data: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.calls.append("made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.data.append(data)

    def error_received(self, exc: OSError) -> None:
        self.calls.append(exc.errno)

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append("lost")


def send(sock: socket.socket, *data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for each in data:
            client.sendto(each, sock.getsockname())


async def listen(loop: Loop, sock: socket.socket, **options: Any) -> tuple[SharedDatagramTransport, Recorder]:
    transport, protocol = await loop.create_datagram_endpoint(Recorder, sock.getsockname(), **options)
    assert isinstance(transport, SharedDatagramTransport)
    return transport, protocol


async def test_the_request(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    transport, protocol = await listen(loop, sock)
    assert protocol.calls == ["made"]
    port = sock.getsockname()[1]
    assert fake.of(Listen) == [Listen(1, f"127.0.0.1:{port}", 0, False, False, datagram=True)]
    assert await fake.said(Listening) == [Listening(1)]
    assert transport.get_extra_info("sockname") == sock.getsockname()
    transport.close()
    assert transport.is_closing()
    assert await fake.said(Closed) == [Closed(1)]
    await until(lambda: protocol.calls == ["made", "lost"], "it is told of the end")


@pytest.mark.parametrize(
    ("address", "options", "bind"),
    [
        (("localhost", 53), {"family": socket.AF_INET}, "127.0.0.1:53"),
        (("*", 0), {}, "*:0"),
        (("fd://3", 0), {}, "fd://3"),
        (("::", 53), {}, "[::]:53"),
    ],
)
async def test_addresses(
    loop: Loop, fake: FakeMaster, sock: socket.socket, address: Any, options: Any, bind: str
) -> None:
    with listen_options(v6only=":" in address[0], data=b"x"):
        transport, _ = await loop.create_datagram_endpoint(Recorder, address, **options)
    assert [(r.bind, r.v6only, r.data) for r in fake.of(Listen)] == [(bind, ":" in address[0], "beA==")]
    transport.close()


async def test_one_datagram_at_a_time(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    """Who else shares the socket finds the rest."""
    _, protocol = await listen(loop, sock)
    send(sock, b"1", b"2", b"3")
    await until(lambda: protocol.data, "one is read")
    assert protocol.data == [b"1"]
    assert sock.recv(10) == b"2"
    await until(lambda: len(protocol.data) > 1, "and another")
    assert protocol.data == [b"1", b"3"]


async def test_another_was_quicker(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    transport, protocol = await listen(loop, sock)
    transport._readable()
    assert (protocol.data, protocol.calls) == ([], ["made"])


async def test_it_sends(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    transport, protocol = await listen(loop, sock)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        client.setblocking(False)
        transport.sendto(b"hello", client.getsockname())
        assert client.recvfrom(10) == (b"hello", sock.getsockname())
    transport.sendto(b"x" * 70_000, sock.getsockname())
    assert protocol.calls == ["made", errno.EMSGSIZE]
    with pytest.raises(ValueError, match="no remote address"):
        transport.sendto(b"x")
    with pytest.raises(TypeError, match="bytes-like"):
        transport.sendto("x", sock.getsockname())


async def test_what_does_not_fit_waits(
    loop: Loop, fake: FakeMaster, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, protocol = await listen(loop, sock)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        client.setblocking(False)
        # Of what the kernel does, only when it has no room is made up.
        real, full = transport._sock, True

        class Full:
            def sendto(self, data: bytes, address: Any) -> int:
                if full:
                    raise BlockingIOError
                return real.sendto(data, address)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        monkeypatch.setattr(transport, "_sock", Full())
        transport.set_write_buffer_limits(high=5)
        transport.sendto(bytearray(b"one"), client.getsockname())
        transport.sendto(b"two", client.getsockname())
        assert transport.get_write_buffer_size() == 6
        assert protocol.calls == ["made", "pause"]
        await turns(3)
        transport.close()
        full = False
        await until(lambda: protocol.calls[-1] == "lost", "it ends when all is sent")
        assert protocol.calls == ["made", "pause", "resume", "lost"]
        assert (client.recv(10), client.recv(10)) == (b"one", b"two")


async def test_abort(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    transport, protocol = await listen(loop, sock)
    transport.abort()
    transport.abort()
    transport.close()
    await until(lambda: "lost" in protocol.calls, "it ends")
    assert await fake.said(Closed) == [Closed(1)]
    transport.sendto(b"x", sock.getsockname())


async def test_closing_as_soon_as_it_listens(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    class Closing(Recorder):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.close()

    _, protocol = await loop.create_datagram_endpoint(Closing, sock.getsockname())
    await until(lambda: protocol.calls == ["made", "lost"], "it ends")
    assert await fake.said(Closed) == [Closed(1)]


async def test_an_error(loop: Loop, fake: FakeMaster) -> None:
    fake.answers = fake.refuse(errno.EADDRINUSE, "taken")
    with pytest.raises(OSError, match="taken") as caught:
        await loop.create_datagram_endpoint(Recorder, ("127.0.0.1", 53))
    assert caught.value.errno == errno.EADDRINUSE


async def test_a_socket_that_comes_too_late(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    requests: list[Listen] = []
    fake.answers = requests.append
    task = loop.create_task(listen(loop, sock))
    await fake.said(Listen)
    task.cancel()
    await turns(2)
    before = len(os.listdir("/proc/self/fd"))
    fake.share(sock)(requests[0])
    assert await fake.said(Closed) == [Closed(1)]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_factory_that_fails(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    with pytest.raises(ZeroDivisionError):
        await loop.create_datagram_endpoint(lambda: 1 // 0, sock.getsockname())  # type: ignore[arg-type, return-value]
    assert await fake.said(Closed) == [Closed(1)]
    assert fake.of(Listening) == []


async def test_two_workers_in_one_multicast_group(loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
    transport, _ = await listen(loop, sock)
    shared = transport.get_extra_info("socket")
    membership = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
    for _ in range(2):
        shared.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    with pytest.raises(OSError, match="nvalid"):
        shared.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, b"\0" * 8)


class TestPastTheMaster:
    async def test_who_only_sends(self, loop: Loop, fake: FakeMaster, sock: socket.socket) -> None:
        for arguments in ({"remote_addr": sock.getsockname()}, {"family": socket.AF_INET}):
            transport, _ = await loop.create_datagram_endpoint(Recorder, **arguments)  # type: ignore[arg-type]
            transport.sendto(b"x", None if "remote_addr" in arguments else sock.getsockname())
            transport.close()
        assert fake.messages == []
        await turns(3)

    async def test_what_is_its_own(self, loop: Loop, fake: FakeMaster) -> None:
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.bind(("127.0.0.1", 0))
        first, _ = await loop.create_datagram_endpoint(Recorder, sock=own)
        second, _ = await loop.create_datagram_endpoint(Recorder, ("127.0.0.1", 0), reuse_port=True)
        assert fake.messages == []
        first.close()
        second.close()
        await turns(3)
