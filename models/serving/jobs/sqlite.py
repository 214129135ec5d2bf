"""Jobs in an SQLite file: WAL, synchronous=FULL, so that what was accepted survives a power cut.

Several processes may share the file. All SQL runs in one thread of its own, never in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from models.errors import NotReady, Overloaded
from models.serving.jobs.job import CRASHED, EXPIRED, MAX_ATTEMPTS, Answer, Failure, Job, JobLimits, Owner, State, Work
from models.serving.jobs.store import check_room, no_room

log = logging.getLogger("tierline.jobs.sqlite")

T = TypeVar("T")

MAX_PENDING = 256
"""Calls that may wait for the thread; each may hold a body in memory."""
BUSY_SECONDS = 5.0
"""Longest wait for another process that writes."""
SWEEP_ROWS = 200
"""Rows that one sweep changes at most: it shares the thread with submissions."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, tenant TEXT, client TEXT, model TEXT NOT NULL, version TEXT, state TEXT NOT NULL,
  created REAL NOT NULL, updated REAL NOT NULL, expires REAL NOT NULL, ttl REAL NOT NULL, due REAL NOT NULL,
  worker TEXT, lease REAL, attempts INTEGER NOT NULL, backoffs INTEGER NOT NULL, error TEXT,
  error_status INTEGER NOT NULL, webhook TEXT, hook_due REAL, hook_tries INTEGER NOT NULL, size INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS bodies (
  job TEXT NOT NULL REFERENCES jobs(id) ON DELETE CASCADE, kind TEXT NOT NULL, header_length INTEGER, budget REAL,
  trace TEXT, body BLOB NOT NULL, PRIMARY KEY (job, kind)
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_due ON jobs(state, due);
CREATE INDEX IF NOT EXISTS jobs_room ON jobs(tenant, state, size);
CREATE INDEX IF NOT EXISTS jobs_owner ON jobs(tenant, client, created);
CREATE INDEX IF NOT EXISTS jobs_expires ON jobs(expires);
CREATE INDEX IF NOT EXISTS jobs_hooks ON jobs(hook_due) WHERE hook_due IS NOT NULL;
PRAGMA user_version = 1;
"""
_COLUMNS = (
    "id, tenant, client, model, version, created, updated, expires, ttl, state, attempts, backoffs, error, error_status, "
    "webhook, hook_tries, size"
)
_UNFINISHED = "state IN ('queued', 'running')"


class SqliteJobs:
    """`JobStore` in the file at `path`, made when it is missing, readable by its owner alone."""

    def __init__(self, path: Path) -> None:
        """Raises NotReady when the file cannot be opened."""
        self._path = path
        self._pending = 0
        self._failing = False  # said once when it begins and once when it ends
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tierline-jobs")
        try:
            self._db = self._thread.submit(_open, path).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise NotReady(f"the job store {path} cannot be opened: {error}") from error

    async def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """`act` in one transaction, in the thread. It ends there even when who waits for it has gone."""
        if self._pending >= MAX_PENDING:
            raise Overloaded("too many calls wait for the job store")
        self._pending += 1
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._thread, _transact, self._db, act)
        except sqlite3.Error as error:
            if not self._failing:
                log.warning("the job store %s fails: %s", self._path, error)
            self._failing = True
            raise NotReady("the job store does not answer") from error
        except RuntimeError as error:
            raise NotReady("the job store is closed") from error
        finally:
            self._pending -= 1
        if self._failing:
            log.info("the job store %s works again", self._path)
        self._failing = False
        return answer

    async def add(self, job: Job, work: Work, limits: JobLimits) -> None:
        def act(db: sqlite3.Connection) -> None:
            check_room(job, limits, _room(db, ""), _room(db, "WHERE tenant IS ?", job.owner.tenant))
            db.execute(
                "INSERT INTO jobs VALUES (?,?,?,?,?,?,?,?,?,?,?,NULL,NULL,?,?,NULL,0,?,NULL,0,?)",
                (
                    job.id, job.owner.tenant, job.owner.client, job.model, job.version, job.state, job.created,
                    job.updated, job.expires, job.ttl, job.created, job.attempts, job.backoffs, job.webhook, job.size,
                ),
            )  # fmt: skip
            db.execute(
                "INSERT INTO bodies VALUES (?, 'work', ?, ?, ?, ?)",
                (job.id, work.header_length, work.budget, work.trace, work.body),
            )

        await self._run(act)

    async def find(self, ids: Sequence[str]) -> list[Job]:
        return await self._run(lambda db: [job for job in (_get(db, job_id) for job_id in ids) if job is not None])

    async def listing(self, owner: Owner, limit: int) -> list[Job]:
        where = "tenant IS ? AND client IS ? ORDER BY created DESC, rowid DESC LIMIT ?"
        return await self._run(lambda db: _select(db, where, owner.tenant, owner.client, limit))

    async def answer(self, job_id: str) -> Answer | None:
        def act(db: sqlite3.Connection) -> Answer | None:
            row = db.execute(
                "SELECT body, header_length FROM bodies WHERE job = ? AND kind = 'answer'", (job_id,)
            ).fetchone()
            return None if row is None else Answer(*row)

        return await self._run(act)

    async def claim(self, worker: str, now: float, lease: float) -> tuple[Job, Work] | None:
        def act(db: sqlite3.Connection) -> tuple[Job, Work] | None:
            row = None
            for waits in ("state = 'running' AND lease < ?1", "state = 'queued' AND due <= ?1"):
                row = (
                    row
                    or db.execute(
                        f"SELECT id FROM jobs WHERE {waits} AND expires > ?1 AND attempts < ?2 ORDER BY due LIMIT 1",  # noqa: S608 - ours
                        (now, MAX_ATTEMPTS),
                    ).fetchone()
                )
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'running', worker = ?, lease = ?, attempts = attempts + 1, updated = ? WHERE id = ?",
                (worker, now + lease, now, row[0]),
            )
            job = _get(db, row[0])
            assert job is not None
            work = db.execute(
                "SELECT body, header_length, budget, trace FROM bodies WHERE job = ? AND kind = 'work'", row
            ).fetchone()
            return job, Work(*work)

        return await self._run(act)

    async def renew(self, ids: Collection[str], worker: str, now: float, lease: float) -> set[str]:
        def act(db: sqlite3.Connection) -> set[str]:
            return {
                job_id
                for job_id in ids
                if db.execute(
                    "UPDATE jobs SET lease = ? WHERE id = ? AND worker = ? AND state = 'running'",
                    (now + lease, job_id, worker),
                ).rowcount
            }

        return await self._run(act)

    async def release(self, job_id: str, worker: str, now: float, due: float) -> None:
        await self._run(
            lambda db: db.execute(
                "UPDATE jobs SET state = 'queued', worker = NULL, lease = NULL, attempts = attempts - 1,"
                " backoffs = backoffs + 1, due = ?, updated = ? WHERE id = ? AND worker = ? AND state = 'running'",
                (due, now, job_id, worker),
            )
        )

    async def finish(
        self, job_id: str, worker: str, now: float, outcome: Answer | Failure, limits: JobLimits
    ) -> Job | None:
        def act(db: sqlite3.Connection) -> Job | None:
            held = db.execute(
                "SELECT length(body) FROM jobs JOIN bodies ON job = id AND kind = 'work'"
                " WHERE id = ? AND worker = ? AND state = 'running'",
                (job_id, worker),
            ).fetchone()
            job = _get(db, job_id)
            if held is None or job is None:
                return None
            end = outcome
            if isinstance(end, Answer) and _room(db, "")[1] - held[0] + len(end.body) > limits.bytes:
                end = no_room(job_id, len(end.body))
            job = replace(job, size=job.size - held[0])
            if isinstance(end, Failure):
                return _end(db, job, "failed", now, end)
            db.execute(
                "INSERT INTO bodies VALUES (?, 'answer', ?, NULL, NULL, ?)", (job_id, end.header_length, end.body)
            )
            return _end(db, replace(job, size=job.size + len(end.body)), "succeeded", now)

        return await self._run(act)

    async def cancel(self, job_id: str, now: float) -> Job | None:
        def act(db: sqlite3.Connection) -> Job | None:
            job = _get(db, job_id)
            if job is None or job.is_final:
                return job
            if job.state == "queued":
                db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
                return replace(job, state="cancelled", updated=now)
            return _end(db, _without_work(db, job), "cancelled", now)

        return await self._run(act)

    async def sweep(self, now: float) -> list[Job]:
        def act(db: sqlite3.Connection) -> list[Job]:
            db.execute(
                "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs WHERE expires <= ?"
                " AND state NOT IN ('queued', 'running') LIMIT ?)",
                (now, SWEEP_ROWS),
            )
            late = _select(db, f"expires <= ? AND {_UNFINISHED} LIMIT {SWEEP_ROWS}", now)
            where = f"state = 'running' AND lease < ? AND attempts >= ? AND expires > ? LIMIT {SWEEP_ROWS}"
            crashed = _select(db, where, now, MAX_ATTEMPTS, now)
            ended = [(job, Failure(EXPIRED, 504)) for job in late] + [(job, Failure(CRASHED, 500)) for job in crashed]
            return [_end(db, _without_work(db, job), "failed", now, failure) for job, failure in ended]

        return await self._run(act)

    async def hooks(self, now: float, hold: float, limit: int) -> list[Job]:
        def act(db: sqlite3.Connection) -> list[Job]:
            due = _select(db, "hook_due <= ? ORDER BY hook_due LIMIT ?", now, limit)
            for job in due:
                db.execute(
                    "UPDATE jobs SET hook_due = ?, hook_tries = hook_tries + 1 WHERE id = ?", (now + hold, job.id)
                )
            return [replace(job, hook_tries=job.hook_tries + 1) for job in due]

        return await self._run(act)

    async def hooked(self, job_id: str, due: float | None) -> None:
        await self._run(lambda db: db.execute("UPDATE jobs SET hook_due = ? WHERE id = ?", (due, job_id)))

    async def close(self) -> None:
        """Ends what was begun, then closes the file."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown(wait=False)


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _transact(db: sqlite3.Connection, act: Callable[[sqlite3.Connection], T]) -> T:
    with _transaction(db):
        return act(db)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _select(db: sqlite3.Connection, where: str, *values: object) -> list[Job]:
    return [_job(row) for row in db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", values)]  # noqa: S608 - ours


def _get(db: sqlite3.Connection, job_id: str) -> Job | None:
    found = _select(db, "id = ?", job_id)
    return found[0] if found else None


def _job(row: tuple[Any, ...]) -> Job:
    return Job(
        id=row[0],
        owner=Owner(row[1], row[2]),
        model=row[3],
        version=row[4],
        created=row[5],
        updated=row[6],
        expires=row[7],
        ttl=row[8],
        state=row[9],
        attempts=row[10],
        backoffs=row[11],
        error=row[12],
        error_status=row[13],
        webhook=row[14],
        hook_tries=row[15],
        size=row[16],
    )


def _room(db: sqlite3.Connection, where: str, *values: object) -> tuple[int, int]:
    """(unfinished jobs, bytes charged) of the rows meant."""
    row = db.execute(
        f"SELECT count(*) FILTER (WHERE {_UNFINISHED}), coalesce(sum(size), 0) FROM jobs {where}",  # noqa: S608 - ours
        values,
    ).fetchone()
    return row[0], row[1]


def _without_work(db: sqlite3.Connection, job: Job) -> Job:
    row = db.execute("SELECT length(body) FROM bodies WHERE job = ? AND kind = 'work'", (job.id,)).fetchone()
    return replace(job, size=job.size - (row[0] if row else 0))


def _end(db: sqlite3.Connection, job: Job, state: State, now: float, failure: Failure | None = None) -> Job:
    """Make `job`, its size counted anew, final: its request goes, its webhook is due, its result is kept for its TTL."""
    ended = replace(
        job,
        state=state,
        updated=now,
        expires=now + job.ttl,
        error=failure.error if failure else None,
        error_status=failure.status if failure else 0,
    )
    db.execute("DELETE FROM bodies WHERE job = ? AND kind = 'work'", (job.id,))
    db.execute(
        "UPDATE jobs SET state = ?, updated = ?, expires = ?, error = ?, error_status = ?, size = ?, worker = NULL,"
        " lease = NULL, hook_due = CASE WHEN webhook IS NULL THEN NULL ELSE ? END WHERE id = ?",
        (state, now, ended.expires, ended.error, ended.error_status, ended.size, now, job.id),
    )
    return ended
