"""The worker's end of the hot path, driven from the other end of a real connection channel."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterserve.channel.board import Board
from clusterserve.channel.connection import MAX_ANSWERS, MasterEnd, WorkerEnd, connection_channel
from clusterserve.core.records import NO_ADDRESS, Kind, pack_answer, pack_offer, unpack_answers
from clusterserve.worker.receiver import Receiver
from tests.helpers.descriptors import room_for
from tests.helpers.loops import turns, until
from tests.helpers.waiting import DEADLINE
from tests.worker.harness import Handed, Master, Recorder, Recorders, was_real

Loop = asyncio.AbstractEventLoop

#: For "localhost", by itself, for longer than this project will live.
CERTIFICATE = Path(__file__).parent / "certificate.pem"


def respond(protocol: Recorder, data: bytes) -> None:
    protocol.transport.write(data.upper())
    protocol.transport.close()


def ready(master: Master, count: int) -> list[Handed]:
    """Connections whose requests have arrived."""
    connections = [master.connection() for _ in range(count)]
    for handed in connections:
        handed.arrive(b"question")
    return connections


# ── the acknowledgement ─────────────────────────────────────────────────────────────────────────────────────────────


class TestAcknowledgement:
    async def test_it_comes_a_turn_after_the_first_bytes_and_not_before(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        seen: list[tuple[str, bool]] = []

        async def application() -> None:
            seen.append(("first step", master.read()))
            await asyncio.Event().wait()

        tasks = []

        def question(protocol: Recorder, _: bytes) -> None:
            seen.append(("data", master.read()))
            tasks.append(loop.create_task(application()))
            loop.call_soon(lambda: seen.append(("same turn", master.read())))

        master.serve(recorders.on(data=question))
        master.deafen()
        handed = master.hand(b"question")
        await until(lambda: len(seen) == 3, "the application runs")
        await turns(1)
        assert master.read()
        assert seen == [("data", False), ("first step", False), ("same turn", False)]
        # And it waits still.
        assert handed.answers == [Kind.ACK]

    @pytest.mark.parametrize("where", ["data", "task"])
    async def test_a_handler_that_holds_the_loop_is_acknowledged_when_it_has_finished(
        self, loop: Loop, master: Master, recorders: Recorders, where: str
    ) -> None:
        acknowledged = []

        def hold() -> None:
            end = time.monotonic() + 0.05
            while time.monotonic() < end:
                acknowledged.append(master.read())

        async def application() -> None:
            hold()

        tasks = []

        def question(protocol: Recorder, _: bytes) -> None:
            if where == "data":
                hold()
            else:
                tasks.append(loop.create_task(application()))

        master.serve(recorders.on(data=question))
        handed = master.hand(b"question")
        await master.answered(handed)
        assert acknowledged
        assert not any(acknowledged)

    async def test_a_request_that_is_not_complete_does_not_hold_it(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        master.serve(recorders)
        handed = master.hand(b"q")
        await master.answered(handed)
        assert handed.answers == [Kind.ACK]

    async def test_the_whole_life_of_a_short_request_is_one_answer(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        master.serve(recorders.on(data=respond))
        connections = ready(master, 3)
        master.offer(*connections)
        await master.answered(*connections)
        assert [(answer.id, answer.kind) for answer in master.messages[0]] == [
            (id, Kind.ACK | Kind.CLOSED) for id in (1, 2, 3)
        ]

    async def test_the_end_of_a_longer_one_is_an_answer_of_its_own(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        master.serve(recorders)
        connections = ready(master, 3)
        master.offer(*connections)
        await master.answered(*connections)
        for protocol in recorders.all:
            protocol.transport.close()
        for handed in connections:
            await handed.ends()
        assert [handed.answers for handed in connections] == [[Kind.ACK, Kind.CLOSED]] * 3

    async def test_some_stay_and_some_do_not(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        def sometimes(protocol: Recorder, data: bytes) -> None:
            if data == b"short":
                respond(protocol, data)

        master.serve(recorders.on(data=sometimes))
        connections = [master.connection() for _ in range(4)]
        for number, handed in enumerate(connections):
            handed.arrive(b"short" if number % 2 else b"long")
        master.offer(*connections)
        await master.answered(*connections)
        long, short = Kind.ACK, Kind.ACK | Kind.CLOSED
        assert [answer.kind for answer in master.messages[0]] == [long, short, long, short]
        assert sorted(master.receiver.kept) == [1, 3]

    async def test_without_a_first_word_it_comes_a_turn_after_the_connection_is_made(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """Each behind the first step of its own protocol's tasks, also if several are made in one turn."""
        acknowledged: dict[int, list[bool]] = {}

        async def application(number: int) -> None:
            while master.read():
                pass
            acknowledged[number] = [handed.acked for handed in connections]

        tasks = []

        def greet(protocol: Recorder) -> None:
            tasks.append(loop.create_task(application(recorders.all.index(protocol))))

        master.serve(recorders.on(made=greet), first=False)
        connections = [master.connection() for _ in range(3)]
        master.offer(*connections)
        await master.answered(*connections)
        assert [acknowledged[number][number] for number in range(3)] == [False, False, False]
        assert [handed.answers for handed in connections] == [[Kind.ACK | Kind.TAKEN]] * 3

    async def test_made_and_over_at_once(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(made=lambda protocol: protocol.transport.abort()), first=False)
        connections = [master.connection() for _ in range(3)]
        master.offer(*connections)
        for handed in connections:
            await handed.ends()
        # Never an acknowledgement behind the end.
        assert [handed.answers[-1] & Kind.CLOSED for handed in connections] == [Kind.CLOSED] * 3


