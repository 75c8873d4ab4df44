"""An HTTP/1 client that sends exactly the bytes it is given, when it is told to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import select
import socket
import ssl
import struct
import termios
import urllib.parse
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

from tests.helpers.waiting import DEADLINE

SockAddr = str | tuple[str, int]


@dataclass(frozen=True)
class Address:
    """Where a server listens, from a client's side."""

    family: socket.AddressFamily
    sockaddr: SockAddr
    url: str

    @property
    def port(self) -> int:
        assert not isinstance(self.sockaddr, str), f"{self.url} has no port"
        return self.sockaddr[1]

    @classmethod
    def parse(cls, text: str) -> Address:
        """`http://HOST:PORT`, `http://[V6]:PORT`, `unix:PATH` and `unix:@ABSTRACT`, as a start-up line gives them."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            return cls(socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path, "http://localhost")
        parts = urllib.parse.urlsplit(text)
        assert parts.hostname is not None, f"no host in {text!r}"
        assert parts.port is not None, f"no port in {text!r}"
        # "All interfaces" is where a server listens, and nowhere to connect to.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname, parts.hostname)
        if ":" in host:
            return cls(socket.AF_INET6, (host, parts.port), f"{parts.scheme}://[{host}]:{parts.port}")
        return cls(socket.AF_INET, (host, parts.port), f"{parts.scheme}://{host}:{parts.port}")

    def reached_by(self, host: str) -> Address:
        """The same port at another address of this machine."""
        return Address.parse(f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}")


@dataclass(frozen=True)
class Head:
    version: str
    status: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Response(Head):
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, target: str, *headers: str, body: bytes = b"", version: str = "1.1") -> bytes:
    """The bytes of one request.  A body gets a content-length unless a header says how else it is framed."""
    lines = [f"{method} {target} HTTP/{version}", "Host: test", *headers]
    framed = any(header.lower().startswith(("content-length:", "transfer-encoding:")) for header in headers)
    if body and not framed:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@final
class Client:
    """One connection."""

    def __init__(
        self,
        address: Address,
        *,
        source: str | None = None,
        receive_buffer: int | None = None,
        timeout: float = DEADLINE,
        tls: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.address = address
        self.socket = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(timeout)
            if receive_buffer is not None:
                # Before connect: the window that is offered to the server is settled by then.
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source is not None:
                self.socket.bind((source, 0))
            self.socket.connect(address.sockaddr)
            if address.family != socket.AF_UNIX:
                # Every send becomes a segment of its own, as the tests mean it.
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self.socket = tls.wrap_socket(self.socket, server_hostname="localhost", session=session)
        except BaseException:
            self.socket.close()
            raise
        self._input = self.socket.makefile("rb")

    @property
    def port(self) -> int:
        """This end's own port."""
        port = self.socket.getsockname()[1]
        assert isinstance(port, int)
        return port

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, method: str, target: str, *headers: str, body: bytes = b"", version: str = "1.1") -> Response:
        """Send one request and read its answer."""
        self.send(request(method, target, *headers, body=body, version=version))
        return self.response(method)

    def head(self) -> Head:
        """The next head, an interim one (100 Continue) included."""
        line = self._line()
        version, _, rest = line.partition(" ")
        assert version.startswith("HTTP/"), f"no status line: {line!r}"
        headers: dict[str, str] = {}
        while header := self._line():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        return Head(version.removeprefix("HTTP/"), int(rest[:3]), headers)

    def response(self, method: str = "GET") -> Response:
        """The next final response, read to its end."""
        head = self.head()
        while head.status < 200:
            head = self.head()
        return Response(head.version, head.status, head.headers, self._body(head, method))

    def _body(self, head: Head, method: str) -> bytes:
        if method == "HEAD" or head.status in (204, 304):
            return b""
        if head.headers.get("transfer-encoding") == "chunked":
            return b"".join(iter(self.chunk, b""))
        if "content-length" in head.headers:
            return self.read(int(head.headers["content-length"]))
        return self._input.read()

    def chunk(self) -> bytes:
        """The next chunk of a chunked body, b"" for the last."""
        size = int(self._line().partition(";")[0], 16)
        data = self.read(size)
        assert self._line() == ""
        return data

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        data = self._input.read(size)
        if len(data) != size:
            raise EOFError(f"the connection ended after {len(data)} of {size} bytes")
        return data

    def _line(self) -> str:
        line = self._input.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError(f"the connection ended in a line: {line!r}")
        return line[:-2].decode("latin-1")

    def rest(self) -> bytes:
        """Everything until the server's end of the connection."""
        return self._input.read()

    def waiting(self) -> int:
        """How many bytes the kernel holds for us."""
        return int(struct.unpack("i", fcntl.ioctl(self.socket, termios.FIONREAD, b"\0" * 4))[0])

    def has_something(self) -> bool:
        """Whether there is something to read, the connection's end included."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._input.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fetch(address: Address, target: str, *, source: str | None = None) -> Response:
    """One request on a connection of its own, which is over on both sides when this returns."""
    with Client(address, source=source) as client:
        response = client.ask("GET", target, "Connection: close")
        assert client.rest() == b""
        return response


def refuses(address: Address) -> bool:
    """Whether the kernel turns new connections to this address down."""
    with socket.socket(address.family, socket.SOCK_STREAM) as probe:
        probe.settimeout(DEADLINE)
        try:
            probe.connect(address.sockaddr)
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        return False
