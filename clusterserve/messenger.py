"""`Messenger`: messages and requests to the other side of a channel, for the master's `Worker` and for `CurrentWorker`.

A message is encoded on the thread that sends it and decoded on the home loop, where handlers run: who carries it never
looks inside.  Sockets ride along as copies, made at once, and belong to whoever receives them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

from .core.envelope import Envelope, Kind, Requests, Riders, seal, unseal
from .emitter import Emitter, H, Handler, _arity
from .errors import ChannelClosed, ClusterError, ProtocolError
from .pending import Delivery, Pending
from .sockets import adopted, checked, copies, leaving

logger = logging.getLogger("clusterserve")

#: When so many bytes wait, `send` returns false: its caller should await.
HIGH_WATER: Final = 1 << 20

#: Who listens first, while a program starts, hears nothing for so long (seconds): it may be on another thread than
#: the handlers, and about to add the next one.
MOMENT: Final = 0.02


class _Asker:
    """Who waits for the answer to a request."""

    __slots__ = ("pending", "timer")

    def __init__(self) -> None:
        self.pending: Pending[Any] = Pending()
        self.timer: asyncio.TimerHandle | None = None


class Messenger(Emitter):
    """One side of a conversation.  `send` and `request` are for any thread.

    Who has the channel calls `received`, `started_up` and `channel_closed` on the home loop, and provides `_post`.
    """

    #: How a sentence calls the other side.
    _peer = "the other side"

    def __init__(self, names: Collection[str], *, pickled: bool = False, early: bool = False) -> None:
        super().__init__(names)
        self._pickled = pickled
        self._requests: Requests[_Asker] = Requests()
        self._lock = threading.Lock()
        #: Bytes that were sent and that the kernel does not have.
        self._unsent = 0
        self._request_handler: Handler | None = None
        #: What came before anybody listened, until start-up ends; None from then on.
        self._early: deque[tuple[Envelope, Riders]] | None = deque() if early else None
        #: How many listeners have come within `MOMENT`.
        self._coming = 0

    # -- sending --------------------------------------------------------------------------------------------------

    def send(self, obj: Any, *sockets: Any, keep_open: bool | None = None) -> Delivery:
        """Send a message, and with it up to 16 sockets; the other side's `message` handlers get both.

        Awaiting what it returns waits until the kernel has the message; that it is false says that the channel is
        closed (awaiting raises `ChannelClosed` then) or that 1 MiB waits already and awaiting is wise.  Messages arrive
        in order, whatever their size; what the kernel has arrives also if this process ends right after.

        A copy of each socket is made at once.  Yours is closed when the kernel has the message, if it is a connection;
        listening and UDP sockets stay open.  `keep_open` says otherwise for all of them.

        Raises TypeError or ValueError for what is no JSON (or cannot be pickled, if that was chosen) or is longer than
        64 MiB, and for what is no socket.
        """
        return self._dispatch(seal(Kind.SEND, 0, obj, self._pickled), sockets, keep_open)

    def request(
        self, obj: Any, *sockets: Any, timeout: float | None = None, keep_open: bool | None = None
    ) -> Pending[Any]:
        """Ask the other side, whose `on_request` handler's return value is the result.  Sockets: as in `send`.

        Fails with `ClusterError` and the text of the exception if the handler raised one, with TimeoutError after
        `timeout` seconds, and with `ChannelClosed` if the other side is gone, or goes without an answer.
        """
        asker = _Asker()
        with self._lock:
            number = self._requests.open(asker)
        try:
            envelope = seal(Kind.REQUEST, number, obj, self._pickled)
            delivery = self._dispatch(envelope, sockets, keep_open)
        except BaseException:
            self._forget(number)
            raise
        delivery.add_done_callback(lambda done: self._undelivered(number, done.exception()))
        if timeout is not None and self._home is not None:
            # A home that is closed hears of no answer either: its owner tells of the end before.
            with contextlib.suppress(RuntimeError):
                self._home.call_soon_threadsafe(self._watch, number, asker, timeout)
        return asker.pending

    def on_request(self, handler: H | None = None) -> Any:
        """Answer requests with what `handler(obj)`, or `handler(obj, sockets)`, returns; without one, a decorator.

        It may be a coroutine function.  What it raises is logged, and the other side's request fails with its text.
        There is one handler: the last.
        """
        if handler is None:
            return self.on_request
        if not callable(handler):
            raise TypeError(f"a handler of requests is a function, not {handler!r}")
        self._request_handler = handler
        self._catch_up()
        return handler

    def _dispatch(self, envelope: Envelope, sockets: Sequence[Any], keep_open: bool | None) -> Delivery:
        closing = leaving(checked(sockets), keep_open)
        try:
            descriptors = copies(sockets)
        except OSError as exc:
            # At the limit of open files: nothing of it is sent.
            failed = Delivery(accepted=False)
            failed.set_exception(exc)
            return failed
        with self._lock:
            accepted = self._unsent < HIGH_WATER and self.is_connected()
            self._unsent += envelope.size
        delivery = Delivery(accepted)

        def done(sent: bool) -> None:
            with self._lock:
                self._unsent -= envelope.size
            if sent:
                for sock in closing:
                    sock.close()
                delivery.set_result(None)
            else:
                delivery.set_exception(ChannelClosed(f"the channel of {self._peer} is closed"))

        self._post(envelope, descriptors, done)
        return delivery

    def _post(self, envelope: Envelope, descriptors: list[int], done: Callable[[bool], None]) -> None:
        """Bring it on its way, from any thread; takes the descriptors over; `done` once, whatever becomes of it."""
        raise NotImplementedError

    def is_connected(self) -> bool:
        """Whether messages can still be sent."""
        raise NotImplementedError

    # -- receiving, on the home loop ------------------------------------------------------------------------------

    def received(self, envelope: Envelope, riders: Riders) -> None:
        """A message has come: open it and tell."""
        answer = envelope.kind in (Kind.REPLY, Kind.FAILURE)
        if self._early is not None and not answer and (self._early or self._coming or not self._wanted(envelope)):
            # Behind one that waits everything waits, or they would change places.
            self._early.append((envelope, riders))
        else:
            self._take(envelope, riders)

    def _take(self, envelope: Envelope, riders: Riders) -> None:
        try:
            if envelope.kind is Kind.SEND:
                content, sockets = self._open(envelope, riders)
                if not self._tell(content, sockets):
                    for sock in sockets:
                        sock.close()
            elif envelope.kind is Kind.REQUEST:
                self._answer(envelope, riders)
            else:
                riders.close()
                self._answered(envelope)
        except ProtocolError as exc:
            riders.close()
            self._misbehaved(exc)
        except ClusterError as exc:
            self._went_wrong(exc)

    def started_up(self) -> None:
        """The program had its chance to listen: what nobody wants now is dropped."""
        early, self._early = self._early, None
        for envelope, riders in early or ():
            self._take(envelope, riders)

    def channel_closed(self) -> None:
        """Nothing comes any more: requests that are not answered fail."""
        self.started_up()
        with self._lock:
            waiting = self._requests.give_up_all()
        for asker in waiting:
            if asker.timer is not None:
                asker.timer.cancel()
            asker.pending.set_exception(ChannelClosed(f"{self._peer} is gone and has not answered"))

    def _wanted(self, envelope: Envelope) -> bool:
        """Whether there is somebody for it."""
        return self._answerer() is not None if envelope.kind is Kind.REQUEST else self.listens("message")

    def _register(self, name: str, handler: H | None, *, once: bool) -> Any:
        result = super()._register(name, handler, once=once)
        if name == "message" and handler is not None:
            self._catch_up()
        return result

    def wait_for(self, name: str, timeout: float | None = None) -> Pending[Any]:
        """The next event of this name: its argument, or a tuple if it has several.  Fails with TimeoutError."""
        pending = super().wait_for(name, timeout)
        if name == "message":
            self._catch_up()
        return pending

    def _catch_up(self) -> None:
        """Somebody listens: soon they hear what came before, and so do those who come next."""
        if self._early is not None and self._home is not None:
            with self._lock:
                self._coming += 1
            with contextlib.suppress(RuntimeError):
                self._home.call_soon_threadsafe(self._home.call_later, MOMENT, self._deliver_early)

    def _deliver_early(self) -> None:
        with self._lock:
            self._coming -= 1
        # A handler may end the start-up, or be the next to come.
        while self._early and not self._coming and self._wanted(self._early[0][0]):
            self._take(*self._early.popleft())

    def _open(self, envelope: Envelope, riders: Riders) -> tuple[Any, list[socket.socket]]:
        """The content and the sockets, which are the caller's."""
        try:
            content = unseal(envelope, self._pickled)
        except ProtocolError:
            raise
        except Exception as exc:
            # Unpickling runs other people's code.
            riders.close()
            raise ClusterError(f"a message of {self._peer} cannot be read: {type(exc).__name__}: {exc}") from exc
        lost = riders.lost
        sockets = []
        for fd in riders.take():
            try:
                sockets.append(adopted(fd))
            except OSError:  # noqa: PERF203 - one that is no socket costs itself
                os.close(fd)
                lost += 1
        if lost:
            what = f"{lost} of {lost + len(sockets)} sockets"
            self._went_wrong(ClusterError(f"{what} of a message have not arrived: at the limit of open files?"))
        return content, sockets

    def _tell(self, content: Any, sockets: list[socket.socket]) -> bool:
        """Tell of a message; whether anybody heard."""
        return self.emit("message", content, sockets)

    def _went_wrong(self, error: ClusterError) -> None:
        """Tell of an error that costs one message."""
        if not self.emit("error", error):
            logger.error("%s", error)

    def _misbehaved(self, error: ProtocolError) -> None:
        """The other side sent what it must not."""
        self._went_wrong(error)

    # -- requests of the other side -------------------------------------------------------------------------------

    def _answerer(self) -> tuple[Handler, tuple[Any, ...]] | None:
        """Who answers requests, and with which first arguments it is called."""
        return None if self._request_handler is None else (self._request_handler, ())

    def _answer(self, envelope: Envelope, riders: Riders) -> None:
        answerer = self._answerer()
        if answerer is None:
            riders.close()
            self._reply(envelope.number, Kind.FAILURE, "nobody answers requests there: it has no on_request handler")
            return
        try:
            content, sockets = self._open(envelope, riders)
        except ProtocolError:
            raise
        except ClusterError as exc:
            self._reply(envelope.number, Kind.FAILURE, str(exc))
            raise
        handler, first = answerer
        try:
            result = handler(*(*first, content, sockets)[: _arity(handler)])
        except Exception as exc:  # noqa: BLE001 - other people's code
            self._failed(envelope.number, handler, exc)
            return
        if not inspect.isawaitable(result):
            self._succeeded(envelope.number, handler, result)
            return
        task = asyncio.ensure_future(result)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended_request(envelope.number, handler, done))

    def _ended_request(self, number: int, handler: Handler, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._reply(number, Kind.FAILURE, "it was cancelled")
        elif isinstance(exc := task.exception(), Exception):
            self._failed(number, handler, exc)
        elif exc is None:
            self._succeeded(number, handler, task.result())

    def _succeeded(self, number: int, handler: Handler, result: Any) -> None:
        try:
            self._reply(number, Kind.REPLY, result)
        except Exception as exc:  # noqa: BLE001 - pickling runs other people's code
            self._failed(number, handler, exc)

    def _failed(self, number: int, handler: Handler, exc: Exception) -> None:
        name = getattr(handler, "__qualname__", repr(handler))
        trace = exc.__traceback__ and (exc.__traceback__.tb_next or exc.__traceback__)
        logger.error("The request handler %s raised", name, exc_info=(type(exc), exc, trace))
        self._reply(number, Kind.FAILURE, f"{type(exc).__name__}: {exc}")

    def _reply(self, number: int, kind: Kind, content: Any) -> None:
        # Who asked may be gone: nobody is told.
        self._dispatch(seal(kind, number, content, self._pickled), (), None)

    # -- our own requests -----------------------------------------------------------------------------------------

    def _answered(self, envelope: Envelope) -> None:
        with self._lock:
            asker = self._requests.answered(envelope.number)
        if asker is None:
            # It came too late.
            return
        if asker.timer is not None:
            asker.timer.cancel()
        try:
            content = unseal(envelope, self._pickled)
        except ProtocolError as exc:
            asker.pending.set_exception(exc)
            raise
        except Exception as exc:  # noqa: BLE001 - unpickling runs other people's code
            asker.pending.set_exception(ClusterError(f"the answer cannot be read: {type(exc).__name__}: {exc}"))
            return
        if envelope.kind is Kind.REPLY:
            asker.pending.set_result(content)
        else:
            asker.pending.set_exception(ClusterError(str(content)))

    def _watch(self, number: int, asker: _Asker, timeout: float) -> None:
        """On the home loop, which sees it answered or closed as well: no race."""
        if not asker.pending.done() and self._home is not None:
            error = TimeoutError(f"{self._peer} has not answered within {timeout:g} s")
            # A home that moves from loop to loop has no handle to give.
            asker.timer = self._home.call_later(timeout, self._fail, number, error)

    def _undelivered(self, number: int, error: BaseException | None) -> None:
        if error is not None:
            self._fail(number, error)

    def _fail(self, number: int, error: BaseException) -> None:
        asker = self._forget(number)
        if asker is not None:
            asker.pending.set_exception(error)

    def _forget(self, number: int) -> _Asker | None:
        with self._lock:
            return self._requests.give_up(number)


def broadcast(
    messengers: Iterable[Messenger], obj: Any, sockets: Sequence[Any] = (), keep_open: bool | None = None
) -> Pending[int]:
    """Send one message to all that are connected; the result is how many of them the kernel has it for.

    It is encoded once.  Your sockets are closed, as `send` would, when it is done with all of them.
    """
    sealed: dict[bool, Envelope] = {}
    closing = leaving(checked(sockets), keep_open)
    # Before anything is sent: what cannot be encoded goes to nobody, also if there is nobody.
    connected = [each for each in messengers if each.is_connected()]
    for pickled in {each._pickled for each in connected} or {False}:
        sealed[pickled] = seal(Kind.SEND, 0, obj, pickled)
    deliveries = [each._dispatch(sealed[each._pickled], sockets, keep_open=True) for each in connected]
    result: Pending[int] = Pending()
    lock = threading.Lock()
    left, reached = len(deliveries), 0

    def done(delivery: concurrent.futures.Future[None]) -> None:
        nonlocal left, reached
        with lock:
            left -= 1
            reached += delivery.exception() is None
            if left > 0:
                return
        finish()

    def finish() -> None:
        for sock in closing:
            sock.close()
        result.set_result(reached)

    for delivery in deliveries:
        delivery.add_done_callback(done)
    if not deliveries:
        finish()
    return result
