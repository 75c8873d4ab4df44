"""Where a worker serves, as its `listening` event says it."""

from __future__ import annotations

from typing import NamedTuple


class Address(NamedTuple):
    """`str()` of it is a URL, as in "http://127.0.0.1:8000", "https://…" with `tls`, "unix:PATH", "udp://127.0.0.1:53".

    `address` is the IP address or the path; `port` is -1 for a path; `address_type` is 4, 6, -1 (a path), "udp4" or
    "udp6", as in Node; `fd` is always None: workers share no descriptor numbers.
    """

    address: str
    port: int = -1
    address_type: int | str = -1
    fd: int | None = None
    tls: bool = False

    def __str__(self) -> str:
        if self.address_type == -1:
            return f"unix:{self.address}"
        scheme = "udp" if isinstance(self.address_type, str) else "https" if self.tls else "http"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{scheme}://{host}:{self.port}"
