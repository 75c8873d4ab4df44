"""From one master's dispatcher to another's: what a proxy has said of a connection goes along, or comes yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.core.bequest import Bequest
from clusterserve.core.handover import Passed, decode, encode
from clusterserve.core.records import IPV4, PROXIED
from clusterserve.master.introductions import Introductions
from clusterserve.master.listeners import Listener
from clusterserve.master.upgrade import handed

from .rig import Rig, SkewedLoop

HEADER = b"PROXY TCP4 203.0.113.7 192.0.2.1 4321 443\r\n"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CLIENT = b"\0" * 10 + b"\xff\xff" + bytes([203, 0, 113, 7])


@pytest.fixture
def masters(loop: SkewedLoop, tmp_path: Path) -> Iterator[tuple[Rig, Listener, Rig, Listener]]:
    """The old one, and the new one."""
    loop.freeze()
    old, new = (Rig(loop, introductions=Introductions("auto", "")) for _ in range(2))
    yield (
        old, old.listen(f"unix:{tmp_path}/old", client_speaks_first=True),
        new, new.listen(f"unix:{tmp_path}/new", client_speaks_first=True),
    )  # fmt: skip
    old.close()
    new.close()


@pytest.mark.parametrize("end", [0, 1, 20, len(HEADER) - 1, len(HEADER), len(HEADER) + 5])
def test_in_the_midst_of_a_header(masters: tuple[Rig, Listener, Rig, Listener], end: int) -> None:
    old, its, new, listener = masters
    client = old.connect(its, (HEADER + REQUEST)[:end])
    if end > len(HEADER):
        old.queued(1)
    else:
        old.parked(1)
        # What there was to be read is read.
        old.loop.turn(20)

    def inherit(bequests: list[Bequest]) -> None:
        for bequest in bequests:
            # As it travels.
            message = decode(encode(Passed((handed(bequest),))))
            assert isinstance(message, Passed)
            (one,) = message.connections
            new.dispatcher.inherit(bequest.connection.fd, dataclasses.replace(one, listener=listener.key), listener.key)

    old.dispatcher.bequeath([its.key], inherit)
    worker = new.worker(listener)
    client.sendall((HEADER + REQUEST)[end:])
    (offer,) = worker.receive()
    assert (offer.family, offer.client, offer.port) == (PROXIED | IPV4, CLIENT, 4321)
    assert (offer.server, offer.server_port) == (CLIENT[:12] + bytes([192, 0, 2, 1]), 443)
    assert offer.sock.recv(65536) == REQUEST


def test_what_a_proxy_takes_for_its_header_is_no_time_in_the_queue(
    masters: tuple[Rig, Listener, Rig, Listener],
) -> None:
    master, listener, _, _ = masters
    client = master.connect(listener, HEADER[:9])
    master.parked(1)
    master.loop.forward(20.0)
    master.loop.turn()
    worker = master.worker(listener)
    client.sendall(HEADER[9:] + REQUEST)
    (offer,) = worker.receive()
    assert (offer.client, offer.sock.recv(65536)) == (CLIENT, REQUEST)
    assert offer.waited < 10.0
