"""The requests for what asyncio's arguments mean, and a server on what the master has answered."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from ..core.messages import Listen, Listened
from ..listen_options import agreed, given
from .link import Link
from .server import Entrance, FauxServer, SharedServer

_SSL_ARGUMENTS: Final = ("ssl", "ssl_handshake_timeout", "ssl_shutdown_timeout")


async def serve(
    loop: asyncio.AbstractEventLoop,
    link: Link,
    base: Any,
    protocol_factory: Callable[[], Any],
    requests: list[Listen],
    options: dict[str, Any],
) -> asyncio.AbstractServer:
    """A server on all these listeners, or on none: then what was had is given back, and the first error raised."""
    ssl = {name: options[name] for name in _SSL_ARGUMENTS if options.get(name) is not None}
    backlog = options.get("backlog", 100)
    had: list[tuple[Listened, list[int]]] = []
    missing: OSError | None = None
    for request in requests:
        # What listens on a `--bind` is uvicorn, whose clients have something to ask.
        first = request.pinned
        asked = replace(request, backlog=backlog, client_speaks_first=first, tls=bool(ssl))
        try:
            had.append(await link.listen(asked))
        except OSError as exc:
            if exc.errno == errno.EAFNOSUPPORT and len(requests) > 1:
                # As asyncio: this machine has only one of the families.
                missing = exc
                continue
            _give_back(link, had)
            raise
        except BaseException:
            _give_back(link, had)
            raise
    if not had:
        raise missing or OSError(errno.EADDRNOTAVAIL, "there is no such address")
    agreed(had[0][0].data)

    def closed(server: Any) -> None:
        link.servers.discard(server)
        for key in server.keys:
            link.leave(key)

    server: Any
    if had[0][0].shared:
        server = await _shared_server(loop, link, base, protocol_factory, had, ssl, closed)
    else:
        said = given()
        most = said.max_connections if said.drop else None
        entrances = [Entrance(answer, protocol_factory, ssl, first, most) for answer, _ in had]
        server = FauxServer(loop, entrances, link.serve, closed)
    server.factory, server.ssl = protocol_factory, ssl
    link.servers.add(server)
    if options.get("start_serving", True):
        try:
            await server.start_serving()
        except BaseException:
            # Whoever asked has given up.
            server.close()
            raise
    served: asyncio.AbstractServer = server
    return served


async def _shared_server(
    loop: asyncio.AbstractEventLoop,
    link: Link,
    base: Any,
    protocol_factory: Callable[[], Any],
    had: list[tuple[Listened, list[int]]],
    ssl: dict[str, Any],
    closed: Callable[[Any], None],
) -> SharedServer:
    sockets: list[socket.socket] = []
    servers: list[Any] = []
    try:
        for answer, descriptors in had:
            sock = socket.socket(fileno=_descriptor(answer, descriptors))
            sockets.append(sock)
            # Also for unix sockets: `create_unix_server` would take the file for its own and remove it.
            servers.append(
                await base.create_server(
                    protocol_factory, sock=sock, backlog=max(answer.backlog, 1), start_serving=False, **ssl
                )
            )
    except BaseException:
        for server in servers:
            server.close()
        for sock in sockets:
            sock.close()
        _give_back(link, had[len(sockets) :])
        for answer, _ in had[: len(sockets)]:
            link.leave(answer.listener)
        raise

    def started(server: SharedServer) -> None:
        for key in server.keys:
            link.listening(key)

    return SharedServer(loop, [answer.listener for answer, _ in had], servers, started, closed)


def _descriptor(answer: Listened, descriptors: list[int]) -> int:
    if not descriptors:
        raise OSError(
            errno.EMFILE, f"the listener on {answer.sockname} did not arrive: too many open files in this worker"
        )
    return descriptors[0]


def descriptor_of(link: Link, answer: Listened, descriptors: list[int]) -> int:
    """The listening socket that came with the answer; without it, the listener is let go."""
    try:
        return _descriptor(answer, descriptors)
    except OSError:
        link.leave(answer.listener)
        raise


def _give_back(link: Link, had: list[tuple[Listened, list[int]]]) -> None:
    for answer, descriptors in had:
        for fd in descriptors:
            os.close(fd)
        link.leave(answer.listener)


def requests_for(binds: list[tuple[str, bool]], options: dict[str, Any]) -> list[Listen]:
    """One request for each address, and whether it is an IPv6 one, that is not given twice."""
    said = given()
    limit = -1 if said.max_connections is None or said.drop else said.max_connections
    reuse, keep_alive = options.get("reuse_address"), bool(options.get("keep_alive"))
    return [
        Listen(
            0,
            bind,
            0,
            False,
            False,
            # What asyncio does for a host of this family, always.
            v6only=v6 if said.v6only is None else v6 and said.v6only,
            reuse_address=True if reuse is None else bool(reuse),
            keep_alive=keep_alive,
            max_connections=limit,
            data=said.text,
        )
        for bind, v6 in dict.fromkeys(binds)
    ]


async def resolve(
    loop: asyncio.AbstractEventLoop, host: str | None, port: Any, family: int, flags: int, kind: int
) -> list[tuple[Any, ...]]:
    """The addresses of `host`.  Here and not in the master, whose loop waits for nobody."""
    if isinstance(host, str) and isinstance(port, int | None):
        for each in (socket.AF_INET, socket.AF_INET6):
            if family in (0, each):
                try:
                    # The common case needs no thread.
                    return [(socket.inet_ntop(each, socket.inet_pton(each, host)), port_number(port))]
                except (OSError, UnicodeError, ValueError):
                    continue
    found = await loop.getaddrinfo(host, port, family=family, type=kind, flags=flags)
    if not found:
        raise OSError(f"getaddrinfo({host!r}) returned empty list")
    return list(dict.fromkeys(address for _, _, _, _, address in found))


def port_number(port: Any) -> int:
    if port is None:
        return 0
    number = int(port)
    if not 0 <= number <= 65535:
        raise OverflowError(f"a port is a whole number from 0 to 65535, not {port}")
    return number


def masters_path(path: str) -> str:
    """As the master knows it: its working directory is not ours, and an abstract name begins with an `@`."""
    if path.startswith(("@", "\0")):
        return "@" + path[1:]
    return os.path.abspath(path)


def check_ssl(options: dict[str, Any]) -> None:
    """As asyncio does."""
    if isinstance(options.get("ssl"), bool):
        raise TypeError("ssl argument must be an SSLContext or None")
    for name in _SSL_ARGUMENTS[1:]:
        if options.get(name) is not None and options.get("ssl") is None:
            raise ValueError(f"{name} is only meaningful with ssl")
