"""Questions and answers over a broker in memory: one answer for each, bounded, and nobody answers for somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sync.channel import Message
from sync.errors import Malformed, Unavailable
from sync.messages import MAX_MESSAGE_BYTES, encode
from sync.rpc import Answer, Answerer, Asker, Call, CallRefused
from sync.testing import FakeClock, MemoryBroker, MemoryLink
from sync.topics import down, parse_up, up

NODE = "acme.edge-1"


class Site:
    """A hub and a node that listen to one another."""

    def __init__(self, hub: MemoryLink, node: MemoryLink, clock: FakeClock) -> None:
        self.clock = clock
        self.asker = Asker(hub, clock)
        self.answerer = Answerer(node, NODE, clock)
        self.hub_link = hub

    def hear_hub(self, message: Message) -> None:
        node, _ = parse_up(message.topic)
        self.asker.hear(node, message.payload)

    def hear_node(self, message: Message) -> None:
        self.answerer.hear(message.payload)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    broker, clock = MemoryBroker(), FakeClock()
    async with MemoryLink(broker) as hub, MemoryLink(broker) as node:
        site = Site(hub, node, clock)
        hub.subscribe(up(NODE, "rpc"))
        node.subscribe(down(NODE, "rpc"))

        async def pump(link: MemoryLink, hear: Callable[[Message], None]) -> None:
            async for message in link.messages():
                hear(message)

        async with site.answerer:
            tasks = [asyncio.create_task(pump(hub, site.hear_hub)), asyncio.create_task(pump(node, site.hear_node))]
            yield site
            for task in tasks:
                task.cancel()


def answering(value: object) -> Callable[[], Awaitable[object]]:
    async def answer() -> object:
        return value

    return answer


async def test_a_question_is_answered(site: Site) -> None:
    site.answerer.offer("doctor", answering({"checks": [1, 2]}))
    assert await site.asker.ask(NODE, "doctor", 10) == b'{"checks":[1,2]}'


async def test_only_what_is_on_the_list_may_be_asked_or_offered(site: Site) -> None:
    with pytest.raises(ValueError, match="may not be asked"):
        await site.asker.ask(NODE, "reboot", 10)
    with pytest.raises(ValueError, match="'reboot' is none of"):
        site.answerer.offer("reboot", answering(1))


@pytest.mark.parametrize("method", ["doctor", "reboot", "__class__"])
async def test_a_node_that_does_not_know_a_method_says_so_and_runs_nothing(site: Site, method: str) -> None:
    site.answerer.hear(encode(Call(id="c1", method=method, sent=site.clock.wall(), seconds=5)))
    answers = [message async for message in _heard(site)]
    assert answers[0].code == "unknown_method"


async def _heard(site: Site) -> AsyncIterator[Answer]:
    import msgspec

    broker = site.hub_link._broker
    for payload in broker.payloads(up(NODE, "rpc")):
        yield msgspec.json.decode(payload, type=Answer)


async def test_a_question_that_is_too_old_is_refused_and_the_clocks_are_told_of(site: Site) -> None:
    site.answerer.offer("doctor", answering(1))
    site.answerer.hear(encode(Call(id="c1", method="doctor", sent=site.clock.wall() - 3600, seconds=5)))
    answers = [answer async for answer in _heard(site)]
    assert answers[0].code == "expired"
    assert "3600 s ago" in answers[0].error


async def test_one_question_at_a_time_and_one_delivered_twice_is_answered_once(site: Site) -> None:
    gate, runs = asyncio.Event(), 0

    async def slow() -> object:
        nonlocal runs
        runs += 1
        await gate.wait()
        return "done"

    site.answerer.offer("doctor", slow)
    first = asyncio.create_task(site.asker.ask(NODE, "doctor", 10))
    for _ in range(10):
        await asyncio.sleep(0)
    again = site.hub_link._broker.payloads(down(NODE, "rpc"))[0]
    site.answerer.hear(again)
    with pytest.raises(CallRefused, match="another question") as raised:
        await site.asker.ask(NODE, "doctor", 10)
    assert raised.value.code == "busy"
    gate.set()
    assert await first == b'"done"'
    assert runs == 1


async def test_no_answer_ends_in_time(site: Site) -> None:
    asking = asyncio.create_task(site.asker.ask("acme.away", "doctor", 10))
    for _ in range(10):
        await asyncio.sleep(0)
    site.clock.advance(11)
    with pytest.raises(Unavailable, match=r"acme\.away did not answer within 10 s"):
        await asking
    assert not site.asker._waiting


async def test_nobody_answers_for_another_node(site: Site) -> None:
    gate = asyncio.Event()

    async def slow() -> object:
        await gate.wait()
        return "own"

    site.answerer.offer("doctor", slow)
    asking = asyncio.create_task(site.asker.ask(NODE, "doctor", 10))
    for _ in range(10):
        await asyncio.sleep(0)
    (_, id_), *_ = site.asker._waiting
    site.asker.hear("acme.evil", encode(Answer(id=id_)))
    gate.set()
    assert await asking == b'"own"'


async def test_an_answer_that_is_too_large_is_told_and_not_sent(site: Site) -> None:
    site.answerer.offer("doctor", answering("x" * MAX_MESSAGE_BYTES))
    with pytest.raises(CallRefused, match="bytes, at most") as raised:
        await site.asker.ask(NODE, "doctor", 10)
    assert raised.value.code == "too_large"


async def test_what_fails_on_the_node_is_told_without_its_details(site: Site) -> None:
    async def broken() -> object:
        raise RuntimeError("a secret path")

    site.answerer.offer("doctor", broken)
    with pytest.raises(CallRefused, match="RuntimeError on the node: see its log") as raised:
        await site.asker.ask(NODE, "doctor", 10)
    assert "secret" not in str(raised.value)


async def test_a_hub_without_its_broker_says_so_at_once(site: Site) -> None:
    site.hub_link.drop()
    with pytest.raises(Unavailable, match="not connected"):
        await site.asker.ask(NODE, "doctor", 10)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b'{"id":"","method":"doctor","sent":0,"seconds":5}',
        b'{"id":"a","method":"doctor","sent":0,"seconds":1e9}',
        b"{" * 5000,
    ],
)
async def test_what_is_no_question_is_refused(site: Site, payload: bytes) -> None:
    with pytest.raises(Malformed):
        site.answerer.hear(payload)
