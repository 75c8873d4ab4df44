"""UDP (U)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from tests.conformance.helpers import PATIENCE, Scene
from tests.conformance.puppets import PUPPET, Puppet, RefusedError, end, fault, free_port, puppet, puppets

LOOPBACK = "127.0.0.1"
#: uvloop's own transport reads until nothing is left.
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@contextlib.contextmanager
def client(port: int = 0) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((LOOPBACK, port))
        sock.setblocking(False)
        yield sock


async def receive(sock: socket.socket, count: int) -> list[tuple[str, int]]:
    """So many datagrams: what they say, and the ports they come from."""
    loop, got = asyncio.get_running_loop(), []
    while len(got) < count:
        ready = loop.create_future()
        loop.add_reader(sock, lambda ready=ready: ready.done() or ready.set_result(None))
        try:
            await asyncio.wait_for(ready, PATIENCE)
        finally:
            loop.remove_reader(sock)
        data, address = sock.recvfrom(100)
        got.append((data.decode(), address[1]))
    return got


async def bind(one: Puppet, name: str = "a", port: int = 0, host: str = LOOPBACK, **options: object) -> int:
    return int((await one.do("udp", name, host, port, options))[1])


@LOOPS
def test_U01_a_closed_endpoint_loses_nothing(scene: Scene, loop: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 4, PUPPET_LOOP=loop)
            ports = await asyncio.gather(*(bind(each, most=10) for each in workers))
            assert len(set(ports)) == 1
            with client() as sock:
                for number in range(40):
                    sock.sendto(str(number).encode(), (LOOPBACK, ports[0]))
                answers = await receive(sock, 40)
            assert sorted(text for text, _ in answers) == sorted("1234" * 10)
            had = [await each.do("had", "a") for each in workers]
            assert sorted(int(text) for each in had for text in each) == list(range(40))
            await end(cluster, told, *workers)

    scene.run(main())


def test_U02_what_is_bound_can_send(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 3)
            port = await bind(workers[0])
            for each in workers[1:]:
                assert await bind(each, port=port) == port
            with client() as sock:
                for each in workers:
                    await each.do("send_udp", "a", *sock.getsockname(), f"from {each.worker.id}")
                answers = await receive(sock, 3)
            assert sorted(answers) == [(f"from {number}", port) for number in (1, 2, 3)]
            await cluster.disconnect()
            assert [each.details for each in told.every("exit")] == [(0, None)] * 3

    scene.run(main())


def test_U03_a_descriptor_is_the_masters(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            with client() as inherited:
                port = inherited.getsockname()[1]
                for each in workers:
                    assert await bind(each, host=f"fd://{inherited.fileno()}", most=5) == port
                with client() as sock:
                    for number in range(10):
                        sock.sendto(str(number).encode(), (LOOPBACK, port))
                    assert sorted(text for text, _ in await receive(sock, 10)) == ["1"] * 5 + ["2"] * 5
                await end(cluster, told, *workers)
                # It is still the master's.
                assert inherited.getsockname()[1] == port

    scene.run(main())


def test_U04_both_families_on_one_port(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            port = await bind(one, "six", host="::", v6only=True)
            assert await bind(one, "four", port, "0.0.0.0") == port
            types = [each.details[0].address_type for each in await told.until("listening", count=2)]
            assert types == ["udp6", "udp4"]
            # Without it, as with asyncio alone: both families, and nothing else beside.
            other = await bind(one, "both", host="::")
            assert (await one.refused("udp", "c", "0.0.0.0", other, {})).errno == errno.EADDRINUSE

    scene.run(main())


def test_U05_two_reusing_sockets_in_one_worker(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            port = await bind(one, "a", reuse_port=True)
            assert await bind(one, "b", port, reuse_port=True) == port
            await end(cluster, told, one)

    scene.run(main())


def test_U06_reuse_port_goes_past_the_master(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await bind(one, reuse_port=True)
            assert await bind(two, port=port, reuse_port=True) == port
            assert told.every("listening") == []

    scene.run(main())


def test_U07_opening_and_closing_again_and_again(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 2)
            for _ in range(5):
                await asyncio.gather(*(bind(each, name) for each in workers for name in "ab"))
                await asyncio.gather(*(each.do("close", name) for each in workers for name in "ab"))
            await end(cluster, told, *workers)

    scene.run(main())


def test_U08_a_worker_without_the_socket_leaves(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            await bind(one)
            await end(cluster, told, two)
            await cluster.disconnect()
            assert [each.details for each in told.every("exit")] == [(0, None)] * 2

    scene.run(main())


def test_U09_closing_before_the_bad_news_comes(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            with client() as taken:
                assert await one.do("give_up", "udp", "a", *taken.getsockname(), {})
            await bind(one)
            await end(cluster, told, one)

    scene.run(main())


def test_U10_an_error_is_the_callers_and_the_next_try_is_clean(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            with client() as taken:
                address = taken.getsockname()
                for _ in range(2):
                    assert (await one.refused("udp", "a", *address, {})).errno == errno.EADDRINUSE
            assert await bind(one, port=address[1]) == address[1]
            await end(cluster, told, one)

    scene.run(main())


def test_U11_a_socket_that_comes_too_late_is_closed(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            before, port = await one.do("sockets"), free_port(socket.SOCK_DGRAM)
            for _ in range(5):
                assert await one.do("give_up", "udp", "a", LOOPBACK, port, {})
            # Behind them all.
            assert await bind(one, port=port) == port
            await one.do("close", "a")
            assert await one.do("sockets") == before
            assert len(told.every("listening")) == 1
            with client(port):
                pass

    scene.run(main())


def test_U12_closing_as_soon_as_it_listens(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 3)
            await asyncio.gather(*(bind(each, close=True) for each in workers))
            await end(cluster, told, *workers)

    scene.run(main())


def test_U13_who_only_sends_has_a_port_of_its_own(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            workers = await puppets(cluster, 4)
            await asyncio.gather(*(bind(each) for each in workers[:2]))
            with client() as sock:
                for each in workers:
                    await each.do("send_udp", "a", *sock.getsockname(), "hello")
                sources = {port for _, port in await receive(sock, 4)}
            assert len(sources) == 3
            assert len(told.every("listening")) == 2

    scene.run(main())


def test_U15_shared_and_exclusive_ports(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            shared = await bind(one)
            assert await bind(two, port=shared) == shared
            _, exclusive = await one.do("own_udp", "b", LOOPBACK, 0)
            assert (await two.refused("own_udp", "b", LOOPBACK, exclusive)).errno == errno.EADDRINUSE
            assert (await two.refused("udp", "b", LOOPBACK, exclusive, {})).errno == errno.EADDRINUSE
            await end(cluster, told, one, two)

    scene.run(main())


async def port_0_then_its_number(scene: Scene) -> None:
    async with scene.cluster(PUPPET) as (cluster, _):
        one, two = await puppets(cluster, 2)
        port = await bind(one, most=5)
        assert await bind(two, port=port, most=5) == port
        with client() as sock:
            for number in range(10):
                sock.sendto(str(number).encode(), (LOOPBACK, port))
            assert sorted(text for text, _ in await receive(sock, 10)) == ["1"] * 5 + ["2"] * 5


def test_U16_port_0_and_the_number_it_became_are_one(scene: Scene) -> None:
    scene.run(port_0_then_its_number(scene))


def test_U16_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "literal-addresses")
    with pytest.raises(RefusedError) as caught:
        scene.run(port_0_then_its_number(scene))
    assert caught.value.errno == errno.EADDRINUSE


@LOOPS
@pytest.mark.parametrize("policy", ["rr", "none"])
def test_U17_killed_workers_take_nothing_with_them(scene: Scene, policy: str, loop: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            workers = await puppets(cluster, 4, PUPPET_LOOP=loop)
            port = await bind(workers[0])
            for each in workers[1:]:
                await bind(each, port=port)
            with client() as sock:
                # One does not swallow all: each has had some of these.
                answers: set[str] = set()
                while len(answers) < 4:
                    for _ in range(20):
                        sock.sendto(b"x", (LOOPBACK, port))
                    answers |= {text for text, _ in await receive(sock, 20)}
                for each in workers[:3]:
                    each.worker.kill("SIGKILL")
                    await told.until("exit", each.worker)
                for _ in range(20):
                    sock.sendto(b"x", (LOOPBACK, port))
                assert {text for text, _ in await receive(sock, 20)} == {"4"}

    scene.run(main())
