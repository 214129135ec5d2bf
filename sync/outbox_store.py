"""The outbox's file: events that wait and the ledger over all there ever were, changed together.

SQLite in WAL mode with synchronous=FULL: when a method returns, its change is on the disk, and each is one transaction. No
file is touched but through SQLite. For one thread at a time.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from threading import Lock

from sync.errors import StoreFailed
from sync.events import Event
from sync.ledger import DELIVERED, DROPPED, ENQUEUED, EXPIRED, Ledger, ledger_of
from sync.outbox_policy import ROW_BYTES, Quota

BUSY_SECONDS = 5.0
"""How long to wait for another process that has the file open, such as `tierline ledger`."""
WAL_BYTES = 4 * 1024 * 1024
"""What the write-ahead log is cut back to after a burst."""
SCHEMA = 1
UNSET_WALL = 1_735_689_600.0
"""Before 2025 no release of this existed: a clock that says so was never set, and how long a pause took is not known."""
FULL, REFUSED = "quota", "refused"
"""Reasons of drops that this file decides on."""
_VICTIMS = 256
_SELECT = "SELECT id, seq, kind, body, priority, at FROM events"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_TABLES = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, priority INTEGER NOT NULL,
    last INTEGER NOT NULL, at REAL NOT NULL, expires REAL, size INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS events_order ON events (priority DESC, seq);
CREATE INDEX IF NOT EXISTS events_worth ON events (last, priority, seq);
CREATE INDEX IF NOT EXISTS events_expiry ON events (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS counters (
    kind TEXT, what TEXT, reason TEXT, count INTEGER NOT NULL, PRIMARY KEY (kind, what, reason)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), starts INTEGER NOT NULL, set_aside INTEGER NOT NULL,
    elapsed REAL NOT NULL, wall REAL NOT NULL);
"""


class Damaged(Exception):
    """The file is no database any more, or a broken one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An event to store. `ttl`: seconds, None = for ever. `last`: as in `KindPolicy`."""

    id: str
    kind: str
    body: bytes
    priority: int
    last: bool
    at: float
    ttl: float | None

    @property
    def size(self) -> int:
        return len(self.body) + ROW_BYTES


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction does. `lost`: (kind, reason) -> events that never reached the disk, for the ledger.

    `flying`: numbers of events under way: whether the hub has them is not known, so they are dropped and expired last.
    """

    entries: Sequence[Entry] = ()
    delivered: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[tuple[str, str], int] = field(default_factory=dict)
    flying: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Events to send, in order. `low`: no event with a smaller number waits. `boot`, `starts`: of the file they are from."""

    events: Sequence[Event]
    low: int
    boot: str
    starts: int


