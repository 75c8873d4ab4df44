"""`Debuggers`: where debuggers can attach to workers, and who waits to hear of it."""

from __future__ import annotations

import asyncio
import logging

from ..core.messages import Debug, Debugged
from ..core.roster import Roster
from .crew import Seat

logger = logging.getLogger("clusterserve")


class Debuggers:
    """On the engine's loop.  `seats` are the engine's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, roster: Roster, seats: dict[int, Seat]) -> None:
        self._loop = loop
        self._roster = roster
        self._seats = seats
        #: Who waits, and for which workers each.
        self._orders: dict[asyncio.Future[dict[int, str]], set[int]] = {}

    def start(self, port: str | int) -> asyncio.Future[dict[int, str]]:
        """Let debuggers attach to every worker at `port` (as in the setting `debug_port`).

        Done when all that are there have answered or gone, with the addresses.  A worker that has a debugger keeps it.
        """
        order: asyncio.Future[dict[int, str]] = self._loop.create_future()
        self._orders[order] = set()
        for worker, seat in self._seats.items():
            if seat.member.current and not seat.debugger:
                self._roster.debugging(worker)
                self._orders[order].add(worker)
                seat.channel.send(Debug(port))
        self.settle()
        return order

    def addresses(self) -> dict[int, str]:
        """By worker."""
        return {worker: seat.debugger for worker, seat in self._seats.items() if seat.debugger}

    def settle(self, answered: int = 0) -> None:
        """This worker has answered, or is gone."""
        for order, waiting in list(self._orders.items()):
            waiting.discard(answered)
            if not waiting:
                del self._orders[order]
                order.set_result(self.addresses())

    def answered(self, worker: int, message: Debugged) -> None:
        """What a worker says of its debugger."""
        seat = self._seats[worker]
        if message.address != seat.debugger:
            seat.debugger = message.address
            logger.info("Worker %d (slot %d, pid %d) can be debugged at %s", *seat.who, message.address)
            if message.wanted:
                logger.warning("Worker %d is not at %s: %s", worker, message.wanted, message.why)
        elif not message.address:
            logger.error("Worker %d cannot be debugged at %s: %s", worker, message.wanted, message.why)
        self.settle(worker)
