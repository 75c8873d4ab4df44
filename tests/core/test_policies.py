"""The built-in policies, with workers that are nothing but what a policy may see of one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterserve.core.policies import NAMES, TURN, Candidate, Hash, Least, Policy, RoundRobin, Waiting, make_policy


@dataclass
class FakeWorker:
    id: int
    slot: int
    ready: bool = True
    full: bool = False
    load: int = 0


@dataclass(frozen=True)
class FakeConnection:
    id: int = 1
    client: bytes = b""


SOMEONE = FakeConnection()


def workers_of(policy: Policy, count: int) -> list[FakeWorker]:
    workers = [FakeWorker(number + 1, number) for number in range(count)]
    for worker in workers:
        policy.add(worker)
    return workers


def picks(policy: Policy, count: int, now: float = 0.0) -> list[int | None]:
    chosen = [policy.pick(SOMEONE, now) for _ in range(count)]
    return [None if worker is None else worker.id for worker in chosen]


def client(number: int) -> bytes:
    return IPv6Address(f"::ffff:10.0.{number >> 8}.{number & 255}").packed


CLIENTS = [client(number) for number in range(4000)]


class TestRoundRobin:
    def test_strict_rotation(self) -> None:
        policy = RoundRobin()
        workers_of(policy, 3)
        assert picks(policy, 7) == [1, 2, 3, 1, 2, 3, 1]

    def test_nobody_is_there(self) -> None:
        assert picks(RoundRobin(), 1) == [None]

    def test_a_worker_that_is_not_ready_is_passed_over_and_keeps_its_turn(self) -> None:
        policy = RoundRobin()
        workers = workers_of(policy, 3)
        workers[0].ready = False
        assert picks(policy, 3) == [2, 3, 2]
        workers[0].ready = True
        assert picks(policy, 3) == [1, 3, 2]

    def test_a_new_worker_goes_to_the_end_of_the_round(self) -> None:
        policy = RoundRobin()
        workers_of(policy, 2)
        assert picks(policy, 1) == [1]
        policy.add(FakeWorker(3, 2))
        assert picks(policy, 4) == [2, 1, 3, 2]

    def test_a_worker_that_is_removed_is_never_chosen_again_and_may_be_removed_twice(self) -> None:
        policy = RoundRobin()
        workers = workers_of(policy, 2)
        policy.remove(workers[0])
        policy.remove(workers[0])
        assert picks(policy, 2) == [2, 2]

    @given(st.integers(1, 9), st.lists(st.integers(1, 40), max_size=10))
    @settings(deadline=None, max_examples=50)
    def test_shares_differ_by_at_most_one_at_every_moment(self, count: int, bursts: list[int]) -> None:
        policy = RoundRobin()
        shares = dict.fromkeys((worker.id for worker in workers_of(policy, count)), 0)
        for burst in bursts:
            for chosen in picks(policy, burst):
                assert chosen is not None
                shares[chosen] += 1
                assert max(shares.values()) - min(shares.values()) <= 1


class TestPatience:
    def test_ten_milliseconds_in_a_cluster_that_keeps_connections(self) -> None:
        assert TURN == 0.010

    def test_nobody_waits_for_one_whose_threads_are_all_occupied(self) -> None:
        policy = RoundRobin(patience=TURN)
        first, second = workers_of(policy, 2)
        first.ready, first.full = False, True
        assert policy.pick(SOMEONE, 1.0) is second
        # Nor was it late: its turn is still its own.
        first.ready, first.full = True, False
        assert policy.pick(SOMEONE, 1.0) is first

    def test_it_waits_for_the_worker_whose_turn_it_is(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 3)
        workers[0].ready = False
        assert picks(policy, 1, now=5.0) == [None]
        assert policy.wake_at == 5.0 + TURN
        # Asking again does not start the wait again.
        assert picks(policy, 1, now=5.004) == [None]
        assert policy.wake_at == 5.0 + TURN
        workers[0].ready = True
        assert picks(policy, 1, now=5.005) == [1]
        assert policy.wake_at is None

    def test_after_that_the_next_ready_one_gets_it_and_the_late_one_costs_no_second_wait(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 3)
        workers[0].ready = False
        assert picks(policy, 1, now=5.0) == [None]
        assert picks(policy, 5, now=5.0 + TURN) == [2, 3, 2, 3, 2]
        assert policy.wake_at is None

    def test_a_late_worker_is_next_as_soon_as_it_is_ready_and_is_then_waited_for_again(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 2)
        workers[0].ready = False
        picks(policy, 1, now=5.0)
        assert picks(policy, 1, now=5.0 + TURN) == [2]
        workers[0].ready = True
        assert picks(policy, 2, now=6.0) == [1, 2]
        workers[0].ready = False
        assert picks(policy, 1, now=7.0) == [None]
        assert policy.wake_at == 7.0 + TURN

    def test_one_wait_covers_all_who_are_passed_over_together(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 4)
        workers[0].ready = workers[1].ready = False
        assert picks(policy, 1, now=1.0) == [None]
        assert picks(policy, 4, now=1.0 + TURN) == [3, 4, 3, 4]

    def test_each_late_comer_is_waited_for_by_itself(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 3)
        workers[0].ready = False
        picks(policy, 1, now=1.0)
        assert picks(policy, 2, now=1.0 + TURN) == [2, 3]
        workers[1].ready = False
        assert picks(policy, 1, now=2.0) == [None]
        assert picks(policy, 1, now=2.0 + TURN) == [3]

    def test_with_nobody_ready_there_is_no_turn_to_wait_for(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 2)
        workers[0].ready = False
        assert picks(policy, 1, now=1.0) == [None]
        workers[1].ready = False
        assert picks(policy, 1, now=1.001) == [None]
        assert policy.wake_at is None

    def test_a_removed_worker_is_not_waited_for(self) -> None:
        policy = RoundRobin(patience=TURN)
        workers = workers_of(policy, 2)
        workers[0].ready = False
        assert picks(policy, 1, now=1.0) == [None]
        policy.remove(workers[0])
        assert picks(policy, 1, now=1.001) == [2]


class TestLeast:
    def test_the_fewest_connections_win(self) -> None:
        policy = Least()
        for worker, load in zip(workers_of(policy, 3), (4, 2, 3), strict=True):
            worker.load = load
        assert picks(policy, 2) == [2, 2]

    def test_ties_go_round(self) -> None:
        policy = Least()
        workers_of(policy, 3)
        assert picks(policy, 6) == [1, 2, 3, 1, 2, 3]

    def test_ties_go_round_among_the_least_only(self) -> None:
        policy = Least()
        workers_of(policy, 3)[1].load = 1
        assert picks(policy, 4) == [1, 3, 1, 3]

    def test_only_ready_ones_count(self) -> None:
        policy = Least()
        workers = workers_of(policy, 2)
        workers[0].ready, workers[1].load = False, 50
        assert picks(policy, 1) == [2]
        workers[1].ready = False
        assert picks(policy, 1) == [None]

    def test_a_worker_that_is_removed_is_never_chosen_again_and_may_be_removed_twice(self) -> None:
        policy = Least()
        workers = workers_of(policy, 2)
        policy.remove(workers[0])
        policy.remove(workers[0])
        assert picks(policy, 2) == [2, 2]


class TestHash:
    def test_a_client_always_meets_the_same_slot(self) -> None:
        policy = Hash(4)
        workers_of(policy, 4)
        for address in CLIENTS[:50]:
            slot = policy.lane(FakeConnection(client=address))
            chosen = {policy.pick(FakeConnection(id=number, client=address), 0.0) is None for number in range(3)}
            assert chosen == {False}
            worker = policy.pick(FakeConnection(client=address), 0.0)
            assert worker is not None
            assert worker.slot == slot

    def test_all_slots_get_their_share(self) -> None:
        shares = Counter(Hash(8).lane(FakeConnection(client=address)) for address in CLIENTS)
        assert sorted(shares) == list(range(8))
        # 500 each, give or take five standard deviations of a fair draw.
        assert all(abs(share - 500) < 5 * 21 for share in shares.values())

    def test_one_slot_more_moves_one_client_in_n_and_only_to_that_slot(self) -> None:
        before, after = Hash(8), Hash(8)
        after.resize(9)
        moves = [
            (old, new)
            for old, new in (
                (before.lane(FakeConnection(client=address)), after.lane(FakeConnection(client=address)))
                for address in CLIENTS
            )
            if old != new
        ]
        assert {new for _, new in moves} == {8}
        # A ninth of 4000, give or take five standard deviations.
        assert abs(len(moves) - 444) < 5 * 20

    @given(st.binary(min_size=16, max_size=16), st.lists(st.integers(1, 40), min_size=2, max_size=6))
    @settings(deadline=None, max_examples=50)
    def test_a_client_only_ever_moves_to_a_new_slot_or_off_a_lost_one(self, address: bytes, sizes: list[int]) -> None:
        policy = Hash()
        slots = []
        for size in sizes:
            policy.resize(size)
            slots.append(policy.lane(FakeConnection(client=address)))
        for (size, slot), (new_size, new_slot) in pairwise(zip(sizes, slots, strict=True)):
            assert new_slot == slot or new_slot >= size or slot >= new_size

    def test_both_spellings_of_an_ipv4_client_meet_the_same_slot(self) -> None:
        policy = Hash(64)
        for text in ("192.0.2.1", "10.0.0.7", "203.0.113.250"):
            # What the master makes of a dual-stack listener's address, and of an IPv4 listener's.
            mapped = IPv6Address(f"::ffff:{text}").packed
            plain = bytes(10) + b"\xff\xff" + IPv4Address(text).packed
            assert policy.lane(FakeConnection(client=mapped)) == policy.lane(FakeConnection(client=plain))

    def test_clients_without_an_address_take_turns(self) -> None:
        policy = Hash(3)
        workers = workers_of(policy, 3)
        assert policy.lane(SOMEONE) == -1
        assert picks(policy, 4) == [1, 2, 3, 1]
        workers[1].ready = False
        assert picks(policy, 2) == [3, 1]

    def test_it_waits_for_the_worker_of_its_slot(self) -> None:
        policy = Hash(2)
        workers = workers_of(policy, 2)
        address = next(address for address in CLIENTS if policy.lane(FakeConnection(client=address)) == 1)
        connection = FakeConnection(client=address)
        assert policy.pick(connection, 0.0) is workers[1]
        workers[1].ready = False
        assert policy.pick(connection, 0.0) is None
        policy.remove(workers[1])
        assert policy.pick(connection, 0.0) is None

    def test_a_replacement_takes_the_slot_over_before_its_predecessor_leaves(self) -> None:
        policy = Hash(1)
        (old,) = workers_of(policy, 1)
        new = FakeWorker(2, 0)
        connection = FakeConnection(client=CLIENTS[0])
        policy.add(new)
        assert policy.pick(connection, 0.0) is new
        policy.remove(old)
        assert policy.pick(connection, 0.0) is new

    def test_a_replacement_that_fails_gives_the_slot_back(self) -> None:
        policy = Hash(1)
        (old,) = workers_of(policy, 1)
        new = FakeWorker(2, 0)
        policy.add(new)
        policy.remove(new)
        assert policy.pick(FakeConnection(client=CLIENTS[0]), 0.0) is old

    def test_removing_twice_does_no_harm(self) -> None:
        policy = Hash(1)
        (worker,) = workers_of(policy, 1)
        policy.remove(worker)
        policy.remove(worker)
        assert policy.pick(FakeConnection(client=CLIENTS[0]), 0.0) is None


class TestTheProtocol:
    @pytest.mark.parametrize("policy", [RoundRobin(), RoundRobin(TURN), Least(), Hash()])
    def test_the_built_in_ones_satisfy_it(self, policy: Policy) -> None:
        assert isinstance(policy, Policy)

    def test_any_class_with_its_three_methods_does(self) -> None:
        class First:
            def add(self, worker: Candidate) -> None:
                """Nothing to remember."""

            def remove(self, worker: Candidate) -> None:
                """Nothing to forget."""

            def pick(self, connection: Waiting, now: float) -> Candidate | None:
                return None

        assert isinstance(First(), Policy)

    def test_a_class_without_one_of_them_does_not(self) -> None:
        class Half:
            def add(self, worker: Candidate) -> None:
                """Nothing to remember."""

            def pick(self, connection: Waiting, now: float) -> Candidate | None:
                return None

        assert not isinstance(Half(), Policy)


class TestMakePolicy:
    def test_by_name(self) -> None:
        rr = make_policy("rr", slots=3, patience=TURN)
        assert isinstance(rr, RoundRobin)
        assert rr.patience == TURN
        assert isinstance(make_policy("least", slots=3), Least)
        by_hash = make_policy("hash", slots=3)
        assert isinstance(by_hash, Hash)
        assert by_hash.slots == 3

    def test_each_listener_has_its_own(self) -> None:
        assert all(make_policy(name, slots=1) is not make_policy(name, slots=1) for name in NAMES if name != "none")

    @pytest.mark.parametrize("name", ["none", "", "RR", "random"])
    def test_others_are_none_of_its_business(self, name: str) -> None:
        with pytest.raises(KeyError, match=f"^'{name}'$"):
            make_policy(name, slots=1)
