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
    `v6only` says whether a host "::" means IPv6 alone; None leaves it to asyncio: yes for TCP, no for UDP.  Nothing
    happens where servers do not go through a master.
    """

    def __init__(self, *, data: Any = None, v6only: bool | None = None) -> None:
        self.v6only = v6only
        #: What all workers of this listener have; of the last one if several are opened in the block.
        self.data = data
        self._text = "" if data is None else pack_data(data)
        self._token: contextvars.Token[listen_options | None] | None = None

    def __enter__(self) -> listen_options:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _current.reset(self._token)


def given() -> tuple[str, bool | None]:
    """The data, as it travels, and `v6only` of the innermost block."""
    options = _current.get()
    return ("", None) if options is None else (options._text, options.v6only)


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