class TestRefusals:
    async def test_no_such_listener(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders, key=2)
        connections = ready(master, 2)
        master.offer(*connections, listener=1)
        await master.answered(*connections)
        assert [handed.answers for handed in connections] == [[Kind.REFUSED]] * 2
        assert recorders.all == []
        # Untouched, for somebody else.
        assert [handed.unread() for handed in connections] == [len(b"question")] * 2

    async def test_a_listener_that_is_closed_since(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=respond))
        first, second = ready(master, 2)
        master.offer(first)
        await master.answered(first)
        del master.receiver.servers[1]
        master.offer(second)
        await master.answered(second)
        assert second.answers == [Kind.REFUSED]

    @pytest.mark.parametrize("room", [0, 1, 2])
    async def test_descriptors_lost_at_the_limit(
        self, loop: Loop, master: Master, recorders: Recorders, room: int
    ) -> None:
        master.serve(recorders.on(data=respond))
        connections = ready(master, 3)
        master.offer(*connections)
        with room_for(room):
            master.receiver._receive()
        await master.answered(*connections)
        served, refused = [Kind.ACK | Kind.CLOSED], [Kind.REFUSED]
        assert [handed.answers for handed in connections] == [served] * room + [refused] * (3 - room)
        assert len(recorders.all) == room
        assert [handed.unread() for handed in connections[room:]] == [len(b"question")] * (3 - room)

    async def test_one_message_for_several_listeners(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=respond), key=7)
        one, two, three = ready(master, 3)
        records = [master._record(handed, key) for handed, key in ((one, 7), (two, 8), (three, 7))]
        assert master.end.offer(records, array.array("i", [handed.copy.fileno() for handed in (one, two, three)]))
        master.offered.update({1, 2, 3})
        await master.answered(one, two, three)
        assert [handed.answers for handed in (one, two, three)] == [
            [Kind.ACK | Kind.CLOSED], [Kind.REFUSED], [Kind.ACK | Kind.CLOSED]
        ]  # fmt: skip
        assert [handed.has() for handed in (one, three)] == [b"QUESTION"] * 2


# ── one message a turn ──────────────────────────────────────────────────────────────────────────────────────────────


