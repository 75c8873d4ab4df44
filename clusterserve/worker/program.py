"""Running any program as a worker: as `__main__`, with every server of asyncio's and uvloop's clustered.

The program has the main thread and does there what it likes.  The message channel is read on a thread of ours, so that
it can be told to go whatever it does.  When its last connection has ended it is told so, and then ends as if it had
called `sys.exit(0)`: in its event loop if one runs in the main thread, else wherever it is, by a real-time signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Final

from ..channel.descriptors import Riders
from ..core.address import Address
from ..core.envelope import Envelope
from ..core.messages import Beat
from ..currentworker import CurrentWorker
from ..home import Home
from ..settings import Settings
from .heart import Heart
from .link import Link
from .main_module import MainModule
from .patched import Patches

#: What our thread sends the main thread to end the program.  Nobody else's, as far as one can know.
END: Final = signal.SIGRTMAX

#: How long a program that does not listen may take until it is told to go (seconds): it might want to hear of it.
START_UP: Final = 1.0

#: How long messages wait for a program to listen to them, from its start (seconds).
PATIENCE: Final = 10.0

#: How long the master may take to read what is said last (seconds).
LAST_WORDS: Final = 5.0


class Program:
    """One per process, made in the main thread before anything is sent that the program could be asked for."""

    def __init__(self, module: MainModule, settings: Settings, link: Link, worker: CurrentWorker) -> None:
        self._module = module
        self._heart = Heart(settings, link.send, lambda: 0)
        #: Whether the master wants to know of loops that stand still.
        self._judged = settings.timeout > 0
        self._link = link
        self._worker = worker
        self._loop = asyncio.SelectorEventLoop()
        self._home = Home(self._loop)
        self._main = threading.main_thread()
        self._drain: tuple[float, bool] | None = None
        self._beats_for: asyncio.AbstractEventLoop | None = None
        self._withdrawn: list[asyncio.Future[None]] = []
        self._started = False
        self._left = False
        self._ends = False
        self._code: str | int | None = 0

    def run(self) -> int:
        """Run it to its end; returns its exit code, or raises its SystemExit."""
        signal.signal(END, self._end)
        self._link.gone = 0
        self._link.on_drain = self._on_drain
        self._link.on_listening = self._on_listening
        self._link.on_envelope = self._on_envelope
        self._worker.join(self, self._home)
        ready = threading.Event()
        threading.Thread(target=self._control, args=(ready,), name="clusterserve", daemon=True).start()
        ready.wait()
        Patches(self._link, self._home, self._loop, self._closes, self._exits).apply()
        try:
            return self._module.run()
        finally:
            self._link.finish(LAST_WORDS)

    def _control(self, ready: threading.Event) -> None:
        """Our thread: the message channel, and the handlers of a program without a loop."""
        asyncio.set_event_loop(self._loop)
        self._link.attach_messages(self._loop)
        self._loop.call_later(START_UP, self._start_up_is_over)
        self._loop.call_later(PATIENCE, self._home.run, self._worker.started_up)
        self._loop.call_soon(ready.set)
        while True:
            with self._exits_meant_for_the_program():
                self._loop.run_forever()

    @contextlib.contextmanager
    def _exits_meant_for_the_program(self) -> Iterator[None]:
        """A handler that runs on our thread may call `sys.exit`."""
        try:
            yield
        except SystemExit as exc:
            self.end(exc.code)

    # -- the end of it --------------------------------------------------------------------------------------------

    def ask_to_leave(self) -> None:
        """The worker wants to go.  From any thread."""
        self._link.ask_to_leave()

    def post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        """A message of the program's.  From any thread."""
        self._link.post(envelope, descriptors, done)

    def handle_connection(self, sock: socket.socket) -> None:
        """A connection for its server.  From any thread."""
        self._link.handle_connection(sock)

    def die(self, number: int) -> None:
        """End by this signal.  From any thread."""
        self._worker.farewell = number
        self._interrupt()

    def end(self, code: str | int | None) -> None:
        """Have the program end with `code`, as in `sys.exit(code)`, unless it ends already.  From any thread."""
        if not self._ends:
            self._ends = True
            self._code = code
            self._interrupt()

    def _closes(self, loop: asyncio.AbstractEventLoop) -> None:
        """A loop of the program's is about to be closed."""
        if self._link.receives and self._link.receiver.loop is loop:
            # There is nothing any more whose standing still would matter, until another loop listens.
            self._loop.call_soon_threadsafe(self._heart.start, self._loop)
        self._link.loop_closes(loop)

    def _exits(self) -> None:
        """A loop of the program's ends by a SystemExit."""
        self._ends = self._ends or threading.current_thread() is self._main

    def _interrupt(self) -> None:
        if self._main.ident is not None:
            signal.pthread_kill(self._main.ident, END)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two steps of whatever it does."""
        if farewell := self._worker.farewell:
            signal.signal(farewell, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [farewell])
            os.kill(os.getpid(), farewell)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            sys.exit(self._code)
        # Not in the midst of the loop's own affairs.
        loop.call_soon_threadsafe(partial(sys.exit, self._code))

    def _on_envelope(self, envelope: Envelope, riders: Riders) -> None:
        self._home.run(self._worker.received, envelope, riders)

    def _on_listening(self, address: Address) -> None:
        self._worker.tell("listening", address, state="listening")
        if self._beats_for != (loop := asyncio.get_running_loop()):
            self._beats_for = loop
            self._heart.start(loop)
            if self._judged:
                # From now on: also if it never comes to a second one.
                self._link.send(Beat(0))
        self._loop.call_soon_threadsafe(self._start_up_is_over)

    def _start_up_is_over(self) -> None:
        self._started = True
        self._leave()

    def _on_drain(self, grace: float, quick: bool, keep: bool) -> None:
        self._drain = (grace, quick)
        self._leave()

    def _leave(self) -> None:
        """Close the servers, if it is time."""
        if self._drain is None or not self._started:
            return
        if self._worker.exited_after_disconnect is None:
            self._worker.exited_after_disconnect = True
            self._worker.tell("draining", state="draining")
        if self._link.receives:
            with contextlib.suppress(RuntimeError):
                self._link.receiver.loop.call_soon_threadsafe(self._close_servers)
                return
        self._disconnect()

    def _close_servers(self) -> None:
        """On the loop that listens."""
        if not self._link.receives or self._drain is None:
            self._idle()
            return
        receiver = self._link.receiver
        # Every offer was sent before the order to go: none is left behind.
        receiver.drain()
        for server in tuple(self._link.servers):
            connections = server.withdraw()
            if connections is not None:
                # Kept: the next time that this is asked (a second order, the end of the start-up) they count too.
                self._withdrawn.append(asyncio.ensure_future(connections))
        ends = asyncio.ensure_future(_all(self._withdrawn))
        if self._drain[1] or self._worker.farewell:
            receiver.cut()
            self._idle()
        else:
            # Those that are known to their servers, and those that were handed to us.
            ends.add_done_callback(lambda done: receiver.when_idle(self._idle))

    def _idle(self) -> None:
        self._loop.call_soon_threadsafe(self._disconnect)

    def _disconnect(self) -> None:
        """No connection is left."""
        if not self._left:
            self._left = True
            # What the program has said before, handlers of messages included, is said.
            self._home.run(self._hand_back)

    def _hand_back(self) -> None:
        self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        self._link.finish(LAST_WORDS)
        self._link.close()
        self._worker.leave(lambda: self.end(0))


async def _all(waits: list[asyncio.Future[None]]) -> None:
    await asyncio.gather(*waits)
