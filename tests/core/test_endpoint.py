"""How addresses that are bound get on: checked against the kernel, which knows best."""

from __future__ import annotations

import errno
import itertools
import socket

import pytest

from clusterserve.core.endpoint import Endpoint

PLACES = [
    ("127.0.0.1", False), ("127.0.0.2", False), ("0.0.0.0", False), ("::1", False), ("::", False), ("::", True),
]  # fmt: skip


def bind(host: str, port: int, v6only: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    try:
        sock.bind((host, port))
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def both(first: tuple[str, bool], second: tuple[str, bool]) -> tuple[bool, bool]:
    """Whether a port that is bound to the first is said to be free at the second, and whether it is."""
    with bind(first[0], 0, first[1]) as one:
        port = one.getsockname()[1]
        clashes = Endpoint("tcp", first[0], port, first[1]).clashes(Endpoint("tcp", second[0], port, second[1]))
        try:
            bind(second[0], port, second[1]).close()
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            return not clashes, False
        return not clashes, True


@pytest.mark.parametrize(("first", "second"), [*itertools.product(PLACES, PLACES)])
def test_the_kernel_sees_it_in_the_same_way(first: tuple[str, bool], second: tuple[str, bool]) -> None:
    # That port may be somebody else's at the second: then another one shows it.
    found = next((answer for _ in range(20) if (answer := both(first, second)) != (True, False)), (True, False))
    assert found in {(True, True), (False, False)}


def test_who_serves_whom() -> None:
    dual, v6, v4, one = (Endpoint("tcp", host, 80, only) for host, only in [*PLACES[4:], *PLACES[2:1:-1], *PLACES[:1]])
    assert [dual.serves(other) for other in (dual, v6, v4, one)] == [True, False, True, False]
    for only in (v6, v4, one):
        assert [only.serves(other) for other in (dual, v6, v4, one)] == [other is only for other in (dual, v6, v4, one)]


def test_what_has_nothing_to_do_with_it() -> None:
    endpoint = Endpoint("tcp", "::", 80)
    for other in (Endpoint("udp", "::", 80), Endpoint("tcp", "::", 81), Endpoint("udp", "0.0.0.0", 80)):
        assert not endpoint.serves(other)
        assert not endpoint.clashes(other)


def test_its_text() -> None:
    assert str(Endpoint("tcp", "127.0.0.1", 80)) == "127.0.0.1:80"
    assert str(Endpoint("tcp", "::1", 80, True)) == "[::1]:80"
    assert str(Endpoint("tcp", "::", 80, True)) == "[::]:80 (IPv6 only)"
