"""The fakes behave like what they stand for."""

from __future__ import annotations

import asyncio

import pytest

from sync.channel import Message
from sync.testing import FakeClock, MemoryBroker, MemoryLink, matches


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("+/b", "a/b", True),
        ("#", "a", True),
        ("a/b", "a", False),
        ("a", "a/b", False),
    ],
)
def test_filters_match_as_mqtt_says(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


async def test_a_memory_link_gets_retained_messages_first_and_what_it_sent_offline_later() -> None:
    broker = MemoryBroker()
    broker.publish("s", b"1", retain=True)
    async with MemoryLink(broker) as link:
        link.subscribe("s", "t")
        inbox = link.messages()
        assert await anext(inbox) == Message("s", b"1", True)
        link.drop()
        link.publish("t", b"2", retain=True)
        assert "t" not in broker.retained
        link.heal()
        assert {(await anext(inbox)).topic for _ in range(2)} == {"s", "t"}
    assert [message async for message in link.messages()] == []


async def test_a_fake_clock_wakes_who_is_due() -> None:
    clock, woken = FakeClock(), []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (3, 1, 2)]
    while clock.sleepers < 3:
        await asyncio.sleep(0)
    clock.advance(2)
    while clock.sleepers or len(woken) < 2:
        if len(woken) == 2:
            break
        await asyncio.sleep(0)
    assert sorted(woken) == [1, 2]
    clock.advance(1)
    await asyncio.gather(*tasks)
