"""`Endpoint`: an address as the kernel has bound it, and how two of them get on.

The same place has many names: a host or its number, port 0 and the port that it became, one address and the wildcard
that includes it.  Listeners are compared by what is really bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

IPV4_ANY: Final = "0.0.0.0"
IPV6_ANY: Final = "::"


@dataclass(frozen=True)
class Endpoint:
    """`transport` is tcp or udp; `host` is numeric, as the kernel writes it; `v6only` is of IPv6 sockets alone."""

    transport: str
    host: str
    port: int
    v6only: bool = False

    @property
    def dual(self) -> bool:
        """Whether it is every address of both families."""
        return self.host == IPV6_ANY and not self.v6only

    def serves(self, asked: Endpoint) -> bool:
        """Whether who asks for `asked` gets all of it here: it is the same, or the IPv4 part of every address."""
        return self == asked or (self._beside(asked) and self.dual and asked.host == IPV4_ANY)

    def clashes(self, other: Endpoint) -> bool:
        """Whether the kernel would refuse to bind one beside the other."""
        if not self._beside(other):
            return False
        if self.dual or other.dual or self.host == other.host:
            return True
        if self._is_v6 != other._is_v6:
            return False
        return IPV4_ANY in (self.host, other.host) or IPV6_ANY in (self.host, other.host)

    @property
    def _is_v6(self) -> bool:
        return ":" in self.host

    def _beside(self, other: Endpoint) -> bool:
        return (self.transport, self.port) == (other.transport, other.port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if self._is_v6 else self.host
        only = " (IPv6 only)" if self.host == IPV6_ANY and self.v6only else ""
        return f"{host}:{self.port}{only}"
