"""What a node must remember across a power cut: revision floors, the stored documents, starts that were not confirmed.

SQLite in WAL mode with synchronous=FULL: when a method returns, its change is on the disk; each is one transaction. Every
row is about one (kind, scope). A stored document is in one of three slots: `candidate` was accepted and is on its way,
`active` is in force, `previous` was in force before it and is what rolling back goes to.

Floors and condemned versions are also kept in memory: what the event loop asks for never waits for the disk.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from threading import Lock

from sync.errors import StoreFailed
from sync.schema import check_database, stamp_database
from sync.trust import Verified
from sync.tuf_messages import Mark

BUSY_SECONDS = 5.0
"""How long to wait for another process that has the file open, such as a diagnostic tool."""
SCHEMA = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS floors (
    kind TEXT, scope TEXT, revision INTEGER NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (kind, scope)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slots (
    kind TEXT, scope TEXT, slot TEXT CHECK (slot IN ('active', 'previous', 'candidate')),
    envelope BLOB NOT NULL, starts INTEGER NOT NULL DEFAULT 0, confirmed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, scope, slot)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS condemned (
    kind TEXT, scope TEXT, digest TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (kind, scope)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tuf (
    role TEXT PRIMARY KEY, version INTEGER NOT NULL, keys TEXT NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS approved (
    id INTEGER PRIMARY KEY CHECK (id = 1), expires REAL NOT NULL, refreshed REAL NOT NULL, digest TEXT NOT NULL,
    keyring BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS time_floor (id INTEGER PRIMARY KEY CHECK (id = 1), seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS progress (
    kind TEXT, scope TEXT, state TEXT NOT NULL, revision INTEGER NOT NULL, digest TEXT NOT NULL, since REAL NOT NULL,
    attempts INTEGER NOT NULL, held REAL NOT NULL, error TEXT, detail TEXT,
    PRIMARY KEY (kind, scope)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holds (id TEXT PRIMARY KEY, reason TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
"""


_CONFIRMED, _PROVED = 1, 2
"""Of the column `confirmed`: its probation is over, for want of traffic; it did its work."""
_RAISE_TIME = "INSERT INTO time_floor VALUES (1, ?) ON CONFLICT DO UPDATE SET seconds = max(seconds, excluded.seconds)"


