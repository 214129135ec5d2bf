"""Jobs in an SQLite file: WAL, synchronous=FULL, so that what was accepted survives a power cut.

Several processes may share the file. What writes runs in one thread, what only reads in another, nothing in the event loop.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from models.errors import NotReady
from models.serving.jobs.job import CRASHED, EXPIRED, MAX_ATTEMPTS, Answer, Failure, Job, JobLimits, Owner, State, Work
from models.serving.jobs.lane import Lane
from models.serving.jobs.store import check_room, no_room

log = logging.getLogger("tierline.jobs.sqlite")

T = TypeVar("T")

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
DROP INDEX IF EXISTS jobs_room;
CREATE INDEX IF NOT EXISTS jobs_owner ON jobs(tenant, client, created);
CREATE INDEX IF NOT EXISTS jobs_expires ON jobs(expires);
CREATE INDEX IF NOT EXISTS jobs_hooks ON jobs(hook_due) WHERE hook_due IS NOT NULL;
CREATE TABLE IF NOT EXISTS loads (
  whose TEXT PRIMARY KEY, jobs INTEGER NOT NULL, bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS jobs_added AFTER INSERT ON jobs BEGIN
  INSERT INTO loads VALUES
    ('', new.state IN ('queued', 'running'), new.size),
    (coalesce('=' || new.tenant, '-'), new.state IN ('queued', 'running'), new.size)
    ON CONFLICT (whose) DO UPDATE SET jobs = jobs + excluded.jobs, bytes = bytes + excluded.bytes;
END;
CREATE TRIGGER IF NOT EXISTS jobs_changed AFTER UPDATE OF state, size ON jobs BEGIN
  UPDATE loads SET bytes = bytes + new.size - old.size,
    jobs = jobs + (new.state IN ('queued', 'running')) - (old.state IN ('queued', 'running'))
    WHERE whose IN ('', coalesce('=' || new.tenant, '-'));
END;
CREATE TRIGGER IF NOT EXISTS jobs_removed AFTER DELETE ON jobs BEGIN
  UPDATE loads SET bytes = bytes - old.size, jobs = jobs - (old.state IN ('queued', 'running'))
    WHERE whose IN ('', coalesce('=' || old.tenant, '-'));
  DELETE FROM loads WHERE whose = coalesce('=' || old.tenant, '-') AND jobs = 0 AND bytes = 0;
END;
DELETE FROM loads;
INSERT INTO loads SELECT '', count(*) FILTER (WHERE state IN ('queued', 'running')), coalesce(sum(size), 0) FROM jobs;
INSERT INTO loads SELECT coalesce('=' || tenant, '-'), count(*) FILTER (WHERE state IN ('queued', 'running')), sum(size)
  FROM jobs GROUP BY tenant;
PRAGMA user_version = 2;
"""
# In `loads`, beside the tags of tenants: every job there is. Triggers keep the counts, in every process that writes; counted
# anew whenever the file is opened, which also serves files that had none.
ALL = ""
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
        self._failing = False  # said once when it begins and once when it ends
        try:
            self._writer = Lane(lambda: _open(path), name="tierline-jobs", writes=True)
            try:
                self._reader = Lane(lambda: _open_to_read(path), name="tierline-jobs-read", writes=False)
            except BaseException:
                self._writer.close_now()
                raise
        except (sqlite3.Error, OSError) as error:
            raise NotReady(f"the job store {path} cannot be opened: {error}") from error

    async def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """`act` in one transaction, in the thread that writes."""
        return await self._on(self._writer, act)

    async def _read(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """`act` on all that was written before, beside what is being written."""
        return await self._on(self._reader, act)

    async def _on(self, lane: Lane, act: Callable[[sqlite3.Connection], T]) -> T:
        try:
            answer = await lane.run(act)
        except sqlite3.Error as error:
            if not self._failing:
                log.warning("the job store %s fails: %s", self._path, error)
            self._failing = True
            raise NotReady("the job store does not answer") from error
        except RuntimeError as error:
            raise NotReady("the job store is closed") from error
        if self._failing:
            log.info("the job store %s works again", self._path)
        self._failing = False
        return answer

    async def add(self, job: Job, work: Work, limits: JobLimits) -> None:
        def act(db: sqlite3.Connection) -> None:
            check_room(job, limits, _room(db, ALL), _room(db, _tag(job.owner.tenant)))
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
        return await self._read(lambda db: [job for job in (_get(db, job_id) for job_id in ids) if job is not None])

    async def listing(self, owner: Owner, limit: int) -> list[Job]:
        where = "tenant IS ? AND client IS ? ORDER BY created DESC, rowid DESC LIMIT ?"
        return await self._read(lambda db: _select(db, where, owner.tenant, owner.client, limit))

    async def answer(self, job_id: str) -> Answer | None:
        def act(db: sqlite3.Connection) -> Answer | None:
            row = db.execute(
                "SELECT body, header_length FROM bodies WHERE job = ? AND kind = 'answer'", (job_id,)
            ).fetchone()
            return None if row is None else Answer(*row)

        return await self._read(act)

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
            if isinstance(end, Answer) and _room(db, ALL)[1] - held[0] + len(end.body) > limits.bytes:
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
        await self._reader.close()
        await self._writer.close()


def _open(path: Path) -> sqlite3.Connection:
    path.touch(mode=0o600)
    return _prepared(
        sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False),
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;"
        f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;",
    )


def _open_to_read(path: Path) -> sqlite3.Connection:
    return _prepared(
        sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False),
        "PRAGMA query_only = ON;",
    )


def _prepared(db: sqlite3.Connection, script: str) -> sqlite3.Connection:
    try:
        db.executescript(script)
    except BaseException:
        db.close()
        raise
    return db


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


def _tag(tenant: str | None) -> str:
    """A tenant in the table of loads, which needs a key for none too."""
    return "-" if tenant is None else f"={tenant}"


def _room(db: sqlite3.Connection, whose: str) -> tuple[int, int]:
    """(unfinished jobs, bytes charged) of a tenant's tag, or of `ALL`."""
    row = db.execute("SELECT jobs, bytes FROM loads WHERE whose = ?", (whose,)).fetchone()
    return (0, 0) if row is None else (row[0], row[1])


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
