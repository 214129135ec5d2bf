"""The SQLite store keeps the contract, and what it accepted outlives it."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from job_store_contract import ANSWER, CHECKS, LIMITS, NOW, added, taken

from models.errors import NotReady, Overloaded
from models.serving.jobs import sqlite as module
from models.serving.jobs.sqlite import SqliteJobs


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteJobs]:
    made = SqliteJobs(tmp_path / "jobs.db")
    yield made
    await made.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_contract(store: SqliteJobs, name: str) -> None:
    await CHECKS[name](store)


async def test_what_was_accepted_and_answered_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    first = SqliteJobs(path)
    waiting, ended = await added(first), await added(first)
    await taken(first)
    await first.release(waiting.id, "a", NOW, NOW + 1)
    await taken(first)
    await first.finish(ended.id, "a", NOW, ANSWER, LIMITS)
    await first.close()
    second = SqliteJobs(path)
    assert await second.answer(ended.id) == ANSWER
    claimed = await second.claim("b", NOW + 1, 15.0)
    assert claimed is not None
    assert claimed[0].id == waiting.id
    await second.close()


async def test_every_commit_waits_for_the_disk(store: SqliteJobs) -> None:
    settings = await store._run(
        lambda db: [
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    )
    assert settings == ["wal", 2, 1]


async def test_nothing_of_it_runs_in_the_event_loop(store: SqliteJobs) -> None:
    assert await store._run(lambda db: threading.get_ident()) != threading.get_ident()


async def test_its_file_is_its_owners_alone(store: SqliteJobs, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "jobs.db").stat().st_mode) == 0o600


async def test_calls_that_wait_are_bounded(store: SqliteJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 1)
    go = threading.Event()
    slow = asyncio.create_task(store._run(lambda db: go.wait(5)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await store.find([])
    go.set()
    await slow
    assert await store.find([]) == []


async def test_a_store_that_cannot_work_says_so_in_our_words(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"missing.*jobs\.db"):
        SqliteJobs(tmp_path / "missing" / "jobs.db")
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database" * 1000)
    with pytest.raises(NotReady):
        SqliteJobs(garbage)
    closed = SqliteJobs(tmp_path / "jobs.db")
    await closed.close()
    with pytest.raises(NotReady):
        await closed.find(["x"])
