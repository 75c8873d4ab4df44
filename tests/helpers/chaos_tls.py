"""TLS as a client speaks it, without a socket: what comes is put in, what is to be sent is taken out."""

from __future__ import annotations

import ssl
from typing import final

_READ_BYTES = 1 << 16


@final
class Layer:
    """One connection's TLS.  Every method raises ssl.SSLError for what no server may send."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.established = False
        #: The server has said that nothing more comes.
        self.ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def opened(self, data: bytes) -> bytes:
        """What these bytes from the server say, as far as they are whole."""
        self._incoming.write(data)
        pieces = []
        try:
            if not self.established:
                self._object.do_handshake()
                self.established = True
            while piece := self._object.read(_READ_BYTES):
                pieces.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        return b"".join(pieces)

    def sealed(self, data: bytes) -> bytes:
        """These bytes as the server is to get them."""
        self._object.write(data)
        return self.to_be_sent()

    def to_be_sent(self) -> bytes:
        """What has been left to send: of the handshake."""
        return self._outgoing.read()
