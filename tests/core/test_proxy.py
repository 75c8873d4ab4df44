"""The PROXY protocol: what is a header, how long it is, and whose a connection is by it."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clusterserve.core.proxy import MAX_V1, MAX_V2, Header, More, ProxyError, Trust, parse
from clusterserve.core.records import IPV4, IPV6, NO_ADDRESS

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
MAPPED = b"\0" * 10 + b"\xff\xff"

ports = st.integers(0, 65535)
v4 = st.ip_addresses(v=4)
v6 = st.ip_addresses(v=6)


def version2(family: int, addresses: bytes, command: int = 1) -> bytes:
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(addresses)) + addresses


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, Header]:
    """A header as a proxy sends it, and what it says."""
    kind = draw(st.sampled_from(["1.4", "1.6", "1.?", "2.4", "2.6", "2.unix", "2.local", "2.?"]))
    port, door, tail = draw(ports), draw(ports), draw(st.binary(max_size=40))
    client4, client6, server4, server6 = draw(v4), draw(v6), draw(v4), draw(v6)
    told4 = (IPV4, MAPPED + client4.packed, port, MAPPED + server4.packed, door)
    told6 = (IPV6, client6.packed, port, server6.packed, door)
    raw, said = {
        "1.4": (f"PROXY TCP4 {client4} {server4} {port} {door}\r\n".encode(), told4),
        "1.6": (f"PROXY TCP6 {client6} {server6} {port} {door}\r\n".encode(), told6),
        "1.?": (b"PROXY UNKNOWN what ever follows\r\n", (None, b"", 0)),
        "2.4": (
            version2(0x11, client4.packed + server4.packed + struct.pack("!HH", port, door) + tail),
            told4,
        ),
        "2.6": (
            version2(0x21, client6.packed + server6.packed + struct.pack("!HH", port, door) + tail),
            told6,
        ),
        "2.unix": (version2(0x31, b"/x".ljust(108, b"\0") * 2 + tail), (NO_ADDRESS, b"", 0)),
        "2.local": (version2(0x11, b"\1" * 12 + tail, command=0), (None, b"", 0)),
        "2.?": (version2(0x00, tail), (None, b"", 0)),
    }[kind]
    return raw, Header(len(raw), *said)


@given(header=headers(), rest=st.binary(max_size=30))
def test_a_header_is_read_and_nothing_beyond_it(header: tuple[bytes, Header], rest: bytes) -> None:
    raw, said = header
    assert parse(raw + rest) == said
    version, other = ("v1", "v2") if raw.startswith(b"PROXY") else ("v2", "v1")
    assert parse(raw + rest, version) == said
    assert parse(raw + rest, other) is None


@given(header=headers(), data=st.data())
def test_until_it_is_whole_it_asks_for_more_but_not_for_too_much(
    header: tuple[bytes, Header], data: st.DataObject
) -> None:
    raw, _ = header
    end = data.draw(st.integers(0, len(raw) - 1))
    answer = parse(raw[:end])
    assert isinstance(answer, More)
    assert end < answer.length <= len(raw)


@given(
    start=st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"!"]), end=st.binary(max_size=300)
)
@example(b"PROXY ", b"\xff \xff\r\n")
@example(b"PROXY TCP4 ", b"\xff\xff 1.2.3.4 1 1\r\n")
def test_whatever_comes_it_is_read_or_refused(start: bytes, end: bytes) -> None:
    data = start + end
    try:
        answer = parse(data)
    except ProxyError:
        assert data.startswith((b"PROXY ", SIGNATURE))
        return
    if isinstance(answer, Header):
        assert answer.length <= len(data)
    elif isinstance(answer, More):
        assert len(data) < answer.length <= MAX_V2


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"PUT / HTTP/1.1\r\n", b"PROXY/ x", b"\r\nGET /", b"\x16\x03\x01"]
)
def test_what_is_no_header(data: bytes) -> None:
    assert parse(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 ::1 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\nGET / HTTP/1.1\r\n\n",
        b"PROXY UNKNOWN " + b"x" * MAX_V1,
        SIGNATURE + b"\x11\x11\0\x0c" + b"\0" * 12,
        SIGNATURE + b"\x22\x11\0\x0c" + b"\0" * 12,
        SIGNATURE + b"\x21\x11\0\x0b" + b"\0" * 11,
        SIGNATURE + b"\x21\x21\0\x0c" + b"\0" * 12,
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
def test_what_only_looks_like_one_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyError):
        parse(data)


class TestTrust:
    def test_addresses_and_networks(self) -> None:
        trust = Trust("127.0.0.1, 10.0.0.0/8,fd00::/8")
        for text, trusted in (("127.0.0.1", True), ("127.0.0.2", False), ("10.9.9.9", True), ("11.0.0.1", False)):
            assert (MAPPED + IPv4Address(text).packed in trust) is trusted
        for text, trusted in (("fd12::1", True), ("fe80::1", False), ("::1", False)):
            assert (IPv6Address(text).packed in trust) is trusted

    def test_who_has_no_address_and_everybody(self) -> None:
        assert b"" in Trust("")
        assert IPv6Address("2001:db8::1").packed in Trust("*")
        assert IPv6Address("::1").packed not in Trust("")

    def test_a_wrong_one(self) -> None:
        with pytest.raises(ValueError, match="does not appear"):
            Trust("localhost")

    def test_what_is_remembered_has_an_end(self) -> None:
        trust = Trust("10.0.0.0/8")
        for _ in range(2):
            assert [MAPPED + IPv4Address(f"{first}.0.{number >> 8}.{number & 255}").packed in trust
                    for first in (10, 11) for number in range(1500)] == [True] * 1500 + [False] * 1500  # fmt: skip
        assert len(trust._known) <= 1024

    @given(clients=st.lists(v4, max_size=30))
    def test_what_was_found_out_is_remembered_rightly(self, clients: list[IPv4Address]) -> None:
        trust = Trust("128.0.0.0/1")
        for client in clients * 2:
            assert (MAPPED + client.packed in trust) is (int(client) >= 1 << 31)
