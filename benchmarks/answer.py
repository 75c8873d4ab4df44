"""One HTTP/1 response, read as it comes: what it says, whether it is whole, and what the connection does after it."""

from __future__ import annotations


class Answer:
    """Feed it what `recv` returned, the empty end included; for one response to a request that was not HEAD."""

    def __init__(self) -> None:
        self.status = 0
        #: All of it is here.
        self.complete = False
        #: The server has closed its side.
        self.ended = False
        #: The server says that it will close.
        self.closes = False
        self._data = bytearray()
        self._body_at = 0
        self._length: int | None = None
        self._chunked = False

    @property
    def begun(self) -> bool:
        return bool(self._data)

    @property
    def body(self) -> bytes:
        return bytes(self._data[self._body_at :]) if self._body_at else b""

    def feed(self, data: bytes) -> None:
        self.ended = self.ended or not data
        self._data += data
        if not self._body_at and (end := self._data.find(b"\r\n\r\n")) >= 0:
            self._body_at = end + 4
            self._read_head(bytes(self._data[:end]))
        if not self._body_at:
            return
        received = len(self._data) - self._body_at
        if self._chunked:
            # Our applications' chunks hold no such piece.
            self.complete = self._data.endswith(b"\r\n0\r\n\r\n") or self._data[self._body_at :] == b"0\r\n\r\n"
        elif self._length is None:
            self.complete = self.ended
        else:
            self.complete = received >= self._length

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        self.status = int(first.split(b" ", 2)[1])
        # HTTP/1.0, which proxies answer in, closes unless it says otherwise.
        self.closes = first.startswith(b"HTTP/1.0")
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip()
            if name == b"content-length":
                self._length = int(value)
            elif name == b"transfer-encoding":
                self._chunked = value.lower() == b"chunked"
            elif name == b"connection":
                self.closes = value.lower() == b"close"
