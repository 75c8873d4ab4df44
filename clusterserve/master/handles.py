"""The cluster's listeners, and which worker is on which: Node's RoundRobinHandle and SharedHandle.

A listener is known by the address that is really bound, whatever a worker has called it.  Port 0 is a name of its own:
a worker's second server on it is a second listener, the same for all workers, and the port it has become stays the
cluster's as long as the master lives.  Under a policy the master accepts and the distributor has a handle of the same
key; under `none` (`shared`), and for UDP, the workers get the socket itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from .. import faults
from ..binds import Bind
from ..checks import MAX_INT
from ..core.address import Address
from ..core.endpoint import Endpoint
from ..core.handover import HeldListener
from ..core.messages import Listen
from ..core.policies import Policy
from ..errors import BindError, ProtocolError, SettingsError
from .dispatcher import Dispatcher
from .heritage import Heritage
from .listeners import Access, Listener, identity, open_listener, set_access
from .opening import ANY, any_host

logger = logging.getLogger("clusterserve")

#: How long a listener that no worker is left on is kept for the next one, if the last crashed (seconds).
ORPHAN_TIME: Final = 30.0


class _Free(NamedTuple):
    """Port 0, as a name: which of the listeners on such a port."""

    transport: str
    host: str
    v6only: bool
    number: int


class Handles:
    """Owns the listeners.  `make_policy` gives each its own policy object; None: the workers accept.

    `programs`: nobody but the workers' own servers serves what is pinned, so they may join it.  `heritage`: what
    another master has open, and is not opened again; until `take_over` it is still that one's.  `tls`: what is pinned
    is served with TLS.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        dispatcher: Dispatcher,
        make_policy: Callable[[], Policy] | None,
        access: Access = Access(),  # noqa: B008 - frozen
        *,
        programs: bool = False,
        heritage: Heritage | None = None,
        tls: bool = False,
    ) -> None:
        self._programs = programs
        self._heritage = heritage
        self._tls = tls
        self._loop = loop
        self._dispatcher = dispatcher
        self._distributor = dispatcher.distributor
        self._make_policy = make_policy
        self._access = access
        self._listeners: dict[int, Listener] = {}
        # What port 0 has become; and the ports that nobody listens on now, bound so that nobody takes them.
        self._ports: dict[_Free, int] = {}
        self._kept: dict[Endpoint, socket.socket] = {}
        self._orphans: dict[int, asyncio.TimerHandle] = {}
        # How many connections a worker may hold, as its server on a listener says.
        self._limits: dict[tuple[int, int], int] = {}
        self._keys = 0
        self._closed = False

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._listeners.values())

    @property
    def shared(self) -> bool:
        """Whether workers get the listening sockets themselves."""
        return self._make_policy is None

    @property
    def open(self) -> bool:
        """Whether any listener is still open."""
        return any(listener.is_open for listener in self)

    @property
    def closed(self) -> bool:
        """Whether none is opened any more."""
        return self._closed

    @property
    def pinned(self) -> set[int]:
        """The keys of the listeners that live as long as the master."""
        return {key for key, listener in self._listeners.items() if listener.pinned}

    def address(self, key: int) -> Address:
        """What this listener listens on."""
        listener = self._listeners[key]
        if isinstance(listener.sockname, str):
            return Address(listener.sockname, tls=listener.tls)
        host, port = listener.sockname[:2]
        version = 6 if listener.family == socket.AF_INET6 else 4
        kind: int | str = f"udp{version}" if listener.datagram else version
        return Address(str(host), int(str(port)), kind, tls=listener.tls)

    def open_pinned(self, binds: Iterable[Bind], backlog: int) -> list[Listener]:
        """Open the listeners of `--bind`; raises `BindError`, and `close` closes those that were opened before."""
        for bind in binds:
            self._open(bind, backlog, pinned=True)
        return list(self)

    def listen(self, worker: int, request: Listen) -> Listener:
        """The listener a worker asks for, opened if nobody had.

        Raises `BindError`, and the next try starts clean; `ProtocolError` for a `--bind` that never was.
        """
        bind, backlog = _parse(request.bind), min(request.backlog, MAX_INT)
        if bind.host == ANY and not request.pinned:
            bind, request = Bind("tcp", host=any_host(), port=bind.port), dataclasses.replace(request, v6only=False)
        if self._closed and (self.is_shared(request.datagram) or not request.pinned):
            raise _stopping(request.bind)
        if request.pinned:
            listener = self._pinned(worker, bind, request)
        elif bind.kind == "tcp" and not bind.port:
            listener = self._on_a_free_port(worker, bind, request)
        else:
            listener = self._on(worker, bind, request)
        if backlog > listener.backlog:
            listener.listen(backlog)
        if not listener.workers and not listener.data:
            listener.data = request.data
        listener.workers.add(worker)
        if request.max_connections >= 0:
            self._limits[worker, listener.key] = request.max_connections
            self._limit(worker)
        orphan = self._orphans.pop(listener.key, None)
        if orphan is not None:
            orphan.cancel()
        if self._make_policy is not None and not listener.datagram and listener.key not in self._distributor.handles:
            first = request.client_speaks_first
            self._distributor.add_handle(listener.key, self._make_policy(), client_speaks_first=first, tls=request.tls)
            if listener.is_open:
                self._dispatcher.add_listener(listener, client_speaks_first=first)
        return listener

    def _limit(self, worker: int) -> None:
        """The least that any of its servers says."""
        if worker in self._distributor.workers:
            limits = [limit for (each, _), limit in self._limits.items() if each == worker]
            self._distributor.workers[worker].capacity = min(limits, default=None)

    def _pinned(self, worker: int, bind: Bind, request: Listen) -> Listener:
        """The listener of `--bind` that this text names; of several on port 0 the first that the worker is not on."""
        found = [each for each in self if each.pinned and each.bind == bind and worker not in each.workers]
        if not found:
            raise ProtocolError(f"it asks for a listener on {request.bind}, which is no --bind, or which it has")
        handle = self._distributor.handles.get(found[0].key)
        if handle is not None and (handle.client_speaks_first, found[0].tls) != (
            request.client_speaks_first,
            request.tls,
        ):
            raise BindError(
                errno.EINVAL,
                f"cannot listen on {bind}: another worker serves it with TLS or another protocol; "
                "all workers serve an address in the same way",
                str(bind),
            )
        return found[0]

    def _on_a_free_port(self, worker: int, bind: Bind, request: Listen) -> Listener:
        transport = "udp" if request.datagram else "tcp"
        number = 0
        while True:
            name = _Free(transport, bind.host, request.v6only, number)
            port = self._ports.get(name)
            if port is None:
                return self._open_free(name, bind, request)
            was = Bind("tcp", host=bind.host, port=port)
            known = self._find(was, request)
            if known is None:
                try:
                    return self._open(was, request.backlog, pinned=False, request=request)
                except BindError as exc:
                    if exc.errno != errno.EADDRINUSE:
                        raise
                    logger.warning("Another program has taken port %d; for port 0, workers get another", port)
                    return self._open_free(name, bind, request)
            if worker not in known.workers:
                return self._join(worker, known, bind, request)
            number += 1

    def _open_free(self, name: _Free, bind: Bind, request: Listen) -> Listener:
        listener = self._open(bind, request.backlog, pinned=False, request=request)
        assert listener.endpoint is not None
        self._ports[name] = listener.endpoint.port
        return listener

    def _on(self, worker: int, bind: Bind, request: Listen) -> Listener:
        known = self._find(bind, request)
        if known is None:
            return self._open(bind, request.backlog, pinned=False, request=request)
        return self._join(worker, known, bind, request)

    def _join(self, worker: int, listener: Listener, bind: Bind, request: Listen) -> Listener:
        """One more worker for a listener that is there.  Raises `BindError` if they do not want the same."""
        if worker in listener.workers:
            raise _in_use(bind, f"this worker listens there already{_called(listener, bind)}")
        if listener.pinned and not self._programs:
            raise _in_use(bind, f"it is the cluster's --bind {listener.bind}")
        for option in ("reuse_address", "keep_alive"):
            if (
                listener.bind.kind == "tcp"
                and not listener.pinned
                and getattr(listener, option) != getattr(request, option)
            ):
                raise BindError(
                    errno.EINVAL,
                    f"cannot listen on {bind}: another worker listens there with {option}={getattr(listener, option)}; "
                    "give all the same options",
                    str(bind),
                )
        return listener

    def _find(self, bind: Bind, request: Listen) -> Listener | None:
        """Who listens there already, whatever it was called."""
        if bind.kind == "fd":
            return self._find_inherited(bind.fd)
        if bind.kind == "unix":
            return next((each for each in self if each.bind == bind or _same_file(each, bind.path)), None)
        asked = _endpoint(bind, request)
        if faults.on("literal-addresses"):
            return next((each for each in self if each.bind == bind and each.endpoint == asked), None)
        return next((each for each in self if each.endpoint is not None and each.endpoint.serves(asked)), None)

    def _find_inherited(self, fd: int) -> Listener | None:
        try:
            asked = os.fstat(fd)
        except OSError:
            return None
        for each in self:
            if each.is_open and os.path.samestat(asked, os.fstat(each.sock.fileno())):
                return each
        return None

    def is_shared(self, datagram: bool) -> bool:
        """Whether workers get the sockets of this kind themselves."""
        return datagram or self.shared

    def attach(self, worker: int, key: int) -> None:
        """The worker's server on listener `key` is in place.  Raises `ProtocolError` if it never asked for it."""
        listener = self._listeners.get(key)
        if listener is None or worker not in listener.workers:
            raise ProtocolError(f"it says it listens on listener {key}, which it did not ask for")
        if self.is_shared(listener.datagram):
            # The worker's own server has said what it thinks the backlog is.
            listener.listen(listener.backlog)
        else:
            self._dispatcher.attach(worker, key)

    def leave(self, worker: int, key: int, *, crashed: bool) -> None:
        """The worker no longer listens there; a listener that was only the workers' goes with the last of them."""
        listener = self._listeners.get(key)
        if listener is None or worker not in listener.workers:
            return
        listener.workers.discard(worker)
        if self._limits.pop((worker, key), None) is not None:
            self._limit(worker)
        if worker in self._distributor.workers and key in self._distributor.handles:
            self._distributor.detach(worker, key)
        if not listener.pinned and not listener.workers:
            if crashed and not faults.on("no-orphans"):
                self._orphans[key] = self._loop.call_later(ORPHAN_TIME, self._release, key)
            else:
                self._release(key)

    def leave_all(self, worker: int, *, crashed: bool) -> None:
        """The worker is dead."""
        for key in tuple(self._listeners):
            self.leave(worker, key, crashed=crashed)

    def close(self) -> None:
        """Close every listener and open none again; what was accepted stays with the dispatcher."""
        self._closed = True
        for listener in self:
            self._dispatcher.remove_listener(listener)
            listener.close()
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    # -- from one master to the next ------------------------------------------------------------------------------

    def held(self) -> list[tuple[HeldListener, socket.socket]]:
        """What there is, for another master."""
        found = []
        for each in self:
            if each.is_open:
                first, tls = self.speech(each.key) or (False, False)
                held = HeldListener(each.key, str(each.bind), each.pinned, each.datagram, first, each.file, tls)
                found.append((held, each.sock))
        return found

    def speech(self, key: int) -> tuple[bool, bool] | None:
        """Of a listener from which the master accepts, whether its clients speak first, and TLS; None for others."""
        handle = self._distributor.handles.get(key)
        return None if handle is None else (handle.client_speaks_first, handle.tls)

    def taken(self) -> dict[int, Listener]:
        """What was the old master's, by its key there."""
        return {each.inherited: each for each in self if each.inherited}

    def take_over(self) -> None:
        """What we have of the old master is ours now, the files of its unix sockets too."""
        for each in self:
            if each.inherited and each.bind.kind == "unix" and not each.bind.path.startswith("@"):
                try:
                    each.file = identity(each.bind.path)
                    set_access(each.bind.path, self._access)
                except OSError as exc:
                    logger.warning("The file of %s is not ours to set up: %s", each.address, exc.strerror)

    def leave_to_another(self, keys: Iterable[int]) -> None:
        """Another master has these too: close our copies, and nothing else."""
        for key in keys:
            listener = self._listeners.get(key)
            if listener is not None and listener.is_open:
                self._dispatcher.remove_listener(listener)
                listener.leave()

    def _open(self, bind: Bind, backlog: int, *, pinned: bool, request: Listen | None = None) -> Listener:
        if self._closed:
            raise _stopping(str(bind))
        options: dict[str, Any] = {"access": self._access, "tls": self._tls}
        if request is not None:
            for name in ("datagram", "v6only", "reuse_address", "keep_alive", "tls"):
                options[name] = getattr(request, name)
            kept = self._kept.pop(_endpoint(bind, request), None)
            if kept is not None:
                kept.close()
        asked = {name: bool(options.get(name)) for name in ("datagram", "v6only")}
        inherited = None if self._heritage is None else self._heritage.claim(bind, **asked)
        if inherited is not None:
            options["inherited"] = inherited.sock
        try:
            listener = open_listener(self._keys + 1, bind, min(backlog, MAX_INT), pinned=pinned, **options)
        except BindError as exc:
            raise self._explain(exc, bind, request) from None
        listener.inherited = 0 if inherited is None else inherited.held.key
        self._keys += 1
        self._listeners[listener.key] = listener
        return listener

    def _explain(self, error: BindError, bind: Bind, request: Listen | None) -> BindError:
        """If it is ourselves who stand in the way, say so."""
        if error.errno == errno.EADDRINUSE and request is not None and bind.kind == "tcp":
            asked = _endpoint(bind, request)
            for each in self:
                if each.endpoint is not None and each.endpoint.clashes(asked):
                    return _in_use(bind, f"this cluster listens on {each.endpoint}; all workers must ask for the same")
        return error

    def _release(self, key: int) -> None:
        listener = self._listeners.pop(key)
        self._orphans.pop(key, None)
        self._dispatcher.remove_listener(listener)
        if key in self._distributor.handles:
            self._dispatcher.forget(key)
        listener.close()
        self._keep_port(listener)

    def _keep_port(self, listener: Listener) -> None:
        """Let nobody take what port 0 has become, although nobody listens there now."""
        endpoint = listener.endpoint
        was_free = any(
            (name.transport, name.host, port, name.v6only) == dataclasses.astuple(endpoint)
            for name, port in self._ports.items()
            if endpoint is not None
        )
        if endpoint is None or self._closed or listener.datagram or not was_free:
            # A UDP socket that nobody reads would collect what is sent to it.
            return
        try:
            sock = socket.socket(listener.family, socket.SOCK_STREAM)
        except OSError:
            # Out of descriptors: not for this.
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, endpoint.v6only)
            sock.bind((endpoint.host, endpoint.port))
        except OSError:
            # Somebody was quicker: whoever asks for it again will hear of it.
            sock.close()
        else:
            self._kept[endpoint] = sock


def _parse(text: str) -> Bind:
    """The address a worker asks for; what cannot be one is that worker's error."""
    try:
        return Bind.parse(text)
    except SettingsError as exc:
        raise BindError(errno.EINVAL, str(exc), text) from None


def _stopping(address: str) -> BindError:
    return BindError(errno.ESHUTDOWN, f"cannot listen on {address}: the cluster is stopping", address)


def _endpoint(bind: Bind, request: Listen) -> Endpoint:
    """What it will be once it is bound."""
    v6only = request.v6only and ":" in bind.host
    return Endpoint("udp" if request.datagram else "tcp", bind.host, bind.port, v6only)


def _same_file(listener: Listener, path: str) -> bool:
    """Whether `path` is another name of its socket file."""
    if listener.file is None:
        return False
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return (found.st_dev, found.st_ino) == listener.file[1:]
    return False


def _called(listener: Listener, bind: Bind) -> str:
    return "" if listener.bind == bind else f", as {listener.endpoint or listener.bind}"


def _in_use(bind: Bind, why: str) -> BindError:
    return BindError(errno.EADDRINUSE, f"cannot listen on {bind}: address already in use: {why}", str(bind))
