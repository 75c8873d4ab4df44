"""`listen_options`: what asyncio's own calls cannot say about a listener.  See docs/cluster-api.md."""

from __future__ import annotations

import base64
import contextvars
import json
from types import TracebackType
from typing import Any, Final

#: The longest data that a worker may send along, in bytes as it travels.
MAX_DATA: Final = 256 * 1024

_current: contextvars.ContextVar[listen_options | None] = contextvars.ContextVar("clusterserve.listen", default=None)


class listen_options:  # noqa: N801 - it reads as a statement: `with listen_options(...) as options`
    """Options of the servers and UDP endpoints that a worker opens in this block.

        with clusterserve.listen_options(data=os.urandom(48)) as options:
            server = await asyncio.start_server(talk, "0.0.0.0", 8443)
        keys = options.data  # the same in every worker

    `data` (what JSON can say, or bytes; up to 256 KiB) goes with the request to listen: of all workers that listen
    there, the first one's counts, and each finds that in `data` when the call returns, before a connection comes.
    `v6only` says whether a host "::" means IPv6 alone; None leaves it to asyncio: yes for TCP, no for UDP.

    `max_connections` is how many connections this *worker* holds at a time (the least of its servers' limits; 0: none
    at all): more go to other workers, or wait in the master until somebody has room.  With `drop=True` they are closed
    instead, and counted in the server's `drops`.  Under policy none, where nobody hands connections out, it says
    nothing.  All of this does nothing where servers do not go through a master.
    """

    def __init__(
        self, *, data: Any = None, v6only: bool | None = None, max_connections: int | None = None, drop: bool = False
    ) -> None:
        if max_connections is not None and max_connections < 0:
            raise ValueError(f"max_connections is at least 0, not {max_connections}")
        self.v6only = v6only
        self.max_connections = max_connections
        self.drop = drop
        #: What all workers of this listener have; of the last one if several are opened in the block.
        self.data = data
        #: The data as it travels.
        self.text = "" if data is None else pack_data(data)
        self._token: contextvars.Token[listen_options | None] | None = None

    def __enter__(self) -> listen_options:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)


def given() -> listen_options:
    """Those of the innermost block."""
    return _current.get() or listen_options()


def agreed(text: str) -> None:
    """The master has answered: this data counts."""
    options = _current.get()
    if options is not None and text:
        options.data = unpack_data(text)


def pack_data(data: Any) -> str:
    """As it travels.  Raises TypeError for what JSON cannot say, ValueError for what is too long."""
    text = "b" + base64.b64encode(data).decode() if isinstance(data, bytes | bytearray) else "j" + json.dumps(data)
    if len(text) > MAX_DATA:
        raise ValueError(f"the data of a listener is limited to {MAX_DATA} bytes, and this has {len(text)}")
    return text


def unpack_data(text: str) -> Any:
    """What `pack_data` has packed."""
    return base64.b64decode(text[1:]) if text[0] == "b" else json.loads(text[1:])
