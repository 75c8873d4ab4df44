"""The chaos clients believe nothing: each lie of a server is one to them, and a cut is told from an end."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from pathlib import Path

import pytest

from clusterserve.core.proxy import Header, parse
from tests.helpers.apps.chaos import checksum, content
from tests.helpers.certificates import Authority
from tests.helpers.chaos_wire import EndedError, Question, Wire, WrongError, introduction
from tests.helpers.raw import Address
from tests.helpers.waiting import DEADLINE

ASKED = Question("a", "plain", 40, 0, 0, b"sent")
BODY = content("a", 40)
HEAD = f"HTTP/1.1 200 OK\r\nx-id: a\r\nx-sum: {checksum(b'sent')}\r\n".encode()
LENGTH = HEAD + b"content-length: 40\r\n\r\n" + BODY
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n10\r\n" + BODY[:16] + b"\r\n18\r\n" + BODY[16:] + b"\r\n0\r\n\r\n"
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: 3\r\n\r\nno\n"


def met(
    data: bytes, *, end: bool = True, reset: bool = False, last_words: bool = False, origin: str | None = None
) -> int:
    """What a client makes of a server that says this."""

    async def run() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        client.setblocking(False)
        with client, server:
            server.sendall(data)
            if reset:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                server.close()
            elif end:
                server.shutdown(socket.SHUT_WR)
            wire = Wire(client, origin=origin)
            status = await asyncio.wait_for(wire.answer(ASKED, last_words=lambda: last_words), DEADLINE)
            assert wire.closed == (b"connection" in data and status == 200)
            return status

    return asyncio.run(run())


@pytest.mark.parametrize("data", [LENGTH, CHUNKED])
def test_the_truth(data: bytes) -> None:
    assert met(data, end=False) == 200


def test_a_bad_gateway_and_an_end() -> None:
    assert met(BAD_GATEWAY) == 502


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.replace(b"x-id: a", b"x-id: b"),
        LENGTH.replace(b"x-sum: 4", b"x-sum: 5"),
        LENGTH.replace(b"200 OK", b"500 No"),
        LENGTH.replace(b"length: 40", b"length: 39"),
        LENGTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        LENGTH[:-1] + b"\0",
        LENGTH.replace(BODY[:8], b"\0" * 8)[:-20],
        CHUNKED.replace(b"\r\n18\r\n", b"\r\n17\r\n"),
        CHUNKED.replace(b"\r\n18\r\n", b"\r\n19\r\n"),
        HEAD + b"transfer-encoding: chunked\r\n\r\n10\r\n" + BODY[:16] + b"\r\n0\r\n\r\n",
        BODY,
        b"x",
        BAD_GATEWAY + b"more",
        BAD_GATEWAY.replace(b"close", b"keep-alive"),
    ],
)
def test_a_lie(data: bytes) -> None:
    with pytest.raises(WrongError):
        met(data)


LAST = LENGTH.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


def test_last_words() -> None:
    assert met(LAST, last_words=True) == 200
    with pytest.raises(WrongError, match="more than"):
        met(LAST + b"x", last_words=True)


def test_somebody_elses_name() -> None:
    data = LENGTH.replace(b"\r\n\r\n", b"\r\nx-from: 10.0.0.1:2\r\n\r\n")
    assert met(data, origin="10.0.0.1:2") == 200
    with pytest.raises(WrongError, match=r"10\.0\.0\.1:2, who is 10\.0\.0\.1:3"):
        met(data, origin="10.0.0.1:3")


@pytest.mark.parametrize("version", [1, 2])
def test_an_introduction_is_one(version: int) -> None:
    chance = random.Random("several")
    said = next(each for each in iter(lambda: introduction(chance), None) if each.version == version)
    header = parse(b"".join(said.parts) + b"GET", f"v{version}")
    assert isinstance(header, Header)
    assert said.origin == f"{socket.inet_ntoa(header.client[-4:])}:{header.port}"


@pytest.mark.parametrize("said", [True, False])
def test_tls(tmp_path: Path, said: bool) -> None:
    """What the server says is heard; an end that it does not speak of is told from one."""
    authority = Authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    pair = authority.issue("server")
    context.load_cert_chain(pair.certificate, pair.key)

    async def run() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(LENGTH)
            await writer.drain()
            if said:
                writer.close()
            else:
                ends.append(writer.get_extra_info("socket"))
                ends[0].shutdown(socket.SHUT_WR)

        ends: list[socket.socket] = []
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            name = server.sockets[0].getsockname()
            address = Address(socket.AF_INET, name, "")
            wire = await asyncio.wait_for(Wire.connect(address, tls=authority.trusting()), DEADLINE)
            wire._origin = None
            wire.idle()
            await wire.send(ASKED.data)
            assert await asyncio.wait_for(wire.answer(ASKED), DEADLINE) == 200
            with pytest.raises(EndedError) as caught:
                await asyncio.wait_for(wire.answer(ASKED), DEADLINE)
            assert (caught.value.begun, caught.value.said) == (False, said)
            wire.close()

    asyncio.run(run())


@pytest.mark.parametrize("data", [LENGTH, CHUNKED])
@pytest.mark.parametrize("left", [1, 10, 30])
def test_a_cut(data: bytes, left: int) -> None:
    with pytest.raises(EndedError) as caught:
        met(data[:-left])
    assert caught.value.begun


def test_an_end_without_an_answer() -> None:
    with pytest.raises(EndedError) as caught:
        met(b"")
    assert not caught.value.begun


@pytest.mark.parametrize("data", [b"", LENGTH[:-1], BAD_GATEWAY])
def test_a_reset_is_never_allowed(data: bytes) -> None:
    with pytest.raises(WrongError, match="reset"):
        met(data, reset=True)


def test_an_idle_connection_is_silent() -> None:
    async def run() -> None:
        client, server = socket.socketpair()
        client.setblocking(False)
        wire = Wire(client)
        with client, server:
            wire.idle()
            server.send(b"x")
            with pytest.raises(WrongError, match="unasked"):
                wire.idle()
            server.close()
            with pytest.raises(EndedError):
                wire.idle()

    asyncio.run(run())
