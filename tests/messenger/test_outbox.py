"""The outbox: what any thread posts is sent on the engine's loop, in order, or comes back."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from clusterserve.channel.descriptors import Riders
from clusterserve.channel.message import MessageChannel
from clusterserve.core.envelope import Envelope, Kind
from clusterserve.master.outbox import Outbox
from tests.helpers.loops import until


def message(number: int) -> Envelope:
    return Envelope(Kind.SEND, number, False, b"1")


@pytest.fixture
def ends(loop: asyncio.AbstractEventLoop) -> Iterator[tuple[MessageChannel, list[tuple[int, int]]]]:
    """The master's end, and what has arrived at the other: numbers, and how many descriptors came along."""
    got: list[tuple[int, int]] = []

    def on_envelope(envelope: Envelope, riders: Riders) -> None:
        got.append((envelope.number, len(riders)))

    ours, theirs = socket.socketpair()
    sender = MessageChannel(loop, ours, lambda message, fds: None, lambda error: None)
    receiver = MessageChannel(loop, theirs, lambda message, fds: None, lambda error: None, on_envelope)
    yield sender, got
    sender.close()
    receiver.close()


def descriptor() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


async def test_from_any_thread_in_order(
    loop: asyncio.AbstractEventLoop, ends: tuple[MessageChannel, list[tuple[int, int]]]
) -> None:
    channel, got = ends
    outbox = Outbox(loop, {7: channel}.get)
    sent: list[bool] = []

    def post() -> None:
        for number in range(100):
            outbox.post(7, message(number), [descriptor()] if number % 2 else [], sent.append)

    thread = threading.Thread(target=post)
    thread.start()
    await until(lambda: len(got) == 100, "all have arrived")
    thread.join()
    assert got == [(number, number % 2) for number in range(100)]
    assert sent == [True] * 100
    outbox.close()


async def test_to_nobody(loop: asyncio.AbstractEventLoop) -> None:
    """The autouse fixture counts the descriptors."""
    outbox = Outbox(loop, lambda worker: None)
    sent: list[bool] = []
    outbox.post(7, message(1), [descriptor()], sent.append)
    await until(lambda: sent, "it comes back")
    assert sent == [False]
    outbox.close()


async def test_after_the_end_and_what_waits_then(
    loop: asyncio.AbstractEventLoop, ends: tuple[MessageChannel, list[tuple[int, int]]]
) -> None:
    channel, got = ends
    outbox = Outbox(loop, {7: channel}.get)
    sent: list[bool] = []
    outbox.post(7, message(1), [descriptor()], sent.append)
    outbox.close()
    assert sent == [False]
    outbox.post(7, message(2), [descriptor()], sent.append)
    assert sent == [False, False]
    await asyncio.sleep(0)
    assert got == []


def test_a_loop_that_is_closed_already(loop_class: type[asyncio.AbstractEventLoop]) -> None:
    loop = loop_class()
    loop.close()
    outbox = Outbox(loop, lambda worker: None)
    sent: list[bool] = []
    outbox.post(7, message(1), [descriptor()], sent.append)
    assert sent == []
    outbox.close()
    assert sent == [False]