class OutboxStore:
    """Raises StoreFailed when the disk refuses, Damaged when the file is broken.

    `boot` names this opening of the file, `starts` counts them. Time to live runs on `elapsed`, seconds since the file was
    made: by the monotonic clock while it is open, so a clock that is set does not expire what waits, by the wall clock over a
    pause, from the latest it ever showed.
    """

    def __init__(self, path: Path, quota: Quota, *, wall: float, monotonic: float, set_aside: int = 0) -> None:
        self.boot = token_hex(8)
        self._quota = quota
        self._counters: Counter[tuple[str, str, str]] = Counter()
        self._lock = Lock()
        with _disk():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
            try:
                self._open(wall, set_aside)
            except BaseException:
                self._db.close()
                raise
        self._monotonic = monotonic

    def _open(self, wall: float, set_aside: int) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
        if db.execute("PRAGMA user_version").fetchone()[0] > SCHEMA:
            raise StoreFailed("the outbox was written by a newer release; events are dropped until that one runs again")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise Damaged("the outbox fails its check")
        with self._transaction():
            for statement in _TABLES.strip().split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA}")
            db.execute("INSERT OR IGNORE INTO meta VALUES (1, 0, ?, 0, ?)", (set_aside, wall))
            starts, aside, elapsed, before = db.execute("SELECT starts, set_aside, elapsed, wall FROM meta").fetchone()
            self.starts, self.set_aside = starts + 1, max(aside, set_aside)
            self._elapsed = elapsed + (max(wall - before, 0.0) if before >= UNSET_WALL else 0.0)
            self._wall = max(wall, before)
            db.execute(
                "UPDATE meta SET starts = ?, set_aside = ?, elapsed = ?, wall = ?",
                (self.starts, self.set_aside, self._elapsed, self._wall),
            )
        for kind, what, reason, count in db.execute("SELECT kind, what, reason, count FROM counters"):
            self._counters[kind, what, reason] = count
        self._pending = Counter(dict(db.execute("SELECT kind, count(*) FROM events GROUP BY kind")))
        self.rows = self._pending.total()
        self.size = db.execute("SELECT coalesce(sum(size), 0) FROM events").fetchone()[0]

    def close(self) -> None:
        with _disk():
            self._db.close()

    @property
    def kinds(self) -> frozenset[str]:
        """Every kind that has a line in the ledger."""
        return frozenset(kind for kind, _, _ in self._counters)

    def snapshot(self) -> tuple[dict[tuple[str, str, str], int], dict[str, int]]:
        """The counters and, by kind, what is pending: as of one transaction, from memory, for any thread."""
        with self._lock:
            return dict(self._counters), {kind: count for kind, count in self._pending.items() if count}

    def oldest(self) -> float | None:
        """`at` of the event that has waited longest, Unix seconds."""
        with _disk():
            row = self._db.execute("SELECT at FROM events ORDER BY seq LIMIT 1").fetchone()
        return None if row is None else float(row[0])

    # --- changing -----------------------------------------------------------------------------------------------

    def apply(self, change: Change, *, wall: float, monotonic: float) -> frozenset[str]:
        """One transaction; the ids of events dropped by it for lack of room."""
        now = self._elapsed + max(monotonic - self._monotonic, 0.0)
        wall = max(wall, self._wall)
        step = _Step(self._db, self._quota, self.rows, self.size)
        with self._transaction():
            step.settle(change.delivered, change.refused)
            step.insert(change.entries, now)
            step.expire(now, change.flying)
            step.make_room(change.flying)
            step.count_lost(change.lost)
            step.write_counters()
            self._db.execute("UPDATE meta SET elapsed = ?, wall = ?", (now, wall))
        self._elapsed, self._monotonic, self._wall = now, monotonic, wall
        with self._lock:
            self._counters.update(step.counters)
            self._pending.update(step.pending)
            self.rows, self.size = step.rows, step.size
        return frozenset(step.dropped)

    # --- reading ------------------------------------------------------------------------------------------------

    def waiting(self, limit: int, flying: Collection[int], monotonic: float) -> Waiting:
        """Up to `limit` events to send now: highest priority first, oldest first within one; none of `flying`."""
        now = self._elapsed + max(monotonic - self._monotonic, 0.0)
        marks = ",".join("?" * len(flying))
        where = f"(expires IS NULL OR expires > ?) AND seq NOT IN ({marks})"
        return self._read(f"{_SELECT} WHERE {where} ORDER BY priority DESC, seq LIMIT ?", (now, *flying, limit))

    def again(self, seqs: Collection[int], monotonic: float) -> Waiting:
        """Those of `seqs` that still wait and are not past their time, in the order of sending."""
        now = self._elapsed + max(monotonic - self._monotonic, 0.0)
        marks = ",".join("?" * len(seqs))
        where = f"(expires IS NULL OR expires > ?) AND seq IN ({marks})"
        return self._read(f"{_SELECT} WHERE {where} ORDER BY priority DESC, seq", (now, *seqs))

    def _read(self, query: str, values: Sequence[object]) -> Waiting:
        with _disk():
            rows = self._db.execute(query, values).fetchall()
            low = self._db.execute("SELECT min(seq) FROM events").fetchone()[0]
            if low is None:
                row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
                low = (row[0] if row else 0) + 1
        return Waiting(
            [
                Event(id=id_, seq=seq, kind=kind, body=body, priority=priority, at=at)
                for id_, seq, kind, body, priority, at in rows
            ],
            low,
            self.boot,
            self.starts,
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _disk():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


class _Step:
    """The inside of one transaction: statements, and what they add to the ledger."""

    def __init__(self, db: sqlite3.Connection, quota: Quota, rows: int, size: int) -> None:
        self.counters: Counter[tuple[str, str, str]] = Counter()
        self.pending: Counter[str] = Counter()
        self.dropped: list[str] = []
        self.rows, self.size = rows, size
        self._db = db
        self._quota = quota

    def settle(self, delivered: Sequence[str], refused: Mapping[str, str]) -> None:
        for id_ in delivered:
            self._remove_id(id_, DELIVERED, "")
        for id_ in refused:
            self._remove_id(id_, DROPPED, REFUSED)

    def insert(self, entries: Iterable[Entry], now: float) -> None:
        for entry in entries:
            expires = None if entry.ttl is None else now + entry.ttl
            self._db.execute(
                "INSERT INTO events (id, kind, priority, last, at, expires, size, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (entry.id, entry.kind, entry.priority, entry.last, entry.at, expires, entry.size, entry.body),
            )
            self.counters[entry.kind, ENQUEUED, ""] += 1
            self.pending[entry.kind] += 1
            self.rows, self.size = self.rows + 1, self.size + entry.size

    def expire(self, now: float, flying: Collection[int]) -> None:
        rows = self._db.execute("SELECT seq, id, kind, size FROM events WHERE expires <= ?", (now,)).fetchall()
        for seq, _, kind, size in rows:
            if seq not in flying:
                self._remove(seq, kind, size, EXPIRED, "")

    def make_room(self, flying: Collection[int]) -> None:
        spared = frozenset(flying)
        while self._quota.exceeded(self.size, self.rows) and self.rows:
            if not self._drop_some(spared):
                spared = frozenset()

    def _drop_some(self, spared: frozenset[int]) -> bool:
        marks = ",".join("?" * len(spared))
        query = (
            f"SELECT seq, id, kind, size FROM events WHERE seq NOT IN ({marks}) ORDER BY last, priority, seq LIMIT ?"  # noqa: S608
        )
        rows = self._db.execute(query, (*spared, _VICTIMS)).fetchall()
        for seq, id_, kind, size in rows:
            if not self._quota.exceeded(self.size, self.rows):
                break
            self._remove(seq, kind, size, DROPPED, FULL)
            self.dropped.append(id_)
        return bool(rows)

    def count_lost(self, lost: Mapping[tuple[str, str], int]) -> None:
        for (kind, reason), count in lost.items():
            self.counters[kind, ENQUEUED, ""] += count
            self.counters[kind, DROPPED, reason] += count

    def write_counters(self) -> None:
        self._db.executemany(
            "INSERT INTO counters VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [(*key, count) for key, count in self.counters.items()],
        )

    def _remove_id(self, id_: str, what: str, reason: str) -> None:
        row = self._db.execute("SELECT seq, kind, size FROM events WHERE id = ?", (id_,)).fetchone()
        if row is not None:
            seq, kind, size = row
            self._remove(seq, kind, size, what, reason)

    def _remove(self, seq: int, kind: str, size: int, what: str, reason: str) -> None:
        self._db.execute("DELETE FROM events WHERE seq = ?", (seq,))
        self.counters[kind, what, reason] += 1
        self.pending[kind] -= 1
        self.rows, self.size = self.rows - 1, self.size - size


def read_ledger(path: Path) -> Ledger:
    """The ledger in an outbox's file, which may be in use: one snapshot, nothing is changed. Raises StoreFailed."""
    try:
        with (
            _disk(),
            closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as db,
        ):
            db.execute("BEGIN")
            counters = db.execute("SELECT kind, what, reason, count FROM counters").fetchall()
            pending = dict(db.execute("SELECT kind, count(*) FROM events GROUP BY kind"))
            return ledger_of(counters, pending, db.execute("SELECT set_aside FROM meta").fetchone()[0])
    except Damaged as error:
        raise StoreFailed(f"{path}: {error}") from error


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise Damaged(str(error)) from error
        raise StoreFailed(f"the outbox's file refused: {error}") from error
    except OSError as error:
        raise StoreFailed(f"the outbox's file refused: {error}") from error
