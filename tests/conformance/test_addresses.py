"""Listening and addresses (A)."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest

from tests.conformance.helpers import Scene
from tests.conformance.puppets import (
    PUPPET,
    RefusedError,
    asked,
    both_answer,
    end,
    fault,
    free_port,
    listeners,
    puppet,
    puppets,
)

pytestmark = pytest.mark.needs_tool("ss")
POLICIES = pytest.mark.parametrize("policy", ["rr", "none"])


@POLICIES
def test_A01_port_0_is_a_real_port(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            port = await one.listen("a")
            assert 0 < port < 65536
            ((address,),) = [each.details for each in await told.until("listening", one.worker)]
            assert (address.address, address.port, address.address_type) == ("127.0.0.1", port, 4)
            assert await asked(("127.0.0.1", port)) == "1"

    scene.run(main())


def test_A02_listening_without_a_port(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            assert await asked(("127.0.0.1", await one.listen("a", None, None))) == "1"  # type: ignore[arg-type]
            assert await asked(("127.0.0.1", await one.listen("b", None))) == "1"  # type: ignore[arg-type]
            await end(cluster, told, one)

    scene.run(main())


@POLICIES
def test_A03_all_workers_have_the_same_free_ports(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
            workers = await puppets(cluster, 3)
            firsts = await asyncio.gather(*(each.listen("a") for each in workers))
            seconds = await asyncio.gather(*(each.listen("b") for each in workers))
            assert len(set(firsts)) == len(set(seconds)) == 1
            assert firsts[0] != seconds[0]
            for port in (firsts[0], seconds[0]):
                assert len(listeners(port)) == 1

    scene.run(main())


@POLICIES
def test_A04_opening_and_closing_again_and_again(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            workers = await puppets(cluster, 2)
            for _ in range(3):
                for each in workers:
                    await asyncio.gather(each.listen("a"), each.listen("b"))
                    await asyncio.gather(each.do("close", "a"), each.do("close", "b"))
            ports = {await each.listen("a") for each in workers}
            assert len(ports) == 1
            assert len(listeners(ports.pop())) == 1
            await end(cluster, told, *workers)

    scene.run(main())


@POLICIES
def test_A05_a_port_changes_hands(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
            one, two = await puppets(cluster, 2)
            port = await one.listen("a", free_port())
            assert (await one.refused("listen", "b", "127.0.0.1", port, {})).errno == errno.EADDRINUSE
            await one.do("close", "a")
            assert await two.listen("a", port) == port
            assert await one.listen("a", port) == port
            await both_answer(("127.0.0.1", port))

    scene.run(main())


@POLICIES
def test_A06_ipv6_only(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            workers = await puppets(cluster, 2)
            # asyncio's own meaning of the host "::".
            ports = [await each.listen("a", 0, "::") for each in workers]
            assert len(set(ports)) == 1
            with socket.create_server(("0.0.0.0", ports[0])):
                assert await asked(("::1", ports[0]), socket.AF_INET6) in ("1", "2")
            for each in workers:
                (event,) = await told.until("listening", each.worker)
                assert event.details[0][:3] == ("::", ports[0], 6)

    scene.run(main())


@POLICIES
@pytest.mark.parametrize("spelling", ["*", "::"])
def test_A07_both_families_on_one_socket(scene: Scene, policy: str, spelling: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            workers = await puppets(cluster, 2)
            ports = [await each.listen("a", 0, spelling, v6only=False) for each in workers]
            assert len(set(ports)) == 1
            assert await asked(("127.0.0.1", ports[0])) in ("1", "2")
            assert await asked(("::1", ports[0]), socket.AF_INET6) in ("1", "2")
            addresses = {(await told.until("listening", each.worker))[0].details for each in workers}
            assert addresses == {(("::", ports[0], 6, None, False),)}

    scene.run(main())


@POLICIES
def test_A08_the_backlog_is_the_largest_asked_for(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
            one, two, three = await puppets(cluster, 3)
            port = await one.listen("a", backlog=7)
            assert listeners(port) == [f"127.0.0.1:{port} 7"]
            await two.listen("a", backlog=23)
            await three.listen("a", backlog=5)
            assert listeners(port) == [f"127.0.0.1:{port} 23"]

    scene.run(main())


def test_A09_reuse_port_goes_past_the_master(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            port = await one.listen("a", 0, reuse_port=True)
            assert await two.listen("a", port, reuse_port=True) == port
            assert len(listeners(port)) == 2
            assert told.every("listening") == []
            await both_answer(("127.0.0.1", port))

    scene.run(main())


def test_A10_exclusive_free_ports_differ(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one, two = await puppets(cluster, 2)
            assert await one.do("own", "a", "127.0.0.1", 0) != await two.do("own", "a", "127.0.0.1", 0)
            assert told.every("listening") == []

    scene.run(main())


@POLICIES
def test_A11_shared_and_exclusive_ports(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
            one, two = await puppets(cluster, 2)
            shared = await one.listen("a")
            assert await two.listen("a", shared) == shared
            _, exclusive = await one.do("own", "b", "127.0.0.1", 0)
            assert (await two.refused("own", "b", "127.0.0.1", exclusive)).errno == errno.EADDRINUSE
            assert (await two.refused("listen", "b", "127.0.0.1", exclusive, {})).errno == errno.EADDRINUSE

    scene.run(main())


def test_A12_a_socket_of_the_workers_own(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            _, port = await one.do("own", "a", "127.0.0.1", 0)
            assert await asked(("127.0.0.1", port)) == "1"
            assert told.every("listening") == []

    scene.run(main())


@POLICIES
def test_A13_listening_twice_without_waiting(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            port = free_port()
            results = await asyncio.gather(one.listen("a", port), one.listen("b", port), return_exceptions=True)
            assert results.count(port) == 1
            (refusal,) = (each for each in results if isinstance(each, RefusedError))
            assert refusal.errno == errno.EADDRINUSE
            assert len(await told.until("listening", one.worker)) == 1
            await end(cluster, told, one)

    scene.run(main())


def test_A14_types_of_addresses(scene: Scene) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET) as (cluster, told):
            one = await puppet(cluster)
            await one.listen("a")
            await one.listen("b", 0, "::1")
            path = await one.do("unix", "c", str(scene.path / "s"))
            await one.do("udp", "d", "127.0.0.1", 0, {})
            await one.do("udp", "e", "::1", 0, {})
            addresses = [each.details[0] for each in await told.until("listening", one.worker, count=5)]
            assert [each.address_type for each in addresses] == [4, 6, -1, "udp4", "udp6"]
            assert addresses[2][:2] == (path, -1) == (str(scene.path / "s"), -1)
            assert all(1 <= each.port <= 65535 for each in (*addresses[:2], *addresses[3:]))
            assert all(each.fd is None for each in addresses)

    scene.run(main())


async def spellings(scene: Scene, policy: str, first: str, second: str) -> str:
    """Two workers ask for one port in two ways: "shared", or what the second was told."""
    async with scene.cluster(PUPPET, policy=policy) as (cluster, _):
        one, two = await puppets(cluster, 2)
        port = await one.listen("a", 0, first)
        try:
            await two.listen("a", port, second)
        except RefusedError as exc:
            return exc.text
        assert len(listeners(port)) == 1
        await both_answer(("127.0.0.1", port))
        return "shared"


@POLICIES
@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ("127.0.0.1", "127.0.0.1", "shared"),
        ("*", "*", "shared"),
        ("*", "0.0.0.0", "shared"),
        ("0.0.0.0", "*", "0.0.0.0"),
        ("*", "localhost", "[::]"),
        ("*", "::", "[::]"),
        ("127.0.0.1", "0.0.0.0", "127.0.0.1"),
    ],
)
def test_A15_one_endpoint_in_two_spellings(scene: Scene, policy: str, first: str, second: str, result: str) -> None:
    told = scene.run(spellings(scene, policy, first, second))
    assert told == "shared" if result == "shared" else f"this cluster listens on {result}:" in told


def test_A15_can_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, "literal-addresses")
    assert scene.run(spellings(scene, "rr", "*", "0.0.0.0")) != "shared"


@POLICIES
def test_A16_closed_before_it_listens(scene: Scene, policy: str) -> None:
    async def main() -> None:
        async with scene.cluster(PUPPET, policy=policy) as (cluster, told):
            one = await puppet(cluster)
            port = free_port()
            for _ in range(3):
                assert await one.do("give_up", "listen", "a", "127.0.0.1", port, {})
            # Behind it in the master, and in the worker.
            assert await one.listen("b", port) == port
            assert len(await told.until("listening", one.worker)) == 1
            await one.do("close", "b")
            await told.when(lambda: not listeners(port), "no listener is left")
            assert await one.do("give_up", "listen", "a", "127.0.0.1", port, {})
            await one.listen("c")
            await told.when(lambda: not listeners(port), "no listener is left")
            assert len(await told.until("listening", one.worker, count=2)) == 2

    scene.run(main())
