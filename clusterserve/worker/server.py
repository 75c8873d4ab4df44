"""What `loop.create_server` returns in a worker: the faux server, which has no socket and is handed its connections, or
under policy none servers of the event loop on the master's sockets.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ..binds import Bind
from ..core.messages import Listened
from ..errors import ClusterError

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

    `loop.create_server(sock=…)` recognises it and listens on `bind` through the master; `ssl` are TLS arguments to go
    with those it is called with.
    """

    def __init__(self, bind: Bind, **ssl: Any) -> None:
        family = socket.AF_UNIX if bind.kind == "unix" else socket.AF_INET6 if ":" in bind.host else socket.AF_INET
        super().__init__(family, bind.path if bind.kind == "unix" else (bind.host, bind.port))
        self.bind = bind
        self.ssl = ssl


class Entrance:
    """One listener of a faux server: what the receiver makes connections with.

    `protocol_factory` makes the protocol of each connection; `ssl` are the TLS arguments for
    `loop.connect_accepted_socket`.
    """

    def __init__(
        self,
        answer: Listened,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        ssl: dict[str, Any],
        client_speaks_first: bool,
        most: int | None = None,
    ) -> None:
        name: Any = tuple(answer.sockname) if isinstance(answer.sockname, list) else answer.sockname
        self.key = answer.listener
        self.protocol_factory: Callable[[], Any] = protocol_factory
        self.ssl = ssl
        self.client_speaks_first = client_speaks_first
        #: Connections of this worker above which a new one is closed, and how many have been.
        self.most = most
        self.drops = 0
        self.socket = FauxSocket(answer.family, name)
        #: The local address of its connections, in the shape of `peername`; None: ask the kernel for each.
        self.sockname: tuple[str, int] | str | None = None
        if isinstance(name, str):
            self.sockname = name
        elif name[0] not in _WILDCARDS:
            self.sockname = (name[0], name[1])


class _Server(asyncio.AbstractServer):
    """What both kinds of servers have in common.

    `on_start(server)` is called when it begins to serve, `on_close(server)` when it ends, once each.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_start: Callable[[Any], None], on_close: Callable[[Any], None]
    ) -> None:
        self._loop = loop
        self._on_start = on_start
        self._on_close = on_close
        self._serving = False
        self._open = True
        self._left = False
        self._closed: asyncio.Future[None] = loop.create_future()
        #: What connections are made with that come by another way (`handle_connection`).
        self.factory: Callable[[], asyncio.BaseProtocol] | None = None
        self.ssl: dict[str, Any] = {}
        self._coming: set[asyncio.Task[None]] = set()

    def handle_connection(self, sock: socket.socket) -> None:
        """Serve a connection that came by another way, in a message for one, as if it had been accepted here.

        Takes the socket over; any thread may call this.  Such a connection is this worker's own to its end: the master
        does not count it, nor lend it to another worker, and a program that is told to go does not wait for it.  Raises
        `ClusterError` if the server is closed; the socket is still yours then.
        """
        if not self._open or self.factory is None:
            raise ClusterError(f"{self!r} takes no connections")
        sock.setblocking(False)
        self._loop.call_soon_threadsafe(self._enter, self.factory, sock)

    def _enter(self, factory: Callable[[], Any], sock: socket.socket) -> None:
        task = self._loop.create_task(self._make(factory, sock))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    async def _make(self, factory: Callable[[], Any], sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(factory, sock, **self.ssl)
        except Exception as exc:  # noqa: BLE001 - the user's factory, or a client that fails its TLS handshake
            sock.close()
            self._loop.call_exception_handler({"message": "a connection could not be made", "exception": exc})

    def close(self) -> None:
        if self._open:
            self._open = self._serving = False
            self._leave()
            self._closed.set_result(None)

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._on_close(self)

    async def withdraw(self) -> None:
        """Take no more connections, though the program goes on: for it, the server still serves.

        Returns when the connections have ended that this object knows of.
        """
        self._leave()

    def is_serving(self) -> bool:
        return self._serving

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    async def start_serving(self) -> None:
        """Let connections come.  Those that came before, as the address is taken from the start, have waited."""
        if not self._open:
            raise RuntimeError(f"server {self!r} is closed")
        if not self._serving:
            self._serving = True
            self._on_start(self)

    async def serve_forever(self) -> None:
        """Serve until it is closed, or this is cancelled, which closes it."""
        await self.start_serving()
        try:
            await asyncio.shield(self._closed)
        finally:
            self.close()


class FauxServer(_Server):
    """An `asyncio.AbstractServer` fed by the connection channel, on one listener of the master's or several.

    `close` tells the master, which hands over no more; connections go on.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        entrances: Sequence[Entrance],
        on_start: Callable[[FauxServer], None],
        on_close: Callable[[FauxServer], None],
    ) -> None:
        super().__init__(loop, on_start, on_close)
        self.entrances = entrances

    @property
    def keys(self) -> list[int]:
        """Its listeners'."""
        return [entrance.key for entrance in self.entrances]

    @property
    def drops(self) -> int:
        """How many connections were closed because there were too many: see `listen_options`."""
        return sum(entrance.drops for entrance in self.entrances)

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets, for whoever asks for the address; empty once closed."""
        return tuple(entrance.socket for entrance in self.entrances) if self._open else ()

    async def wait_closed(self) -> None:
        """Returns when `close` was called: the connections are not this object's."""
        await asyncio.shield(self._closed)

    def __repr__(self) -> str:
        state = "serving" if self._serving else "not serving yet" if self._open else "closed"
        return f"<FauxServer listener {', '.join(map(str, self.keys))} {state}>"


class SharedServer(_Server):
    """Servers of the event loop on listening sockets that all workers share: policy none.

    `servers` are not serving yet, one for each of `keys`, the master's listeners.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        keys: Sequence[int],
        servers: Sequence[Any],
        on_start: Callable[[SharedServer], None],
        on_close: Callable[[SharedServer], None],
    ) -> None:
        super().__init__(loop, on_start, on_close)
        self.keys = keys
        self._servers = servers

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening sockets; empty once closed."""
        return tuple(sock for server in self._servers for sock in server.sockets)

    async def start_serving(self) -> None:
        if self._open and not self._serving:
            for server in self._servers:
                await server.start_serving()
        await super().start_serving()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        super().close()

    async def wait_closed(self) -> None:
        """As this version of Python has it: from 3.12 on when the last connection has ended too."""
        await asyncio.shield(self._closed)
        for server in self._servers:
            await server.wait_closed()

    async def withdraw(self) -> None:
        # Before it is closed: then some versions wait for the connections, and others for nothing.
        ends = [asyncio.ensure_future(server.wait_closed()) for server in self._servers]
        await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        await super().withdraw()
        await asyncio.gather(*ends)

    def close_clients(self) -> None:
        """Close every connection (Python 3.13)."""
        for server in self._servers:
            server.close_clients()

    def abort_clients(self) -> None:
        """Abort every connection (Python 3.13)."""
        for server in self._servers:
            server.abort_clients()

    def __repr__(self) -> str:
        return f"<SharedServer {self._servers}>"
