"""A client's end of one connection that notices every byte and how the connection ends; and what is asked over it."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from tests.helpers.apps.chaos import checksum, content
from tests.helpers.chaos_tls import Layer
from tests.helpers.raw import Address, request

READ_BYTES = 1 << 16


class WrongError(Exception):
    """The server did what is never allowed."""


class ResetError(WrongError):
    """The connection was reset: by a server that lets go of what it has not read, or by its kernel."""


class EndedError(Exception):
    """The server closed its side in order.  `begun`: within a response, of which all that came was right.

    `said`: it has said so, if the connection is one of TLS, where else nobody knows who ended it.
    """

    def __init__(self, begun: bool, said: bool = True) -> None:
        without = "" if said else ", without a word of TLS"
        super().__init__(f"the connection ended {'within' if begun else 'before'} a response{without}")
        self.begun = begun
        self.said = said


@dataclass(frozen=True)
class Question:
    """One request, and what its answer has to be."""

    ident: str
    kind: str
    size: int
    milliseconds: int
    chunk: int
    body: bytes = field(repr=False)

    @property
    def data(self) -> bytes:
        target = f"/{self.kind}?id={self.ident}&n={self.size}&ms={self.milliseconds}"
        if self.chunk:
            target += f"&chunk={self.chunk}"
        return request("POST" if self.body else "GET", target, body=self.body)

    @property
    def sum(self) -> str:
        return checksum(b"" if self.kind == "early" else self.body)


def question(chance: random.Random, ident: str) -> Question:
    """Mostly small, sometimes more than any buffer on the way holds."""
    kind = chance.choices(["plain", "block", "await", "early"], [12, 2, 4, 1])[0]
    size = _size(chance)
    body = chance.randbytes(_size(chance)) if kind == "early" or chance.random() < 0.4 else b""
    chunk = max(size // chance.randint(2, 6), 1) if chance.random() < 0.3 else 0
    return Question(ident, kind, size, chance.choice([0, 1, 5, 20, 60]), chunk, body)


def pieces(chance: random.Random, data: bytes, count: int) -> list[bytes]:
    """`data`, cut at `count - 1` places anywhere."""
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(count - 1))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end]


def _size(chance: random.Random) -> int:
    return chance.randrange(chance.choices([1, 200, 3_000, 60_000, 600_000], [5, 30, 30, 12, 1])[0])


@dataclass(frozen=True)
class Introduction:
    """What a proxy says of its client first, and whom the application is to see then."""

    version: int
    parts: list[bytes]
    origin: str


def introduction(chance: random.Random) -> Introduction:
    """A PROXY header of either version, of a client that no other connection has, at once or in pieces."""
    client, port = (
        f"10.{chance.randrange(256)}.{chance.randrange(256)}.{chance.randrange(256)}",
        chance.randrange(65536),
    )
    version = chance.choice([1, 2])
    if version == 1:
        data = f"PROXY TCP4 {client} 192.0.2.1 {port} 443\r\n".encode()
    else:
        addresses = socket.inet_aton(client) + socket.inet_aton("192.0.2.1") + port.to_bytes(2, "big") + b"\x01\xbb"
        data = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + addresses
    return Introduction(version, pieces(chance, data, chance.choice([1, 1, 2, 4])), f"{client}:{port}")


@final
class Wire:
    """One connection.  Each method raises WrongError for what is never allowed, EndedError for an end in order.

    `origin`: whom the application is to see; None if that does not matter.  `tls`: it speaks TLS.
    """

    def __init__(self, sock: socket.socket, *, origin: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.socket = sock
        #: The server has answered for the last time, and said so.
        self.closed = False
        self._origin = origin
        self._tls = None if tls is None else Layer(tls)
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()

    @classmethod
    async def connect(
        cls, address: Address, *, tls: ssl.SSLContext | None = None, proxied: Introduction | None = None
    ) -> Wire:
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            if address.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, address.sockaddr)
            own = None if address.family == socket.AF_UNIX else "{}:{}".format(*sock.getsockname())
            wire = cls(sock, origin=own if proxied is None else proxied.origin, tls=tls)
            for part in proxied.parts if proxied is not None else ():
                await wire._send(part)
                await asyncio.sleep(0.001)
            if wire._tls is not None:
                await wire._shake_hands(wire._tls)
        except WrongError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            raise WrongError(f"connect: {error}") from None
        except BaseException:
            sock.close()
            raise
        return wire

    async def _shake_hands(self, tls: Layer) -> None:
        data = b""
        while not tls.established:
            self._data += tls.opened(data)
            await self._send(tls.to_be_sent())
            if not tls.established:
                data = await self._received(begun=False)

    @property
    def name(self) -> str:
        name = self.socket.getsockname()
        return f"port {name[1]}" if isinstance(name, tuple) else "unix"

    async def send(self, data: bytes) -> None:
        await self._send(data if self._tls is None else self._tls.sealed(data))

    async def _send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self.socket, data)
        except OSError as error:
            raise ResetError(f"reset while the client wrote: {error}") from None

    def idle(self) -> None:
        """Nothing has come, the end of the connection included."""
        if self._data:
            raise WrongError(f"spoke unasked: {bytes(self._data[:80])!r}")
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise ResetError(f"reset while idle: {error}") from None
        if not data:
            raise EndedError(begun=False, said=self._tls is None)
        if self._tls is None:
            raise WrongError(f"spoke unasked: {data[:80]!r}")
        # Tickets and their like are nothing to the client.
        if plain := self._tls.opened(data):
            raise WrongError(f"spoke unasked: {plain[:80]!r}")
        if self._tls.ended:
            raise EndedError(begun=False)

    async def answer(self, asked: Question, *, last_words: Callable[[], bool] = lambda: False) -> int:
        """Read the answer to `asked` to its last byte; its status, 200 or what the master answers for a worker.

        `last_words()`: whether it may say that it is the last one; then it is, and `closed` is set.
        """
        status, headers = await self._head()
        if status in (502, 503, 504):
            length = headers.get("content-length", "")
            if not length.isdigit() or headers.get("connection") != "close":
                raise WrongError(f"a {status} with {headers}")
            await self._exactly(int(length))
            await self.end()
            return status
        if status != 200:
            raise WrongError(f"status {status}: {headers}")
        if headers.get("x-id") != asked.ident:
            raise WrongError(f"somebody else's response: {headers.get('x-id')}")
        if headers.get("x-sum") != asked.sum:
            raise WrongError(f"the application had {headers.get('x-sum')}, the client had sent {asked.sum}")
        if self._origin is not None and headers.get("x-from") not in (self._origin, self._origin.partition(":")[0]):
            raise WrongError(f"the application saw the client {headers.get('x-from')}, who is {self._origin}")
        if "connection" in headers and not (last_words() and headers["connection"] == "close"):
            raise WrongError(f"a kept connection is told: {headers['connection']}")
        expected = memoryview(content(asked.ident, asked.size))
        if headers.get("transfer-encoding") == "chunked":
            await self._chunks(expected)
        elif headers.get("content-length") == str(asked.size):
            await self._matches(expected)
        else:
            raise WrongError(f"{asked.size} bytes announced by {headers}")
        if "connection" in headers:
            await self.end()
            self.closed = True
        return status

    async def end(self) -> None:
        """Nothing more, and an end in order."""
        try:
            while not self._data:
                await self._fill(begun=False)
            raise WrongError(f"more than the response: {bytes(self._data[:80])!r}")
        except EndedError as error:
            if not error.said:
                raise

    async def _head(self) -> tuple[int, dict[str, str]]:
        while (end := self._data.find(b"\r\n\r\n")) < 0:
            if self._data and not b"HTTP/1.1 "[: len(self._data)] == self._data[:9]:
                raise WrongError(f"no response: {bytes(self._data[:80])!r}")
            await self._fill(begun=bool(self._data))
        first, *lines = bytes(self._data[:end]).decode("latin-1").split("\r\n")
        del self._data[: end + 4]
        version, _, rest = first.partition(" ")
        if version != "HTTP/1.1" or not rest[:3].isdigit():
            raise WrongError(f"no response: {first[:80]!r}")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return int(rest[:3]), headers

    async def _matches(self, expected: memoryview) -> None:
        """The next bytes are these; each as it comes, so that also a part of them is known to be right."""
        at = 0
        while at < len(expected):
            if not self._data:
                await self._fill(begun=True)
            size = min(len(self._data), len(expected) - at)
            if self._data[:size] != expected[at : at + size]:
                raise WrongError(f"other bytes than the response's, {at} after its head")
            del self._data[:size]
            at += size

    async def _chunks(self, expected: memoryview) -> None:
        at = 0
        while True:
            line = await self._line()
            try:
                size = int(line, 16)
            except ValueError:
                raise WrongError(f"no chunk: {line[:80]!r}") from None
            if at + size > len(expected):
                raise WrongError("more than the response")
            await self._matches(expected[at : at + size])
            at += size
            if await self._line() != b"":
                raise WrongError("a chunk that does not end")
            if not size:
                break
        if at != len(expected):
            raise WrongError(f"{at} of {len(expected)} bytes, as if they were all")

    async def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n")) < 0:
            await self._fill(begun=True)
        line = bytes(self._data[:end])
        del self._data[: end + 2]
        return line

    async def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            await self._fill(begun=True)
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    async def _fill(self, *, begun: bool) -> None:
        if self._tls is None:
            self._data += await self._received(begun=begun)
            return
        more = b"" if self._tls.ended else self._tls.opened(await self._received(begun=begun))
        if self._tls.ended and not more:
            raise EndedError(begun)
        self._data += more

    async def _received(self, *, begun: bool) -> bytes:
        try:
            data = await self._loop.sock_recv(self.socket, READ_BYTES)
        except OSError as error:
            raise ResetError(f"reset {'within' if begun else 'before'} a response: {error}") from None
        if not data:
            raise EndedError(begun, said=self._tls is None)
        return data

    def close(self) -> None:
        self.socket.close()
