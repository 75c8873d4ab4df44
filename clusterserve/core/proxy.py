"""The PROXY protocol, versions 1 and 2: what stands in front of a connection's own bytes and says whose it is.

`parse` is given what can be seen so far, and says how long the header is, so that the shell takes it off the connection
and not a byte more.  The specification is HAProxy's proxy-protocol.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address, IPv6Network, ip_network
from struct import Struct
from typing import Final

from .records import IPV4, IPV6, NO_ADDRESS

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"

#: The longest header of version 1, by the specification; and of version 2 with what follows the addresses, by us.
MAX_V1: Final = 107
MAX_V2: Final = 4096

_HEAD: Final = 16
_PORTS: Final = Struct("!HH")
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


class ProxyError(ValueError):
    """It begins as a header and is none."""


@dataclass(frozen=True)
class Header:
    """A header of so many bytes.  Without `family` the connection is the proxy's own, or its origin is not known."""

    length: int
    #: As in the records: `NO_ADDRESS` for a client without one (a unix socket).
    family: int | None = None
    #: 16 bytes, IPv4 mapped into IPv6; empty without an address.
    client: bytes = b""
    port: int = 0
    #: What the client has connected to, in the same form: the proxy's address, and what is the server's for it.
    server: bytes = b""
    server_port: int = 0


@dataclass(frozen=True)
class More:
    """It may become one: at least so many bytes must be there."""

    length: int


def parse(data: bytes, mode: str = "auto") -> Header | More | None:
    """The header that `data` begins with; None if it begins with none.  Raises `ProxyError`."""
    for version, signature, read in (("v1", _V1, _version1), ("v2", _V2, _version2)):
        if mode in ("auto", version) and data[: len(signature)] == signature[: len(data)]:
            return read(data) if len(data) >= len(signature) else More(len(data) + 1)
    return None


def _version1(data: bytes) -> Header | More:
    line, end, _ = data[:MAX_V1].partition(b"\r\n")
    if not end:
        if len(data) >= MAX_V1 or b"\n" in line:
            raise ProxyError("a line without an end")
        return More(len(data) + 1)
    length = len(line) + 2
    words = line.split(b" ")
    if words[1] == b"UNKNOWN":
        return Header(length)
    if len(words) != 6 or words[1] not in (b"TCP4", b"TCP6"):
        raise ProxyError("a line of another form")
    try:
        client, server = (_address(words[1], word.decode("ascii")) for word in words[2:4])
    except (AddressValueError, UnicodeDecodeError):
        raise ProxyError("an address that is none") from None
    ports = [int(word) if word.isdigit() and len(word) <= 5 else -1 for word in words[4:]]
    if not all(0 <= port <= 65535 for port in ports):
        raise ProxyError("a port that is none")
    return Header(length, IPV4 if words[1] == b"TCP4" else IPV6, client, ports[0], server, ports[1])


def _address(family: bytes, text: str) -> bytes:
    return _MAPPED + IPv4Address(text).packed if family == b"TCP4" else IPv6Address(text.partition("%")[0]).packed


def _version2(data: bytes) -> Header | More:
    if len(data) < _HEAD:
        return More(_HEAD)
    version, command, family = data[12] >> 4, data[12] & 15, data[13] >> 4
    length = _HEAD + int.from_bytes(data[14:16], "big")
    if version != 2 or command > 1:
        raise ProxyError("another version or command")
    if length > MAX_V2:
        raise ProxyError(f"more than {MAX_V2} bytes")
    needed = {1: 12, 2: 36, 3: 216}.get(family, 0)
    if command == 1 and length - _HEAD < needed:
        raise ProxyError("less than its addresses")
    if len(data) < length:
        return More(length)
    # What follows the addresses (TLVs) is skipped with them.
    if command == 0 or not needed:
        return Header(length)
    if family == 3:
        return Header(length, NO_ADDRESS)
    size, mapped = (4, _MAPPED) if family == 1 else (16, b"")
    client, server = (mapped + data[start : start + size] for start in (_HEAD, _HEAD + size))
    ports = _PORTS.unpack_from(data, _HEAD + 2 * size)
    return Header(length, IPV4 if family == 1 else IPV6, client, ports[0], server, ports[1])


class Trust:
    """Who may say whose a connection is: addresses and networks, separated by commas; "*" is everybody.

    A client without an address (a unix socket) is trusted: whoever may connect there was chosen by the file's mode.
    Raises ValueError for a text that says something else.
    """

    def __init__(self, text: str) -> None:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        self._all = "*" in parts
        networks = [ip_network(part, strict=False) for part in parts if part != "*"]
        self._networks = tuple(
            each
            if isinstance(each, IPv6Network)
            else IPv6Network((_MAPPED + each.network_address.packed, each.prefixlen + 96))
            for each in networks
        )
        self._known: dict[bytes, bool] = {}

    def __contains__(self, client: bytes) -> bool:
        """Whether this client, 16 bytes, IPv4 mapped, or none, is one of them."""
        if self._all or not client:
            return True
        known = self._known.get(client)
        if known is None:
            if len(self._known) >= 1024:
                self._known.clear()
            address = IPv6Address(client)
            known = self._known[client] = any(address in network for network in self._networks)
        return known
