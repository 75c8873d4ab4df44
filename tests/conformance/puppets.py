"""Workers that do what a test says: a script that obeys requests, and what is asked of it.

async with scene.cluster(PUPPET) as (cluster, told):
    one = await puppet(cluster)
    port = await one.do("listen", "a", "127.0.0.1", 0)
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from typing import Any, Final

import pytest

from clusterserve import Cluster, Worker, faults
from tests.conformance.helpers import PATIENCE
from tests.helpers import proc

PUPPET: Final = '''
servers, tasks, received, connections = {}, {}, {}, []


def outcome(function):
    async def obeyed(*arguments):
        try:
            return {"done": await function(*arguments)}
        except OSError as exc:
            return {"errno": exc.errno, "text": str(exc)}
        except asyncio.CancelledError:
            return {"cancelled": True}
    return obeyed


async def answers(reader, writer):
    connections.append(writer)
    line = await reader.readline()
    if line == b"stay\\n":
        writer.write(b"staying\\n")
        await reader.read()
    else:
        writer.write(str(worker.id).encode())
    writer.close()


class Collector(asyncio.DatagramProtocol):
    def __init__(self, name):
        self.data = received.setdefault(name, [])
        self.at_once = False
        self.most = 1 << 30
    def connection_made(self, transport):
        self.transport = transport
        if self.at_once:
            transport.close()
    def datagram_received(self, data, addr):
        self.data.append(data.decode())
        self.transport.sendto(str(worker.id).encode(), addr)
        if len(self.data) == self.most:
            self.transport.close()


def names(server):
    return [sock.getsockname() for sock in server.sockets]


async def listen(name, host, port, options):
    names_of_ours = ("data", "v6only", "max_connections", "drop")
    ours = {name: options.pop(name) for name in names_of_ours if name in options}
    with clusterserve.listen_options(**ours) as options_used:
        servers[name] = await asyncio.start_server(answers, host, port, **options)
    return [names(servers[name]), options_used.data]


async def unix(name, path):
    servers[name] = await asyncio.start_unix_server(answers, path)
    return names(servers[name])[0]


async def udp(name, host, port, options):
    loop = asyncio.get_running_loop()
    collector = Collector(name)
    collector.most = options.pop("most", collector.most)
    collector.at_once = options.pop("close", False)
    with clusterserve.listen_options(v6only=options.pop("v6only", None)):
        servers[name], _ = await loop.create_datagram_endpoint(lambda: collector, (host, port), **options)
    return servers[name].get_extra_info("sockname")


async def send_udp(name, host, port, text):
    """Send from the endpoint `name`, made to only send if there is none."""
    if name not in servers:
        loop = asyncio.get_running_loop()
        servers[name], _ = await loop.create_datagram_endpoint(lambda: Collector(name), family=socket.AF_INET)
    servers[name].sendto(text.encode(), (host, port))


async def own(name, host, port):
    """A socket that this process has bound itself."""
    sock = socket.create_server((host, port))
    servers[name] = await asyncio.start_server(answers, sock=sock)
    return names(servers[name])[0]


async def own_udp(name, host, port):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    servers[name], _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Collector(name), sock=sock)
    return sock.getsockname()


async def close(name):
    server = servers.pop(name)
    server.close()
    if hasattr(server, "wait_closed"):
        await server.wait_closed()


async def give_up(kind, *arguments):
    """Ask to listen and lose interest in the same turn."""
    task = asyncio.ensure_future(globals()[kind](*arguments))
    await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


async def had(name):
    return received.get(name, [])


async def sockets():
    """The sockets that this process has."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            # What this list was read from.
            pass
    return sorted(link for link in links if link.startswith("socket:"))


async def go(directory):
    os.chdir(directory)


async def hold(seconds, name=None):
    """Be busy for so long, soon; then close the server `name`, in the same turn."""
    def busy():
        say("busy")
        time.sleep(seconds)
        if name is not None:
            servers.pop(name).close()
    asyncio.get_running_loop().call_later(0.05, busy)


async def drops(name):
    return servers[name].drops


async def reopened(name, host, port):
    """Close it and open it again, at once."""
    servers.pop(name).close()
    [[first, *_], _] = await listen(name, host, port, {})
    return first[1]


