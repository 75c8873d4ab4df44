"""The faux server: what `loop.create_server` returns in a worker.  It has no socket; connections are handed in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from ..binds import Bind
from ..core.messages import Listened

#: Where the kernel, not the listener, knows the local address of a connection.
_WILDCARDS = frozenset({"0.0.0.0", "::"})


class FauxSocket:
    """Stands in for a listening socket that only the master has: addresses can be asked, nothing else done."""

    def __init__(self, family: int, sockname: Any) -> None:
        self.family = socket.AddressFamily(family)
        self.type = socket.SOCK_STREAM
        self.proto = 0 if family == socket.AF_UNIX else socket.IPPROTO_TCP
        self._sockname = sockname

    def getsockname(self) -> Any:
        return self._sockname

    def fileno(self) -> int:
        """-1: there is no descriptor in this process."""
        return -1

    def close(self) -> None:
        """Nothing to close."""

    def __repr__(self) -> str:
        return f"<FauxSocket of the master's listener on {self._sockname!r}>"


class BindSocket(FauxSocket):
    """What a server that takes ready-made sockets (`uvicorn.Server.startup(sockets=…)`) is given for an address.

    `loop.create_server(sock=…)` recognises it and listens on `bind` through the master.
    """

    def __init__(self, bind: Bind) -> None:
        family = socket.AF_UNIX if bind.kind == "unix" else socket.AF_INET6 if ":" in bind.host else socket.AF_INET
        super().__init__(family, bind.path if bind.kind == "unix" else (bind.host, bind.port))
        self.bind = bind


class FauxServer(asyncio.AbstractServer):
    """An `asyncio.AbstractServer` fed by the connection channel.

    `protocol_factory` makes the protocol of each connection; `ssl` are the TLS arguments for
    `loop.connect_accepted_socket`.  `close` tells the master, which hands over no more; connections go on.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        key: int,
        answer: Listened,
        protocol_factory: Callable[[], asyncio.Protocol],
        ssl: dict[str, Any],
        client_speaks_first: bool,
        on_close: Callable[[FauxServer], None],
    ) -> None:
        name: Any = tuple(answer.sockname) if isinstance(answer.sockname, list) else answer.sockname
        self.key = key
        self.protocol_factory = protocol_factory
        self.ssl = ssl
        self.client_speaks_first = client_speaks_first
        self._loop = loop
        self._socket: FauxSocket | None = FauxSocket(answer.family, name)
        self._on_close = on_close
        self._closed = loop.create_future()
        #: The local address of its connections, in the shape of `peername`; None: ask the kernel for each.
        self.sockname: tuple[str, int] | str | None = None
        if isinstance(name, str):
            self.sockname = name
        elif name[0] not in _WILDCARDS:
            self.sockname = (name[0], name[1])

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets, for whoever asks for the address; empty once closed."""
        return () if self._socket is None else (self._socket,)

    def close(self) -> None:
        if self._socket is not None:
            self._socket = None
            self._on_close(self)
            self._closed.set_result(None)

    async def wait_closed(self) -> None:
        """Returns when `close` was called: the connections are not this object's."""
        await asyncio.shield(self._closed)

    def is_serving(self) -> bool:
        return self._socket is not None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def start_serving(self) -> None:
        """It serves from the start: the master knows no listener that does not."""

    async def serve_forever(self) -> None:
        try:
            await self.wait_closed()
        finally:
            self.close()

    def __repr__(self) -> str:
        return f"<FauxServer listener {self.key} {'serving' if self.is_serving() else 'closed'}>"
