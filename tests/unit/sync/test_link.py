"""A link outlives what its environment refuses it for a while."""

from __future__ import annotations

import asyncio

import pytest

from sync import link
from sync.channel import LinkOptions


async def test_a_thread_that_could_not_be_started_does_not_end_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def refuse(client: object) -> None:
        attempts.append(len(attempts))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(link._Client, "loop_start", refuse)
    monkeypatch.setattr(link, "reconnect_delay", lambda *args: 0.0)
    async with link.Link(LinkOptions(url="mqtt://127.0.0.1:1", client_id="acme.edge-1")), asyncio.timeout(2):
        while len(attempts) < 3:
            await asyncio.sleep(0)
