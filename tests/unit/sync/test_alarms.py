"""What is wrong is told when it begins and when it ends, however long it lasts, and a judge that fails silences nobody."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sync.alarms import Alarms
from sync.outbox import Outbox
from sync.testing import FakeClock


async def bodies(outbox: Outbox) -> list[dict[str, str]]:
    return [msgspec.json.decode(event.body) for event in (await outbox.fetch(10)).events]


async def test_an_alarm_is_told_once_when_it_begins_and_once_when_it_ends(tmp_path: Path) -> None:
    trouble, changes = [""], []
    async with Outbox(tmp_path / "outbox.db", clock=FakeClock()) as outbox:
        alarms = Alarms({"repository": lambda: trouble[0]}, outbox, FakeClock(), lambda: changes.append(1))
        for text in ("", "expired", "expired for longer", ""):
            trouble[0] = text
            alarms.look()
            assert alarms.raised == ({"repository": text} if text else {})
        await outbox.put("app.last", b"{}")
        told = [(each["alarm"], each["state"]) for each in await bodies(outbox) if each]
    assert told == [("repository", "raised"), ("repository", "cleared")]
    assert len(changes) == 2


async def test_a_judge_that_fails_silences_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> str:
        raise RuntimeError("no disk")

    async with Outbox(tmp_path / "outbox.db", clock=FakeClock()) as outbox:
        alarms = Alarms({"broken": broken, "certificate": lambda: "expired"}, outbox, FakeClock())
        alarms.look()
    assert alarms.raised == {"certificate": "expired"}
    assert "could not be judged" in caplog.text