class TestOneMessageATurn:
    @pytest.mark.parametrize("where", ["data", "task"])
    async def test_what_is_unread_can_be_taken_back_while_the_loop_is_held(
        self, loop: Loop, master: Master, recorders: Recorders, where: str
    ) -> None:
        recalled: list[int] = []

        async def application() -> None:
            recalled.extend(master.end.recall())

        tasks = []

        def question(protocol: Recorder, _: bytes) -> None:
            if where == "data":
                recalled.extend(master.end.recall())
            else:
                tasks.append(loop.create_task(application()))

        master.serve(recorders.on(data=question))
        first, second, third = ready(master, 3)
        master.offer(first)
        master.offer(second, third)
        await master.answered(first)
        assert recalled == [2, 3]
        master.offered -= {2, 3}
        await turns(5)
        assert len(recorders.all) == 1
        assert second.answers == third.answers == []

    async def test_one_behind_the_other(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """The tasks of one message have had their first step, and it is acknowledged, before the next one is read."""
        seen: list[tuple[int, list[bool]]] = []

        async def application(protocol: Recorder) -> None:
            while master.read():
                pass
            seen.append((recorders.all.index(protocol), [handed.acked for handed in connections]))

        tasks = []
        recorders.on(data=lambda protocol, _: tasks.append(loop.create_task(application(protocol))))
        master.serve(recorders)
        connections = ready(master, 3)
        for handed in connections:
            master.offer(handed)
        await master.answered(*connections)
        assert seen == [
            (0, [False, False, False]),
            (1, [True, False, False]),
            (2, [True, True, False]),
        ]
        assert [len(message) for message in master.messages] == [1, 1, 1]

    async def test_a_batch_is_one_message(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=respond))
        connections = ready(master, 8)
        master.offer(*connections)
        await master.answered(*connections)
        assert [[answer.id for answer in message] for message in master.messages] == [[1, 2, 3, 4, 5, 6, 7, 8]]