@dataclass(frozen=True, slots=True)
class Floor:
    """The highest revision accepted and the digest of its payload. Revision 0: none yet."""

    revision: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Slots:
    """Stored envelopes; None = the slot is empty. `confirmed`: the active one's probation is over; `proved`: by its work."""

    active: bytes | None = None
    previous: bytes | None = None
    candidate: bytes | None = None
    confirmed: bool = False
    proved: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the newest verified document has got; `digest` names it.

    `state`: of `sync.states`. `since`: Unix seconds. `attempts`: that failed so far. `held`: seconds that holds have delayed
    it. `error`: why it is not in force; `detail`: what it waits for, or what its verdict rests on.
    """

    state: str
    revision: int = 0
    digest: str = ""
    since: float = 0.0
    attempts: int = 0
    held: float = 0.0
    error: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Approval:
    """The keyring last verified and until when it counts: `expires`, `refreshed` in Unix seconds. `digest`: of `keyring`."""

    expires: float
    refreshed: float
    digest: str
    keyring: bytes


class StateStore:
    """One file. Safe to call from any thread, one at a time. Raises StoreFailed when the disk or the file refuses."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        with self._disk():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _opened(path)
            self._floors = {
                (kind, scope): Floor(revision, digest)
                for kind, scope, revision, digest in self._db.execute(
                    "SELECT kind, scope, revision, digest FROM floors"
                )
            }
            self._condemned = {
                (kind, scope): (str(digest), str(reason))
                for kind, scope, digest, reason in self._db.execute("SELECT kind, scope, digest, reason FROM condemned")
            }
            self._tuf = {
                role: (Mark(version, keys), bytes(data))
                for role, version, keys, data in self._db.execute("SELECT role, version, keys, data FROM tuf")
            }
            query = "SELECT expires, refreshed, digest, keyring FROM approved"
            self._approval = next((Approval(*row) for row in self._db.execute(query)), None)
            row = self._db.execute("SELECT seconds FROM time_floor").fetchone()
            self._time_floor = float(row[0]) if row else 0.0

    def close(self) -> None:
        with self._lock, self._disk():
            self._db.close()

    # --- reading ------------------------------------------------------------------------------------------------

    def floor(self, kind: str, scope: str) -> Floor:
        return self._floors.get((kind, scope), Floor())

    def slots(self, kind: str, scope: str) -> Slots:
        """Read from the disk, behind every write that waits for it."""
        query = "SELECT slot, envelope, confirmed FROM slots WHERE kind = ? AND scope = ?"
        with self._lock, self._disk():
            rows = self._db.execute(query, (kind, scope)).fetchall()
        envelopes = {slot: envelope for slot, envelope, _ in rows}
        level = max((confirmed for slot, _, confirmed in rows if slot == "active"), default=0)
        return Slots(**envelopes, confirmed=level >= _CONFIRMED, proved=level >= _PROVED)

    def condemned(self, kind: str, scope: str) -> tuple[str, str]:
        """(digest, reason) of the version last rolled back from; empty strings when there is none."""
        return self._condemned.get((kind, scope), ("", ""))

    def time_floor(self) -> float:
        """The latest time known to have passed, Unix seconds: a clock below it is wrong.

        Signed times, and readings of the clock that fresh signed metadata vouched for: one wild reading alone must not expire
        every document from then on.
        """
        return self._time_floor

    def tuf_floors(self) -> dict[str, Mark]:
        """By role of the update repository: the highest version verified, and under which keys."""
        return {role: mark for role, (mark, _) in self._tuf.items()}

    def tuf_kept(self) -> dict[str, bytes]:
        """By role: the last verified metadata, for a cache that lost it."""
        return {role: data for role, (_, data) in self._tuf.items() if data}

    def approval(self) -> Approval | None:
        return self._approval

    # --- changing -----------------------------------------------------------------------------------------------

    def raise_tuf(self, marks: Mapping[str, Mark], kept: Mapping[str, bytes], seen: float) -> None:
        """Remember verified metadata. A floor falls only when other keys vouch for the role; `seen` raises the time floor."""
        raised = {role: (mark, kept.get(role, b"")) for role, mark in marks.items() if self._rises(role, mark)}
        if raised == {role: self._tuf.get(role) for role in raised} and seen <= self._time_floor:
            return
        with self._transaction() as db:
            for role, (mark, data) in raised.items():
                db.execute("INSERT OR REPLACE INTO tuf VALUES (?, ?, ?, ?)", (role, mark.version, mark.keys, data))
            db.execute(_RAISE_TIME, (seen,))
        with self._lock:
            self._tuf.update(raised)
            self._time_floor = max(self._time_floor, seen)

    def _rises(self, role: str, mark: Mark) -> bool:
        known = self._tuf.get(role)
        return known is None or known[0].keys != mark.keys or mark.version >= known[0].version

    def approve(self, approval: Approval) -> None:
        """Replace the keyring and its expiry."""
        values = (approval.expires, approval.refreshed, approval.digest, approval.keyring)
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO approved VALUES (1, ?, ?, ?, ?)", values)
        self._approval = approval

    def accept(self, verified: Verified, envelope: bytes, now: float = inf) -> None:
        """Raise the floor and store the candidate, before anything is done about it.

        `now`: the clock, Unix seconds. A signed time ahead of it raises the time floor no further: else times that are each
        within the leeway would add up, and no key that is withdrawn later would bring the floor down again.
        """
        with self._transaction() as db:
            _raise_floor(db, verified, now)
            _put(db, verified, "candidate", envelope)
        self._remember(verified, now)

    def activate(
        self, verified: Verified, envelope: bytes, now: float = inf, *, proved: Progress | None = None
    ) -> None:
        """Make the candidate the active document. What was active becomes the previous one if its probation was over.

        `now`: as in `accept`. `proved`: recorded with it, of a document that needs no probation.
        """
        with self._transaction() as db:
            _raise_floor(db, verified, now)
            name = (verified.document.kind, verified.document.scope)
            # An active version still on probation is no place to roll back to while an older good one is there.
            over = "SELECT 1 FROM slots WHERE kind = ? AND scope = ? AND slot = 'active' AND confirmed > 0"
            older = "SELECT 1 FROM slots WHERE kind = ? AND scope = ? AND slot = 'previous'"
            same = "SELECT 1 FROM slots WHERE kind = ? AND scope = ? AND slot = 'active' AND envelope = ?"
            # Nor is the very one that is tried again, because it could not be put in force the last time.
            if not db.execute(same, (*name, envelope)).fetchone() and (
                db.execute(over, name).fetchone() or not db.execute(older, name).fetchone()
            ):
                _move(db, name, "active", "previous")
            _clear(db, name, "candidate")
            _put(db, verified, "active", envelope)
            if proved is not None:
                level = "UPDATE slots SET confirmed = ? WHERE kind = ? AND scope = ? AND slot = 'active'"
                db.execute(level, (_PROVED, *name))
                _record(db, name, proved)
        self._remember(verified, now)

    def forget_candidate(self, kind: str, scope: str) -> None:
        with self._transaction() as db:
            _clear(db, (kind, scope), "candidate")

    def begin_start(self, kind: str, scope: str, slot: str) -> int:
        """Count a start of the document in `slot` before it is tried; returns how many are unconfirmed, this one included."""
        with self._transaction() as db:
            name = (kind, scope, slot)
            db.execute("UPDATE slots SET starts = starts + 1 WHERE kind = ? AND scope = ? AND slot = ?", name)
            row = db.execute("SELECT starts FROM slots WHERE kind = ? AND scope = ? AND slot = ?", name).fetchone()
            return int(row[0]) if row else 0

    def end_start(self, kind: str, scope: str, slot: str, *, confirmed: bool, proved: bool = False) -> None:
        """The process survived the start. `confirmed`: the probation is over; `proved`: because the document did its work."""
        with self._transaction() as db:
            statement = (
                "UPDATE slots SET starts = 0, confirmed = max(confirmed, ?) WHERE kind = ? AND scope = ? AND slot = ?"
            )
            level = _PROVED if proved else _CONFIRMED if confirmed else 0
            db.execute(statement, (level, kind, scope, slot))

    def roll_back(self, kind: str, scope: str, digest: str, reason: str) -> None:
        """Drop the active document for good and make the previous one active. The floor stays: this is no downgrade."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO condemned VALUES (?, ?, ?, ?)", (kind, scope, digest, reason))
            _move(db, (kind, scope), "previous", "active")
        self._condemned[kind, scope] = (digest, reason)

    def condemn_candidate(self, kind: str, scope: str, digest: str, reason: str) -> None:
        """Drop the candidate for good."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO condemned VALUES (?, ?, ?, ?)", (kind, scope, digest, reason))
            _clear(db, (kind, scope), "candidate")
        self._condemned[kind, scope] = (digest, reason)

    def demote(self, kind: str, scope: str) -> None:
        """The active document does not start from what is on the disk: try it again as a candidate, unless one waits."""
        with self._transaction() as db:
            name = (kind, scope)
            waiting = "SELECT 1 FROM slots WHERE kind = ? AND scope = ? AND slot = 'candidate'"
            if db.execute(waiting, name).fetchone():
                _clear(db, name, "active")
            else:
                _move(db, name, "active", "candidate")
            _move(db, name, "previous", "active")

    # --- progress and holds ---------------------------------------------------------------------------------------

    def progress(self, kind: str, scope: str) -> Progress | None:
        """What was last recorded; None on a node that never took a document of this kind."""
        query = (
            "SELECT state, revision, digest, since, attempts, held, error, detail FROM progress"
            " WHERE kind = ? AND scope = ?"
        )
        with self._lock, self._disk():
            row = self._db.execute(query, (kind, scope)).fetchone()
        return None if row is None else Progress(*row)

    def record(self, kind: str, scope: str, progress: Progress) -> None:
        """On the disk when this returns: what is entered afterwards is what a restart finds."""
        with self._transaction() as db:
            _record(db, (kind, scope), progress)

    def holds(self) -> list[tuple[str, str, float]]:
        """(id, reason, until in Unix seconds) of the holds that outlive the process."""
        with self._lock, self._disk():
            return list(self._db.execute("SELECT id, reason, until FROM holds ORDER BY until"))

    def keep_hold(self, name: str, reason: str, until: float, over: Iterable[str] = ()) -> None:
        """`over`: holds that ended by themselves, and go."""
        with self._transaction() as db:
            db.executemany("DELETE FROM holds WHERE id = ?", [(each,) for each in over])
            db.execute("INSERT OR REPLACE INTO holds VALUES (?, ?, ?)", (name, reason, until))

    def forget_hold(self, name: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM holds WHERE id = ?", (name,))

    # --- plumbing -----------------------------------------------------------------------------------------------

    def _remember(self, verified: Verified, now: float) -> None:
        """What `_raise_floor` has just put on the disk."""
        document = verified.document
        name = (document.kind, document.scope)
        with self._lock:
            if document.revision > self.floor(*name).revision:
                self._floors[name] = Floor(document.revision, verified.digest)
            self._time_floor = max(self._time_floor, min(document.issued, now))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._disk():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @staticmethod
    @contextmanager
    def _disk() -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(f"the state file refused: {error}") from error


def _opened(path: Path) -> sqlite3.Connection:
    try:
        return _connected(path, "journal_mode=WAL")
    except sqlite3.OperationalError:
        if not path.exists() or not path.stat().st_size:
            raise
    # A full disk has no room for the index that processes share (-shm): an exclusive connection keeps it in memory. So what
    # is stored can still start; a write fails until there is room, and is tried again by whoever wanted it.
    return _connected(path, "locking_mode=EXCLUSIVE")


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    try:
        db.execute(f"PRAGMA {mode}")
        found = check_database(db, str(path), SCHEMA)
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_SCHEMA)
        stamp_database(db, found, SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _raise_floor(db: sqlite3.Connection, verified: Verified, now: float) -> None:
    document = verified.document
    db.execute(
        "INSERT INTO floors VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
        " SET revision = excluded.revision, digest = excluded.digest WHERE excluded.revision > revision",
        (document.kind, document.scope, document.revision, verified.digest),
    )
    db.execute(_RAISE_TIME, (min(document.issued, now),))


def _put(db: sqlite3.Connection, verified: Verified, slot: str, envelope: bytes) -> None:
    document = verified.document
    # The same envelope again keeps its count of starts: it may be what ends the process each time.
    db.execute(
        "INSERT INTO slots (kind, scope, slot, envelope) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET confirmed = 0,"
        " starts = CASE WHEN envelope = excluded.envelope THEN starts ELSE 0 END, envelope = excluded.envelope",
        (document.kind, document.scope, slot, envelope),
    )


def _record(db: sqlite3.Connection, name: tuple[str, str], progress: Progress) -> None:
    row = (progress.state, progress.revision, progress.digest, progress.since, progress.attempts, progress.held)
    db.execute(
        "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*name, *row, progress.error, progress.detail),
    )


def _clear(db: sqlite3.Connection, name: tuple[str, str], slot: str) -> None:
    db.execute("DELETE FROM slots WHERE kind = ? AND scope = ? AND slot = ?", (*name, slot))


def _move(db: sqlite3.Connection, name: tuple[str, str], source: str, target: str) -> None:
    _clear(db, name, target)
    statement = "UPDATE slots SET slot = ?, starts = 0 WHERE kind = ? AND scope = ? AND slot = ?"
    db.execute(statement, (target, *name, source))
