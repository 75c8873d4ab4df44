"""What systemd is told (sd_notify(3)), and the watchdog that it keeps (sd_watchdog_enabled(3)).

Nothing here waits: what cannot be sent at once, because systemd has not read what was said before, is sent later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from ..activation import passed
from ..core.events import BecameReady, Event, Scaled, StartedReload, StartedShutdown, Stopped
from ..errors import ClusterError
from ..settings import Settings

logger = logging.getLogger("clusterserve")

# Not those of LISTEN_FDS: they name the process they are for, and a reload reads them again.
_OURS: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

#: Until what could not be sent is tried again (seconds).
_PATIENCE: Final = 0.1

#: Lines of a status, and what separates fields, are ends of lines: a text is one.
_LONGEST: Final = 500


class Notifier:
    """Sends to the socket at `address` (a path, or `@` and a name); to nobody, if that is empty.

    Whatever else happens: READY=1 is not said before every worker has listened, nor again behind STOPPING=1.
    """

    def __init__(self, address: str, watchdog: float, loop: asyncio.AbstractEventLoop) -> None:
        #: How long systemd waits for the next feeding (seconds); 0: it does not.
        self.watchdog = watchdog
        self._workers = ""
        #: Whether this cluster has ever been ready, and whether it ends.
        self._up = self._over = False
        #: Another master is who systemd listens to: nothing is sent.
        self.silent = False
        self._loop = loop
        self._unsent: list[bytes] = []
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._address = "\0" + address[1:] if address.startswith("@") else address

    def close(self) -> None:
        if self._socket is not None:
            self._socket.settimeout(_PATIENCE)
            self._flush()
            self._socket.close()

    def send(self, *states: str, status: str = "") -> None:
        """Send these, as in "READY=1"; nothing happens if nobody listens."""
        if self.silent:
            return
        lines = [*states, f"STATUS={' '.join(status.split())[:_LONGEST]}"] if status else [*states]
        self._unsent.append("\n".join(lines).encode("utf-8", "replace"))
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent and self._socket is not None:
                self._socket.sendto(self._unsent[0], self._address)
                del self._unsent[0]
        except BlockingIOError:
            self._loop.call_later(_PATIENCE, self._flush)
            return
        except OSError as error:
            logger.debug("NOTIFY_SOCKET: %s", error)
        self._unsent.clear()

    def starting(self, settings: Settings) -> None:
        """Who is the master, and that it has begun."""
        self._workers = _workers(settings.workers)
        self.send(f"MAINPID={os.getpid()}", status=f"Starting {self._workers} of {settings.title}")

    def take_over(self, settings: Settings) -> None:
        """This master serves from now on, instead of another."""
        self.silent, self._up = False, True
        self._workers = _workers(settings.workers)
        self.send("READY=1", f"MAINPID={os.getpid()}", status=f"Serving with {self._workers}")

    def pass_on(self, pid: int) -> None:
        """Another master serves from now on: nothing more is said here."""
        self.send(f"MAINPID={pid}")
        self.silent = True

    def ready(self, status: str = "") -> None:
        """What was begun is over, and it serves as before; before it has ever been ready, that is a status only."""
        if not self._over:
            self.send(*(["READY=1"] if self._up else []), status=status or self._serving)

    @property
    def _serving(self) -> str:
        return f"Serving with {self._workers}" if self._up else f"Starting {self._workers}"

    def failed(self, error: ClusterError) -> None:
        """It ends, and why."""
        self.send("STOPPING=1", status=str(error).partition("\n")[0])

    def on_event(self, event: Event) -> None:
        """Told of every event of the cluster."""
        if isinstance(event, BecameReady):
            self._up = True
            self.ready()
        elif isinstance(event, StartedReload):
            self._reloading("Replacing the workers")
        elif isinstance(event, Scaled):
            self._workers = _workers(event.workers)
            self.send(status=self._serving)
        elif isinstance(event, Stopped):
            # It may end of itself: who waits for a reload hears so next, and that is no news then.
            self._over = True
        elif isinstance(event, StartedShutdown):
            self._over = True
            self.send("STOPPING=1", status="Serving what was accepted, then stopping")

    def _reloading(self, status: str) -> None:
        if self._over:
            return
        if not self._up:
            self.send(status=status)
            return
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send("RELOADING=1", f"MONOTONIC_USEC={microseconds}", status=status)

    def on_refused(self, error: ClusterError) -> None:
        """Told when a reload does not take place.  Under `Type=notify-reload` systemd waits for both words."""
        status = f"The last reload was refused, nothing was done: {error}"
        self._reloading(status)
        self.ready(status)

    def on_reloaded(self, change: asyncio.Future[None]) -> None:
        """Told when a reload is over."""
        if change.cancelled():
            return
        error = change.exception()
        others = ", and the workers before it serve on" if self._up else ""
        self.ready(f"The last reload failed{others}: {error}" if error else "")

    def watch(self, loop: asyncio.AbstractEventLoop, healthy: Callable[[float], bool]) -> None:
        """Feed the watchdog from now on, whenever `healthy`, given how many seconds back to look, is true."""
        if self._socket is not None and self.watchdog:
            # Twice in that time, as its manual recommends.  What waits to be sent will do as well.
            if not self.silent and not self._unsent and healthy(self.watchdog / 2):
                self.send("WATCHDOG=1")
            loop.call_later(self.watchdog / 2, self.watch, loop, healthy)


@contextlib.contextmanager
def notifier(settings: Settings, loop: asyncio.AbstractEventLoop, *, silent: bool = False) -> Iterator[Notifier]:
    """Who tells systemd, inside the block; from `take_over` on, if it is `silent`.

    What systemd has said to this process, it says to no worker.
    """
    sockets = passed()
    unused = sockets.keys() - {bind.fd for bind in settings.binds}
    if unused:
        names = ", ".join(f"fd://{fd} ({sockets[fd]})" for fd in sorted(unused))
        logger.warning("Sockets were passed and are not used: %s; name them with --bind, or give no address", names)
    watchdog = os.environ.get("WATCHDOG_USEC", "").strip()
    for_us = os.environ.get("WATCHDOG_PID", "").strip() in ("", str(os.getpid()))
    usec = int(watchdog) if for_us and watchdog.isdecimal() else 0
    before = {name: os.environ.pop(name) for name in _OURS if name in os.environ}
    teller = Notifier(before.get("NOTIFY_SOCKET", ""), usec / 1e6, loop)
    teller.silent = silent
    try:
        teller.starting(settings)
        yield teller
    except ClusterError as error:
        teller.failed(error)
        raise
    finally:
        teller.close()
        os.environ.update(before)


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
