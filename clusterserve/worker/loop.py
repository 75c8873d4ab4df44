"""Clustering at the level of the event loop, as Node has it at the level of `net`.

`cluster_loop(base)` makes a subclass of an event loop class (uvloop's, asyncio's, yours) whose `create_server` and
`create_unix_server` listen through the master.  Whatever runs on it is clustered without knowing: uvicorn, aiohttp,
`asyncio.start_server`.  A ready-made `sock=` and `reuse_port=True` go past the master.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

from ..binds import Bind
from .link import Link
from .server import BindSocket

_SSL_ARGUMENTS = ("ssl", "ssl_handshake_timeout", "ssl_shutdown_timeout")


class ClusterLoopMixin:
    """In front of an event loop class.  `link` is set on the class that `cluster_loop` makes."""

    link: Link

    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        host: str | Iterable[str] | None = None,
        port: int | None = None,
        *,
        sock: Any = None,
        backlog: int = 100,
        reuse_port: bool | None = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """As `loop.create_server`; the listening socket is the master's."""
        base: Any = super()
        if isinstance(sock, BindSocket):
            return await self._listen(protocol_factory, sock.bind, backlog, options, pinned=True)
        if sock is not None or reuse_port or not (host is None or isinstance(host, str)):
            # Several hosts at once stay the loop's: an asyncio server with sockets of its own.
            server: asyncio.AbstractServer = await base.create_server(
                protocol_factory, host, port, sock=sock, backlog=backlog, reuse_port=reuse_port, **options
            )
            return server
        bind = Bind("tcp", host=host or "0.0.0.0", port=port or 0)
        return await self._listen(protocol_factory, bind, backlog, options)

    async def create_unix_server(
        self,
        protocol_factory: Callable[[], Any],
        path: str | os.PathLike[str] | None = None,
        *,
        sock: Any = None,
        backlog: int = 100,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """As `loop.create_unix_server`; the socket and its file are the master's."""
        if sock is not None or path is None:
            base: Any = super()
            server: asyncio.AbstractServer = await base.create_unix_server(
                protocol_factory, path, sock=sock, backlog=backlog, **options
            )
            return server
        return await self._listen(protocol_factory, Bind("unix", path=_path(os.fsdecode(path))), backlog, options)

    async def _listen(
        self,
        protocol_factory: Callable[[], Any],
        bind: Bind,
        backlog: int,
        options: dict[str, Any],
        pinned: bool = False,
    ) -> asyncio.AbstractServer:
        ssl = {name: options[name] for name in _SSL_ARGUMENTS if options.get(name) is not None}
        # What listens on a `--bind` is uvicorn.  A TLS client speaks first too, but to the loop's own TLS transport.
        client_speaks_first = pinned and not ssl
        answer, descriptors = await self.link.listen(
            str(bind), backlog=backlog, client_speaks_first=client_speaks_first, pinned=pinned
        )
        if not answer.shared:
            return self.link.serve(answer, protocol_factory, ssl, client_speaks_first)
        if not descriptors:
            raise OSError(errno.EMFILE, f"the listener on {bind} did not arrive: too many open files in this worker")
        base: Any = super()
        # Also for unix sockets: `create_unix_server` would take the file for its own and remove it.
        server: asyncio.AbstractServer = await base.create_server(
            protocol_factory, sock=socket.socket(fileno=descriptors[0]), backlog=backlog, **ssl
        )
        self.link.listening(answer.listener)
        return server


def _path(path: str) -> str:
    """As the master knows it: its working directory is not ours, and an abstract name begins with an `@`."""
    if path.startswith(("@", "\0")):
        return "@" + path[1:]
    return os.path.abspath(path)


def cluster_loop(base: type[Any], link: Link) -> type[asyncio.AbstractEventLoop]:
    """A subclass of the event loop class `base` that listens through `link`'s master."""
    return type(f"Cluster{base.__name__}", (ClusterLoopMixin, base), {"link": link})
