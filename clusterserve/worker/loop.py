"""Clustering at the level of the event loop, as Node has it at the level of `net` and `dgram`.

Whatever calls `create_server`, `create_unix_server` or `create_datagram_endpoint` here listens through the master
without knowing: uvicorn, aiohttp, `asyncio.start_server`.  A ready-made `sock=` and `reuse_port=True` go past the
master, and so does a UDP endpoint that only sends.

The functions take the loop, the link, and `base`, whose attributes are the loop's own methods.  `cluster_loop(class)`
makes a subclass of a loop class (uvloop's, asyncio's, yours) of them; whoever cannot choose the loop class patches it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..binds import Bind
from ..core.messages import Listen
from ..listen_options import agreed, given
from .datagram import SharedDatagramTransport, SharedSocket
from .link import Link
from .server import BindSocket
from .serving import check_ssl, descriptor_of, masters_path, port_number, requests_for, resolve, serve
from .transport import HandedTransport

#: The host that is every address of both families, on one socket; no name that a resolver knows.
ANY: Final = "*"

#: What stands in front of the number of a descriptor of the master's.
_MASTERS: Final = "fd://"


async def create_server(
    loop: asyncio.AbstractEventLoop,
    link: Link,
    base: Any,
    protocol_factory: Callable[[], Any],
    host: str | Iterable[str] | None = None,
    port: Any = None,
    **options: Any,
) -> asyncio.AbstractServer:
    """As `loop.create_server`; the listening sockets are the master's.

    Besides what asyncio knows, a host may be "*" (every address of both families, one socket) or "fd://N" (the
    listening socket that is descriptor N of the *master*), and with no host nor port it is "*" and a free port.  The
    address is taken at once also with `start_serving=False`: who connects before `start_serving` waits.
    """
    sock = options.get("sock")
    if isinstance(sock, BindSocket):
        options = {**sock.ssl, **options}
        return await serve(loop, link, base, protocol_factory, [Listen(0, str(sock.bind), 0, False, True)], options)
    if sock is not None or options.get("reuse_port"):
        server: asyncio.AbstractServer = await base.create_server(protocol_factory, host, port, **options)
        return server
    check_ssl(options)
    binds: list[tuple[str, bool]] = []
    if host is None and port is None:
        host = ANY
    flags = options.get("flags", socket.AI_PASSIVE)
    for each in [host] if host is None or isinstance(host, str) else host:
        if each is not None and each.startswith(_MASTERS):
            if port:
                raise ValueError(f"the descriptor {each} has a port already")
            binds.append((str(Bind.parse(each)), False))
        elif each == ANY:
            binds.append((f"*:{port_number(port)}", False))
        else:
            found = await resolve(loop, each or None, port, options.get("family", 0), flags, socket.SOCK_STREAM)
            binds += [(str(Bind("tcp", host=address[0], port=address[1])), ":" in address[0]) for address in found]
    return await serve(loop, link, base, protocol_factory, requests_for(binds, options), options)


async def create_unix_server(
    loop: asyncio.AbstractEventLoop,
    link: Link,
    base: Any,
    protocol_factory: Callable[[], Any],
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> asyncio.AbstractServer:
    """As `loop.create_unix_server`; the socket and its file are the master's.

    A relative path is found from this process's directory.  A file that nobody listens on is replaced.
    """
    if options.get("sock") is not None or path is None:
        server: asyncio.AbstractServer = await base.create_unix_server(protocol_factory, path, **options)
        return server
    check_ssl(options)
    bind = str(Bind("unix", path=masters_path(os.fsdecode(path))))
    return await serve(loop, link, base, protocol_factory, requests_for([(bind, False)], options), options)


async def create_datagram_endpoint(
    loop: asyncio.AbstractEventLoop,
    link: Link,
    base: Any,
    protocol_factory: Callable[[], Any],
    local_addr: Any = None,
    remote_addr: Any = None,
    **options: Any,
) -> tuple[asyncio.DatagramTransport, Any]:
    """As `loop.create_datagram_endpoint`; what listens on `local_addr` shares the master's socket, under every policy.

    Each worker takes one datagram when it wakes up.  A host may also be "*", or "fd://N" (with any port): the UDP
    socket that is descriptor N of the *master*.
    """
    if (
        not isinstance(local_addr, tuple)
        or remote_addr is not None
        or options.get("sock") is not None
        or options.get("reuse_port")
        or options.get("proto", 0) not in (0, socket.IPPROTO_UDP)
    ):
        endpoint: tuple[asyncio.DatagramTransport, Any] = await base.create_datagram_endpoint(
            protocol_factory, local_addr, remote_addr, **options
        )
        return endpoint
    if len(local_addr) != 2:
        raise TypeError("2-tuple is expected")
    host, port = local_addr
    if host == ANY:
        binds = [f"*:{port_number(port)}"]
    elif isinstance(host, str) and host.startswith(_MASTERS):
        binds = [str(Bind.parse(host))]
    else:
        found = await resolve(
            loop, host or None, port, options.get("family", 0), options.get("flags", 0), socket.SOCK_DGRAM
        )
        binds = [str(Bind("tcp", host=address[0], port=address[1])) for address in found]
    said = given()
    first: OSError | None = None
    for bind in binds:
        request = Listen(0, bind, 0, False, False, datagram=True, v6only=bool(said.v6only), data=said.text)
        try:
            answer, descriptors = await link.listen(request)
            break
        except OSError as exc:
            first = first or exc
    else:
        raise first or OSError("getaddrinfo() returned empty list")
    sock = SharedSocket(fileno=descriptor_of(link, answer, descriptors))
    try:
        if options.get("allow_broadcast"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        agreed(answer.data)
        protocol = protocol_factory()
    except BaseException:
        sock.close()
        link.leave(answer.listener)
        raise

    def closed() -> None:
        link.servers.discard(transport)
        link.leave(answer.listener)

    transport = SharedDatagramTransport(loop, sock, protocol, closed)
    link.servers.add(transport)
    link.listening(answer.listener)
    try:
        # The protocol has its connection when this returns.
        await asyncio.sleep(0)
    except BaseException:
        transport.close()
        raise
    return transport, protocol


async def start_tls(
    loop: asyncio.AbstractEventLoop, base: Any, transport: Any, protocol: Any, sslcontext: Any, **options: Any
) -> Any:
    """As `loop.start_tls`, also for a connection that was handed over."""
    if isinstance(transport, HandedTransport):
        # asyncio's way to do it goes through the transport's own methods, on any loop; uvloop's is for its own alone.
        method: Any = asyncio.BaseEventLoop.start_tls
        return await method(loop, transport, protocol, sslcontext, **options)
    return await base.start_tls(transport, protocol, sslcontext, **options)


async def sendfile(
    base: Any, transport: Any, file: Any, offset: int = 0, count: int | None = None, **options: Any
) -> Any:
    """As `loop.sendfile`, also for a connection that was handed over."""
    if isinstance(transport, HandedTransport):
        transport = transport.loops_own
    return await base.sendfile(transport, file, offset, count, **options)


class ClusterLoopMixin:
    """In front of an event loop class.  `link` is set on the class that `cluster_loop` makes."""

    link: Link

    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        host: str | Iterable[str] | None = None,
        port: Any = None,
        **options: Any,
    ) -> asyncio.AbstractServer:
        """As `loop.create_server`; the listening socket is the master's."""
        return await create_server(self._loop, self.link, super(), protocol_factory, host, port, **options)

    async def create_unix_server(
        self, protocol_factory: Callable[[], Any], path: str | os.PathLike[str] | None = None, **options: Any
    ) -> asyncio.AbstractServer:
        """As `loop.create_unix_server`; the socket and its file are the master's."""
        return await create_unix_server(self._loop, self.link, super(), protocol_factory, path, **options)

    async def create_datagram_endpoint(
        self, protocol_factory: Callable[[], Any], local_addr: Any = None, remote_addr: Any = None, **options: Any
    ) -> tuple[asyncio.DatagramTransport, Any]:
        """As `loop.create_datagram_endpoint`; the socket is the master's if it listens."""
        return await create_datagram_endpoint(
            self._loop, self.link, super(), protocol_factory, local_addr, remote_addr, **options
        )

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        """As `loop.start_tls`."""
        return await start_tls(self._loop, super(), transport, protocol, sslcontext, **options)

    async def sendfile(
        self, transport: Any, file: Any, offset: int = 0, count: int | None = None, **options: Any
    ) -> Any:
        """As `loop.sendfile`."""
        return await sendfile(super(), transport, file, offset, count, **options)

    @property
    def _loop(self) -> Any:
        # Where the methods of a loop's class are patched, what is before us stands for the loop, and knows it.
        return getattr(self, "_adapted", self)


def cluster_loop(base: type[Any], link: Link) -> type[asyncio.AbstractEventLoop]:
    """A subclass of the event loop class `base` that listens through `link`'s master."""
    return type(f"Cluster{base.__name__}", (ClusterLoopMixin, base), {"link": link})