class TestDrain:
    async def test_everything_that_was_offered_is_taken_at_once(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        master.serve(recorders.on(data=respond))
        connections = ready(master, 3)
        for handed in connections:
            master.offer(handed)
        master.receiver.drain()
        assert len(recorders.all) == 3
        assert master.end.recall() == []
        await master.answered(*connections)
        assert [handed.has() for handed in connections] == [b"QUESTION"] * 3

    async def test_nothing_was_offered(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.receiver.drain()
        await turns(3)
        assert master.messages == []

    async def test_behind_a_message_of_the_same_turn(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """From within a handler: nothing is answered twice, nothing is forgotten."""
        master.serve(recorders.on(data=lambda protocol, data: (master.receiver.drain(), respond(protocol, data))))
        connections = ready(master, 4)
        for handed in connections:
            master.offer(handed)
        await master.answered(*connections)
        assert [handed.answers for handed in connections] == [[Kind.ACK | Kind.CLOSED]] * 4


# ── answers that have to wait ───────────────────────────────────────────────────────────────────────────────────────


class TestAMasterThatDoesNotRead:
    @pytest.fixture
    def fillers(self, master: Master) -> int:
        """The channel is full of answers; how many messages there are in front."""
        master.deafen()
        count = 0
        while master.receiver._end.answer(pack_answer(Kind.ACK, 0)):
            count += 1
        return count

    def swallow(self, master: Master, count: int) -> None:
        for _ in range(count):
            assert master.end.answers() == pack_answer(Kind.ACK, 0)

    async def test_answers_are_sent_later_in_their_order(
        self, loop: Loop, master: Master, recorders: Recorders, fillers: int
    ) -> None:
        master.serve(recorders.on(data=respond))
        connections = ready(master, 5)
        for handed in connections:
            master.offer(handed)
        # Nobody else waits for the master.
        assert [await handed.reads(8) for handed in connections] == [b"QUESTION"] * 5
        await turns(5)
        self.swallow(master, fillers)
        master.listen()
        await master.answered(*connections)
        assert [answer.id for message in master.messages for answer in message] == [1, 2, 3, 4, 5]
        assert [handed.answers for handed in connections] == [[Kind.ACK | Kind.CLOSED]] * 5
        await turns(5)
        assert master.receiver.answers.blocked == []

    async def test_more_than_one_message_takes(
        self, loop: Loop, master: Master, recorders: Recorders, fillers: int
    ) -> None:
        master.serve(recorders.on(data=respond))
        connections = [master.connection("socketpair") for _ in range(150)]
        for start in range(0, 150, 30):
            for handed in connections[start : start + 30]:
                handed.arrive(b"question")
            master.offer(*connections[start : start + 30])
        await until(lambda: len(recorders.all) == 150, "all have been taken")
        await until(lambda: len(master.receiver.answers.blocked) == 150, "their answers wait")
        # Room for one message at a time.
        while fillers:
            self.swallow(master, 1)
            fillers -= 1
            await turns(1)
            if not master.receiver.answers.blocked:
                break
        self.swallow(master, fillers)
        master.listen()
        await master.answered(*connections)
        assert [answer.id for message in master.messages for answer in message] == list(range(1, 151))
        assert master.receiver.answers.blocked == []

    async def test_the_end_of_a_connection_waits_behind_its_beginning(
        self, loop: Loop, master: Master, recorders: Recorders, fillers: int
    ) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        transport = (await recorders.made()).transport
        await until(lambda: master.receiver.answers.blocked, "the acknowledgement waits")
        transport.close()
        await until(lambda: len(master.receiver.answers.blocked) == 2, "the end waits")
        self.swallow(master, fillers)
        master.listen()
        await handed.ends()
        assert handed.answers == [Kind.ACK, Kind.CLOSED]


# ── the time a turn holds the loop ──────────────────────────────────────────────────────────────────────────────────


class TestHeld:
    async def test_a_cheap_one(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """Taken at its word, when the machine lets it be cheap."""
        master.serve(recorders.on(data=respond))
        held = None
        while held is None or held > 500:
            handed = master.hand(b"question")
            await master.answered(handed)
            held = master.messages[-1][0].held
        assert held > 0

    async def test_a_sleep_counts_in_full(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=lambda protocol, _: time.sleep(0.03)))
        handed = master.hand(b"question")
        await master.answered(handed)
        assert master.messages[0][0].held >= 30_000

    async def test_work_counts_in_full(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=lambda protocol, _: work(0.03)))
        handed = master.hand(b"question")
        await master.answered(handed)
        # The kernel's account of a thread is a few milliseconds behind its clock at times.
        assert master.messages[0][0].held >= 25_000

    async def test_what_other_processes_had_of_the_processor_does_not_count(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """Two busy processes on one processor: half of the time the handler took was not its own."""
        turns_taken: list[tuple[float, float, int]] = []

        def handler(protocol: Recorder, _: bytes) -> None:
            wall, cpu, gave_up = time.perf_counter(), time.thread_time(), voluntary()
            while time.perf_counter() - wall - (time.thread_time() - cpu) < 0.03:
                work(0.01)
            turns_taken.append((time.perf_counter() - wall, time.thread_time() - cpu, voluntary() - gave_up))

        master.serve(recorders.on(data=handler))
        with one_busy_processor():
            while True:
                handed = master.hand(b"question")
                await master.answered(handed)
                took, own, gave_up = turns_taken[-1]
                if not gave_up:
                    # If it waits for something, its time counts in full: that is another test.
                    break
        held = master.messages[-1][0].held / 1e6
        assert held < took - 0.015
        assert abs(held - own) < 0.015

    async def test_it_is_shared_by_the_batch(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders.on(data=lambda protocol, _: time.sleep(0.01)))
        connections = ready(master, 4)
        master.offer(*connections)
        await master.answered(*connections)
        helds = [answer.held for answer in master.messages[0]]
        assert len(set(helds)) == 1
        assert helds[0] >= 10_000
        assert sum(helds) >= 40_000

    async def test_what_others_compute_meanwhile_does_not_count(
        self, loop: Loop, master: Master, recorders: Recorders
    ) -> None:
        """Three batches in one turn, and between them something that holds the loop and is no request of theirs."""
        master.serve(recorders.on(data=respond))
        second, third = (master.connection() for _ in range(2))
        for handed in (second, third):
            handed.arrive(b"question")
        # Some response has ended: the turn begins with what is nobody's request.
        master.receiver.begin_turn()
        master.receiver.end_batch()
        master.offer(second)
        master.receiver._readable()
        loop.call_soon(time.sleep, 0.03)
        # Found when the loop next looks, which is behind all that.
        master.offer(third)
        await master.answered(second, third)
        assert sum(answer.held for answers in master.messages for answer in answers) < 15_000

    async def test_later_answers_carry_none(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        await master.answered(handed)
        recorders.only.transport.close()
        await handed.ends()
        assert master.messages[-1][0][1:] == (Kind.CLOSED, 0)


def work(seconds: float) -> None:
    """Use the processor for so long."""
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def voluntary() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class one_busy_processor:  # noqa: N801 - a context manager reads as one
    """This thread shares a processor with a process that never rests."""

    def __enter__(self) -> None:
        self._before = os.sched_getaffinity(0)
        cpu = min(self._before)
        os.sched_setaffinity(0, {cpu})
        code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); print(flush=True)\nwhile True: pass"
        self._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=DEADLINE)
        os.sched_setaffinity(0, self._before)


# ── the ones that stay ──────────────────────────────────────────────────────────────────────────────────────────────


class TestCut:
    async def test_what_is_open_is_cut(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        connections = ready(master, 3)
        master.offer(*connections)
        await until(lambda: len(master.receiver.kept) == 3, "they stay")
        await until(lambda: all(was_real(protocol.transport) for protocol in recorders.all), "the loop has them")
        master.receiver.cut()
        for handed in connections:
            assert await handed.rest() == b""
        assert master.receiver.kept == {}
        assert [protocol.lost for protocol in recorders.all] == [[None]] * 3

    async def test_what_the_loop_does_not_have_yet(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        master.serve(recorders)
        handed = master.hand(b"question")
        await until(lambda: master.receiver.kept, "it stays")
        assert not was_real(recorders.only.transport)
        master.receiver.cut()
        assert await handed.rest() == b""
        assert recorders.only.lost == [None]

    @pytest.mark.parametrize("first", [True, False])
    async def test_what_was_taken_in_this_very_turn(
        self, loop: Loop, master: Master, recorders: Recorders, first: bool
    ) -> None:
        """A quick end: drain, then cut."""
        master.serve(recorders, first=first)
        connections = ready(master, 2)
        for handed in connections:
            master.offer(handed)
        master.receiver.drain()
        master.receiver.cut()
        for handed in connections:
            await handed.ends()
        assert [protocol.lost for protocol in recorders.all] == [[None]] * 2

    async def test_nothing_is_open(self, loop: Loop, master: Master) -> None:
        master.receiver.cut()


# ── the end of the channel ──────────────────────────────────────────────────────────────────────────────────────────


class Alone:
    """A receiver and the bare other end of its channel."""

    def __init__(self, loop: Loop) -> None:
        self.master: MasterEnd
        self.master, self.theirs = connection_channel()
        self.lost = 0
        self.heard: list[int] = []
        self.receiver = Receiver(loop, WorkerEnd(self.theirs.dup()), Board.create(), self._lost)

    def _lost(self) -> None:
        self.lost += 1

    def answers(self) -> list[int]:
        """The connections that the next message answers for."""
        data = self.master.answers()
        ids = [answer[5] for answer in unpack_answers(data)] if data else []
        self.heard += ids
        return ids

    def leave(self) -> None:
        self.theirs.close()
        self.master.close()


@pytest.fixture
def alone(loop: Loop) -> Iterator[Alone]:
    alone = Alone(loop)
    yield alone
    alone.receiver.close()
    alone.leave()


class TestTheEnd:
    @pytest.mark.parametrize("unread", [False, True], ids=["the end", "a reset"])
    async def test_the_master_is_gone(self, loop: Loop, alone: Alone, unread: bool) -> None:
        if unread:
            alone.receiver._end.answer(pack_answer(Kind.ACK, 1))
        alone.leave()
        await until(lambda: alone.lost, "it is noticed")
        await turns(5)
        assert alone.lost == 1

    async def test_answers_go_nowhere_then(self, loop: Loop, alone: Alone) -> None:
        alone.leave()
        alone.receiver.ended(1)
        await until(lambda: alone.lost, "it is noticed")
        assert alone.receiver.answers.blocked == []

    @pytest.mark.parametrize(
        "message",
        [
            pytest.param(b"x", id="a byte"),
            pytest.param(b"\1" + pack_offer(1, 1, 0, NO_ADDRESS, b"", 0)[1:], id="another version"),
            pytest.param(pack_offer(1, 1, 0, NO_ADDRESS, b"", 0)[:-1], id="cut"),
        ],
    )
    async def test_a_master_that_speaks_another_version_is_none(self, loop: Loop, alone: Alone, message: bytes) -> None:
        reader, writer = os.pipe()
        # The fixture finds the descriptors if they are not closed.
        assert alone.master.offer([message], array.array("i", [reader, writer]))
        os.close(reader)
        os.close(writer)
        await until(lambda: alone.lost, "it is noticed")
        await turns(5)
        assert alone.lost == 1

    async def test_more_connections_end_in_one_turn_than_a_message_has_room_for(self, loop: Loop, alone: Alone) -> None:
        ended = range(3 * MAX_ANSWERS + 1)
        for id in ended:
            alone.receiver.ended(id)
        await turns(2)
        assert [len(alone.answers()) for _ in range(5)] == [MAX_ANSWERS] * 3 + [1, 0]
        assert alone.heard == list(ended)

    async def test_more_of_them_than_the_channel_has_room_for(self, loop: Loop, alone: Alone) -> None:
        ended = range(100 * MAX_ANSWERS)
        for id in ended:
            alone.receiver.ended(id)
        await until(lambda: alone.receiver.answers.blocked, "some have to wait")
        left = len(alone.receiver.answers.blocked)
        for _ in range(40):
            # In portions: not everything fits at the second try either.
            alone.answers()
        await until(lambda: len(alone.receiver.answers.blocked) < left, "more are sent")
        assert alone.receiver.answers.blocked
        await until(lambda: alone.answers() and alone.heard[-1] == ended[-1], "the last has come")
        assert alone.heard == list(ended)

    async def test_close(self, loop: Loop, master: Master, recorders: Recorders) -> None:
        """Connections go on without their channel."""
        alone = Alone(loop)
        alone.receiver.close()
        assert alone.receiver._end.fileno() == -1
        alone.leave()
        await turns(3)
        assert alone.lost == 0


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TestTLS:
    """A server with a context of its own: the loop's TLS transport, over the descriptor that was handed over."""

    @pytest.fixture
    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        return context

    @pytest.fixture
    def client_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(CERTIFICATE))

    async def test_a_request(
        self,
        loop: Loop,
        master: Master,
        recorders: Recorders,
        server_context: ssl.SSLContext,
        client_context: ssl.SSLContext,
    ) -> None:
        master.serve(recorders.on(data=respond), first=False, ssl=server_context)
        handed = master.hand()
        reader, writer = await asyncio.open_connection(
            sock=handed.client, ssl=client_context, server_hostname="localhost"
        )
        writer.write(b"question")
        assert await reader.read() == b"QUESTION"
        writer.close()
        await writer.wait_closed()
        await handed.ends()
        assert recorders.only.lost == [None]
        assert recorders.only.transport.get_extra_info("sslcontext") is server_context
        assert handed.answers == [Kind.ACK, Kind.TAKEN, Kind.CLOSED]

    async def test_a_client_that_dribbles_does_not_hold_the_acknowledgement(
        self, loop: Loop, master: Master, recorders: Recorders, server_context: ssl.SSLContext
    ) -> None:
        master.serve(recorders, first=False, ssl=server_context)
        handed = master.hand()
        await master.answered(handed)
        assert handed.answers == [Kind.ACK]
        assert recorders.all[0].calls == []
        handed.client.close()
        await handed.ends()
        # It never had a connection to lose.
        assert recorders.only.calls == []

    async def test_a_handshake_that_fails(
        self, loop: Loop, master: Master, recorders: Recorders, server_context: ssl.SSLContext
    ) -> None:
        master.serve(recorders, first=False, ssl=server_context)
        handed = master.hand(b"GET / HTTP/1.1\r\n\r\n")
        await handed.ends()
        assert recorders.only.calls == []

    async def test_a_handshake_that_takes_too_long(
        self, loop: Loop, master: Master, recorders: Recorders, server_context: ssl.SSLContext
    ) -> None:
        master.serve(recorders, first=False, ssl=server_context, ssl_handshake_timeout=0.05)
        handed = master.hand()
        await handed.ends()
        assert handed.answers == [Kind.ACK, Kind.CLOSED]
        assert recorders.only.calls == []

    async def test_a_client_of_ours_that_says_nothing_goes_back(
        self, loop: Loop, master: Master, recorders: Recorders, server_context: ssl.SSLContext
    ) -> None:
        master.receiver.borrow(None, keep=True, head_timeout=0)
        master.serve(recorders, ssl=server_context)
        handed = master.hand()
        await master.answered(handed)
        assert handed.answers == [Kind.ACK | Kind.SILENT]
        assert not recorders.all

    async def test_a_connection_of_ours_is_taken_when_its_handshake_is_done(
        self,
        loop: Loop,
        master: Master,
        recorders: Recorders,
        server_context: ssl.SSLContext,
        client_context: ssl.SSLContext,
    ) -> None:
        master.receiver.borrow(None, keep=True, head_timeout=0)
        master.serve(recorders.on(data=respond), ssl=server_context)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        handed = master.hand(outgoing.read())
        await master.answered(handed)
        assert handed.answers == [Kind.ACK]
        handed.client.setblocking(False)
        waiting = loop.create_task(master.receiver.handshakes_done(60.0))
        incoming.write(await loop.sock_recv(handed.client, 65536))
        client.do_handshake()
        assert not waiting.done()
        client.write(b"question")
        await loop.sock_sendall(handed.client, outgoing.read())
        await waiting
        await handed.ends()
        assert handed.answers in (
            [Kind.ACK, Kind.TAKEN, Kind.CLOSED],
            # Over before the master had heard of it.
            [Kind.ACK, Kind.CLOSED],
        )
        assert recorders.only.data == b"question"
        await master.receiver.handshakes_done(60.0)

    async def test_the_end_of_a_client_that_does_not_confirm_it(
        self,
        loop: Loop,
        master: Master,
        recorders: Recorders,
        server_context: ssl.SSLContext,
        client_context: ssl.SSLContext,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("clusterserve.worker.real.FAREWELL", 0.01)
        master.serve(recorders.on(data=respond), first=False, ssl=server_context)
        handed = master.hand()
        handed.client.setblocking(True)

        def ask() -> tuple[ssl.SSLSocket, bytes]:
            client = client_context.wrap_socket(handed.client.dup(), server_hostname="localhost")
            client.sendall(b"question")
            return client, client.recv(8)

        client, said = await loop.run_in_executor(None, ask)
        with client:
            await handed.ends()
            assert said == b"QUESTION"
        # Not by the loop's patience, which has an end as well.
        (error,) = recorders.only.lost
        assert not isinstance(error, TimeoutError | asyncio.TimeoutError)

    async def test_handshakes_are_not_waited_for_without_end(
        self, loop: Loop, master: Master, recorders: Recorders, server_context: ssl.SSLContext
    ) -> None:
        master.serve(recorders, first=False, ssl=server_context)
        handed = master.hand()
        await master.answered(handed)
        await master.receiver.handshakes_done(0.01)
        await master.receiver.handshakes_done(0.0)


# ── a loop that is closing ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("later", range(3))
async def test_connections_on_their_way_when_the_loop_is_closed(
    loop: Loop, master: Master, recorders: Recorders, later: int
) -> None:
    """`asyncio.run` cancels what is left; the descriptors are let go all the same."""
    master.serve(recorders, first=False)
    handed = master.hand()
    before = asyncio.all_tasks()
    master.receiver.drain()
    (connecting,) = asyncio.all_tasks() - before
    await turns(later)
    connecting.cancel()
    master.receiver.cut()
    await handed.ends()
    assert recorders.only.calls in ([], ["made", "lost"])