VERBS = {name: globals()[name] for name in (
    "drops", "reopened", "listen", "unix", "udp", "own", "own_udp", "close", "had", "sockets", "go",
    "send_udp", "give_up", "hold",
)}


async def main():
    @worker.on_request
    async def obey(order):
        verb, *arguments = order
        return await outcome(VERBS[verb])(*arguments)
    worker.send("ready")
    await forever()

LOOP = os.environ.get("PUPPET_LOOP", "asyncio")
if LOOP == "uvloop":
    import uvloop
    uvloop.install()
asyncio.run(main())
'''


class RefusedError(Exception):
    """The puppet got an OSError."""

    def __init__(self, errno: int | None, text: str) -> None:
        super().__init__(f"[{errno}] {text}")
        self.errno = errno
        self.text = text


class Puppet:
    """One worker, ready to obey."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    async def do(self, verb: str, *arguments: Any, within: float = PATIENCE) -> Any:
        """Have it done; raises `RefusedError` for an OSError of the worker's."""
        outcome = await self.worker.request([verb, *arguments], timeout=within)
        if "done" not in outcome:
            raise RefusedError(outcome["errno"], outcome["text"])
        return outcome["done"]

    async def listen(self, name: str, port: int = 0, host: Any = "127.0.0.1", **options: Any) -> int:
        """Its port: of its first socket."""
        (first, *_), _ = await self.do("listen", name, host, port, options)
        return int(first[1])

    async def refused(self, verb: str, *arguments: Any) -> RefusedError:
        """The error that it must get."""
        try:
            done = await self.do(verb, *arguments)
        except RefusedError as exc:
            return exc
        raise AssertionError(f"{verb} {arguments} was not refused: {done}")


async def puppet(cluster: Cluster, **env: str) -> Puppet:
    """A new worker."""
    worker = cluster.fork(env)
    await worker.wait_for("message", timeout=PATIENCE)
    return Puppet(worker)


async def puppets(cluster: Cluster, count: int, **env: str) -> list[Puppet]:
    """Several, that start at once."""
    return list(await asyncio.gather(*(puppet(cluster, **env) for _ in range(count))))


async def asked(address: Any, family: int = socket.AF_INET) -> str:
    """What a worker answers a fresh connection: its id."""
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, b"hello\n")
        answer = b""
        while part := await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE):
            answer += part
        return answer.decode()


async def askers(port: int, count: int) -> list[str]:
    """So many answers, one connection after the other."""
    return [await asked(("127.0.0.1", port)) for _ in range(count)]


async def both_answer(address: Any, family: int = socket.AF_INET) -> None:
    """Workers 1 and 2 serve there, and nobody else: asked until both have.

    Not within a fixed number of turns: on a busy machine one of them may well be passed over for a while.
    """
    deadline, seen = time.monotonic() + PATIENCE, set[str]()
    while seen != {"1", "2"}:
        assert time.monotonic() < deadline, f"only {seen} answered"
        seen.add(await asked(address, family))
        assert seen <= {"1", "2"}


def listeners(port: int) -> list[str]:
    """The TCP listeners on this port, as ss shows them: local address, and backlog."""
    shown = subprocess.run(
        ["ss", "-ltnH", f"sport = :{port}"], capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout
    return [f"{fields[3]} {fields[2]}" for fields in map(str.split, shown.splitlines())]


async def end(cluster: Cluster, told: Any, *some: Puppet) -> None:
    """Disconnect these; all of them must exit with 0."""
    for each in some:
        each.worker.disconnect()
    for each in some:
        (exit,) = await told.until("exit", each.worker)
        assert exit.details == (0, None), f"worker {each.worker.id} exited with {exit.details}"


def own_sockets() -> int:
    """How many sockets this process, the master, has."""
    return sum(link.startswith("socket:") for link in proc.descriptors(os.getpid()).values())


def fault(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, str]:
    """Break a mechanism of the master's, and, with the environment that is returned, of its workers'."""
    monkeypatch.setattr(faults, "_ON", frozenset({name}))
    return {faults.VARIABLE: name}


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody listens on."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
