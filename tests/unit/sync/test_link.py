"""A link outlives what its environment refuses it for a while."""

from __future__ import annotations

import asyncio

import pytest

from sync import connection, link
from sync.channel import LinkOptions


async def test_a_thread_that_could_not_be_started_does_not_end_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def refuse(client: object) -> None:
        attempts.append(len(attempts))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(connection.Client, "loop_start", refuse)
    monkeypatch.setattr(link, "reconnect_delay", lambda *args: 0.0)
    async with link.Link(LinkOptions(url="mqtt://127.0.0.1:1", client_id="acme.edge-1")), asyncio.timeout(2):
        while len(attempts) < 3:
            await asyncio.sleep(0)


@pytest.mark.parametrize(("steady", "expected"), [(10.0, [1, 2, 3, 4, 5, 5, 5, 5]), (0.0, [1] * 8)])
async def test_connections_that_are_taken_away_at_once_are_made_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, steady: float, expected: list[int]
) -> None:
    """Two machines that show one certificate evict each other."""
    attempts: list[int] = []

    async def taken(self: link.Link) -> tuple[bool, str]:
        return True, "session taken over"

    def delay(attempt: int, *rest: object) -> float:
        attempts.append(attempt)
        return 0.0

    monkeypatch.setattr(link, "STEADY_SECONDS", steady)
    monkeypatch.setattr(link.Link, "_connect_once", taken)
    monkeypatch.setattr(link, "reconnect_delay", delay)
    async with link.Link(LinkOptions(url="mqtt://127.0.0.1:1", client_id="acme.edge-1")):
        while len(attempts) < 8:
            await asyncio.sleep(0)
    assert attempts[:8] == expected
