"""The SQLite store keeps the contract, and what it accepted outlives it."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from job_store_contract import ANSWER, CHECKS, LIMITS, NOW, a_job, added, taken

from models.errors import NotReady, Overloaded
from models.serving.jobs import lane as module
from models.serving.jobs.job import Owner
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
        await store.claim("a", NOW, 1.0)
    go.set()
    await slow
    assert await store.claim("a", NOW, 1.0) is None


async def test_reading_does_not_wait_for_who_writes(store: SqliteJobs) -> None:
    job = await added(store)
    go = threading.Event()
    slow = asyncio.create_task(store._run(lambda db: go.wait(5)))
    assert await store.find([job.id]) == [job]
    assert not slow.done()
    go.set()
    await slow


async def test_reading_cannot_write(store: SqliteJobs) -> None:
    with pytest.raises(NotReady):
        await store._read(lambda db: db.execute("DELETE FROM jobs"))


def counted(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """What `loads` should say, from the rows."""
    held = {"": (0, 0)}
    for tenant, state, size in db.execute("SELECT tenant, state, size FROM jobs"):
        for whose in ("", "-" if tenant is None else f"={tenant}"):
            jobs, held_bytes = held.get(whose, (0, 0))
            held[whose] = jobs + (state in ("queued", "running")), held_bytes + size
    return held


def kept(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    return {whose: (jobs, size) for whose, jobs, size in db.execute("SELECT whose, jobs, bytes FROM loads")}


async def test_what_each_tenant_holds_is_kept_with_every_change(store: SqliteJobs) -> None:
    async def agrees() -> None:
        assert await store._read(kept) == await store._read(counted)

    await agrees()
    for owner in (Owner("acme", "a"), Owner("acme", "b"), Owner("-", "c"), Owner(None, None)):
        for _ in range(2):
            await added(store, a_job(owner, body=4))
    await agrees()
    first, second = await taken(store), await taken(store)
    await agrees()
    await store.finish(first.id, "a", NOW, ANSWER, LIMITS)
    await agrees()
    await store.release(second.id, "a", NOW, NOW + 1)
    await store.cancel(second.id, NOW)
    await agrees()
    await store.sweep(NOW + 1000)
    await agrees()
    await store.sweep(NOW + 5000)
    await agrees()
    assert await store._read(kept) == {"": (0, 0)}


async def test_a_file_of_before_counts_were_kept_is_counted_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    first = SqliteJobs(path)
    await added(first)
    await first.close()
    with sqlite3.connect(path) as db:
        db.executescript(
            "DROP TRIGGER jobs_added; DROP TRIGGER jobs_changed; DROP TRIGGER jobs_removed; DROP TABLE loads;"
            "CREATE INDEX jobs_room ON jobs(tenant, state, size); PRAGMA user_version = 1;"
        )
    db.close()
    second = SqliteJobs(path)
    assert await second._read(kept) == await second._read(counted)
    assert (await second._read(kept))[""][0] == 1
    await second.close()


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
