"""`tierline ledger` says whether every event has a known end, to people and to programs."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from cloud_hub.ledger_cli import ledger
from sync.outbox import Outbox
from sync.testing import FakeClock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    async def fill() -> None:
        async with Outbox(tmp_path / "outbox.db", clock=FakeClock()) as outbox:
            for number in range(3):
                await outbox.put(f"app.{number % 2}", b"{}")

    asyncio.run(fill())
    return tmp_path


def test_a_ledger_that_balances_is_shown_and_is_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["STREAM", "ENQUEUED", "DELIVERED", "EXPIRED", "DROPPED", "PENDING"],
        ["app.0", "2", "0", "0", "0", "2"],
        ["app.1", "1", "0", "0", "0", "1"],
        ["all", "3", "0", "0", "0", "3"],
        ["BALANCED"],
    ]


def test_an_event_that_vanished_is_named_and_is_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db = sqlite3.connect(folder / "outbox.db")
    db.execute("DELETE FROM events WHERE kind = 'app.1'")
    db.commit()
    db.close()
    assert ledger([str(folder / "outbox.db")]) == 1
    assert "NOT BALANCED: app.1: 1 events without a known end" in capsys.readouterr().out
    assert ledger([str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["imbalance"] == {"app.1": 1}


@pytest.mark.parametrize("arguments", [[], ["x", "--hub", "http://127.0.0.1:1"], ["/nowhere/at/all"]])
def test_wrong_usage_is_2_and_says_what_is_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger(arguments) == 2
    assert "tierline ledger: " in capsys.readouterr().err


def test_a_file_that_is_no_database_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outbox.db").write_bytes(b"not a database" * 100)
    assert ledger([str(tmp_path)]) == 2
    assert "tierline ledger: " in capsys.readouterr().err
