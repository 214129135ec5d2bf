"""What a node keeps on its disk, read without changing it: also beside a node that runs, also of a release that is not ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sync.errors import Malformed, StoreFailed
from sync.messages import MAX_MESSAGE_BYTES, Document, Envelope, decode
from sync.state import Approval

BUSY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a document of `kind` has got, as `sync.state.Progress` has it."""

    kind: str
    state: str
    revision: int
    since: float
    error: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """`documents`: (kind, slot) -> envelope. `metadata`, `floors`: by role of the update repository. Times: Unix seconds."""

    documents: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    scopes: Mapping[str, str] = field(default_factory=dict)
    floors: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, bytes] = field(default_factory=dict)
    approval: Approval | None = None
    time_floor: float = 0.0
    progress: tuple[Standing, ...] = ()
    condemned: Mapping[str, str] = field(default_factory=dict)
    holds: int = 0


def read_kept(path: Path) -> Kept:
    """One snapshot of a state file. Raises StoreFailed when it cannot be read."""
    with reading(path) as db:
        slots = list(_rows(db, "SELECT kind, scope, slot, envelope FROM slots"))
        tuf = list(_rows(db, "SELECT role, version, data FROM tuf"))
        approvals = list(_rows(db, "SELECT expires, refreshed, digest, keyring FROM approved"))
        floor = list(_rows(db, "SELECT seconds FROM time_floor"))
        progress = "SELECT kind, state, revision, since, error, detail FROM progress ORDER BY kind"
        return Kept(
            documents={(kind, slot): bytes(envelope) for kind, _, slot, envelope in slots},
            scopes={kind: scope for kind, scope, _, _ in slots},
            floors={role: int(version) for role, version, _ in tuf},
            metadata={role: bytes(data) for role, _, data in tuf if data},
            approval=Approval(*approvals[0]) if approvals else None,
            time_floor=float(floor[0][0]) if floor else 0.0,
            progress=tuple(Standing(*row) for row in _rows(db, progress)),
            condemned=dict(_rows(db, "SELECT kind, reason FROM condemned")),
            holds=len(list(_rows(db, "SELECT id FROM holds"))),
        )


def quick_check(path: Path) -> str:
    """`ok`, or what is wrong with a database. Raises StoreFailed."""
    with reading(path) as db:
        return str(db.execute("PRAGMA quick_check(3)").fetchone()[0])


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that can only read. Raises StoreFailed."""
    if not path.is_file():
        raise StoreFailed(f"{path.name} is not there")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as db:
            db.execute("BEGIN")
            yield db
    except sqlite3.Error as error:
        raise StoreFailed(f"{path.name}: {error}") from error


def open_document(envelope: bytes) -> Document:
    """What an envelope says, its signature not looked at. Raises Malformed."""
    sealed = decode(envelope, Envelope, 2 * MAX_MESSAGE_BYTES)
    return decode(sealed.payload, Document, 2 * MAX_MESSAGE_BYTES)


def kid_of(envelope: bytes) -> str:
    """The key that signed it, first of several. Raises Malformed."""
    sealed = decode(envelope, Envelope, 2 * MAX_MESSAGE_BYTES)
    if not sealed.sigs:
        raise Malformed("no signature")
    return sealed.sigs[0].kid


def _rows(db: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Nothing for a table that this file does not have: another release made it."""
    try:
        return db.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "no such column" in str(error):
            return []
        raise
