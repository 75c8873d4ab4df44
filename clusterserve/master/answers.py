"""The few answers the master gives itself, and the lingering close that lets the client read them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Final

#: Longest wait for the client to finish sending after an answer of ours (seconds).
LINGER: Final = 2.0


def _response(status: str, text: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "content-type: text/plain; charset=utf-8", f"content-length: {len(text)}"]
    return "\r\n".join([*lines, *headers, "connection: close", "", text]).encode()


#: Read by a worker that died before it answered.
BAD_GATEWAY: Final = _response("502 Bad Gateway", "The worker serving this request died. Retry.\r\n")

#: Read by a worker that was killed because its loop stood still.
GATEWAY_TIMEOUT: Final = _response("504 Gateway Timeout", "The worker serving this request was hung.\r\n")

#: Nobody was free for it in time.
UNAVAILABLE: Final = _response("503 Service Unavailable", "All workers are busy. Retry.\r\n", "retry-after: 1")


def answer(loop: asyncio.AbstractEventLoop, fd: int, response: bytes, lingering: set[Callable[[], None]]) -> None:
    """Send `response`, which may be empty, and close once the client has stopped sending.

    Closing at once would reset what it has not read.

    Takes over `fd`.  As long as it waits for the client, what ends the waiting is in `lingering`.
    """
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    try:
        if response:
            sock.send(response)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        sock.close()
        return

    def discard() -> None:
        try:
            if sock.recv(65536):
                return
        except BlockingIOError:
            return
        except OSError:
            # Reset, timed out: nobody is left to wait for.
            pass
        end()

    def end() -> None:
        lingering.discard(end)
        timer.cancel()
        loop.remove_reader(sock)
        with contextlib.suppress(OSError):
            # What lies unread would make this a reset.
            sock.recv(65536)
        sock.close()

    loop.add_reader(sock, discard)
    timer = loop.call_later(LINGER, end)
    lingering.add(end)
