"""`--proxy-protocol`: the client is who the proxy says, for the application, the access log and the policy `hash`."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import proc
from tests.helpers.raw import Address, Client, request
from tests.helpers.server import KEEP, Serve, Server, serving
from tests.helpers.waiting import DEADLINE, eventually

FULL = "tests.helpers.apps.full:app"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def version1(client: str, port: int = 4321) -> bytes:
    family, proxy = ("TCP6", "::1") if ":" in client else ("TCP4", "127.0.0.1")
    return f"PROXY {family} {client} {proxy} {port} 80\r\n".encode()


def version2(client: str, port: int = 4321, tail: bytes = b"") -> bytes:
    family = socket.AF_INET6 if ":" in client else socket.AF_INET
    address = socket.inet_pton(family, client)
    body = address + b"\0" * len(address) + struct.pack("!HH", port, 80) + tail
    return SIGNATURE + struct.pack("!BBH", 0x21, 0x21 if ":" in client else 0x11, len(body)) + body


@pytest.fixture(scope="module", params=["auto", "request", "connection"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving() as serve:
        options = ("--proxy-protocol", "auto", "--dispatch", request.param, "--timeout-request-header", "1", *KEEP)
        yield serve(*options, app=FULL, workers=2)


def test_the_server_is_what_the_client_has_connected_to(server: Server) -> None:
    real = ["127.0.0.1", server.address.port]
    for header, told in (
        (b"PROXY TCP4 203.0.113.7 192.0.2.1 4321 8443\r\n", ["192.0.2.1", 8443]),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 4321 443\r\n", ["2001:db8::1", 443]),
        (b"PROXY UNKNOWN\r\n", real),
        (b"", real),
    ):
        with server.connect() as client:
            client.send(header + request("GET", "/scope"))
            assert client.response().json()["server"] == told
            assert client.ask("GET", "/scope").json()["server"] == told


def client_of(client: Client) -> object:
    return client.ask("GET", "/scope").json()["client"]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (version1("203.0.113.7"), ["203.0.113.7", 4321]),
        (version1("2001:db8::7"), ["2001:db8::7", 4321]),
        (version2("203.0.113.8", tail=b"\4\0\1x"), ["203.0.113.8", 4321]),
        (version2("2001:db8::8"), ["2001:db8::8", 4321]),
        # A unix socket's client has no address.
        (SIGNATURE + struct.pack("!BBH", 0x21, 0x31, 216) + b"\0" * 216, None),
        # The proxy's own (health checks), or nobody knows whose: the real ones, as without a header.
        (SIGNATURE + struct.pack("!BBH", 0x20, 0, 0), "real"),
        (b"PROXY UNKNOWN\r\n", "real"),
        (b"", "real"),
    ],
    ids=["v1", "v1-6", "v2-tlv", "v2-6", "v2-unix", "v2-local", "v1-unknown", "none"],
)
def test_the_client_is_who_the_proxy_says(server: Server, header: bytes, told: object) -> None:
    with server.connect() as client:
        expected = ["127.0.0.1", client.port] if told == "real" else told
        client.send(header + request("GET", "/scope"))
        assert client.response().json()["client"] == expected
        # It stays so, whichever worker answers.
        assert [client_of(client) for _ in range(4)] == [expected] * 4
        if told != "real" and told is not None:
            server.wait_for(rf'{told[0]}:{told[1]} - "GET /scope HTTP/1.1" 200', count=5)  # type: ignore[index]


def test_a_header_in_pieces(server: Server) -> None:
    header = version2("203.0.113.9", port=77)
    with server.connect() as client:
        for position in range(len(header)):
            client.send(header[position : position + 1])
        # The header alone is no request.
        assert server.get("/").status == 200
        assert client_of(client) == ["203.0.113.9", 77]


def test_a_large_body_behind_it_is_whole(server: Server) -> None:
    body = bytes(range(256)) * 2000
    with server.connect() as client:
        client.send(version1("203.0.113.10") + request("POST", "/echo", body=body))
        assert client.response().body == body


def test_what_only_looks_like_a_header_is_closed_and_told_once(server: Server) -> None:
    for _ in range(3):
        with server.connect() as client:
            client.send(b"PROXY TCP4 localhost 127.0.0.1 1 2\r\n" + request("GET", "/"))
            with contextlib.suppress(ConnectionResetError):
                assert client.rest() == b""
    server.wait_for("Closed a connection of the proxy 127.0.0.1, whose PROXY header is an address that is none")
    assert len(server.found("Closed a connection of the proxy")) == 1


@pytest.mark.parametrize("sent", [b"PROXY TCP4 203", SIGNATURE[:5], version1("203.0.113.1")])
def test_who_does_not_come_to_an_end_is_closed(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        client.send(sent)
        with contextlib.suppress(ConnectionResetError):
            assert client.rest() == b""


def test_who_leaves_within_it(server: Server) -> None:
    sockets = server.sockets()
    for _ in range(5):
        with server.connect() as client:
            client.send(b"PROXY TC")
            client.half_close()
            with contextlib.suppress(ConnectionResetError):
                assert client.rest() == b""
    eventually(lambda: server.sockets() <= sockets, "nothing is left of them")


def test_others_are_not_believed(serve: Serve) -> None:
    server = serve("--proxy-protocol", "--proxy-allow-from", "10.0.0.0/8,::1", app=FULL)
    with server.connect() as client:
        assert client_of(client) == ["127.0.0.1", client.port]
    with server.connect() as client:
        # A line that no parser of HTTP knows.
        client.send(version1("203.0.113.7") + request("GET", "/scope"))
        assert client.response().status == 400


def test_over_a_unix_socket_and_seen_by_hash(serve: Serve, tmp_path: Path) -> None:
    options = ("--proxy-protocol", "v1", "--policy", "hash", "--dispatch", "connection")
    server = serve(*options, app=FULL, bind=f"unix:{tmp_path}/s", workers=2).wait_ready()
    met: dict[str, set[int]] = {}
    for number in range(40):
        address = f"203.0.113.{number % 10}"
        with server.connect() as client:
            client.send(version1(address) + request("GET", "/whoami"))
            met.setdefault(address, set()).add(client.response().json()["id"])
    assert all(len(workers) == 1 for workers in met.values())
    assert len(set.union(*met.values())) == 2


@pytest.mark.needs_tool("haproxy")
def test_with_real_haproxy(serve: Serve, tmp_path: Path) -> None:
    """Version 2, then version 1; a client that keeps its connection to it."""
    server = serve("--proxy-protocol", app=FULL, workers=2)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        fronts = [one.getsockname()[1], two.getsockname()[1]]
    back = server.address.port
    sections = "".join(
        f"listen l{port}\n  bind 127.0.0.1:{port}\n  server s 127.0.0.1:{back} {word}\n"
        for port, word in zip(fronts, ("send-proxy-v2", "send-proxy"), strict=True)
    )
    times = "timeout connect 30s\n  timeout client 60s\n  timeout server 60s\n"
    (tmp_path / "haproxy.cfg").write_text(f"global\n  nbthread 1\ndefaults\n  mode tcp\n  {times}{sections}")
    command = ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]
    haproxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for port in fronts:
            address = Address.parse(f"http://127.0.0.1:{port}")
            eventually(lambda port=port: proc.listening_inodes(port), "it listens")  # type: ignore[misc]
            with Client(address) as client:
                for _ in range(3):
                    assert client_of(client) == ["127.0.0.1", client.port]
    finally:
        haproxy.terminate()
        haproxy.wait(DEADLINE)
