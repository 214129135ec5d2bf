"""The hub's database: SQLite in WAL mode, one writer at a time, every commit on disk before it is acted upon.

    with storage.write() as records: ...     one transaction, rolled back by any exception
    with storage.read() as records: ...      a consistent snapshot

Synchronous: the API calls it from threads. The queries are in `cloud_hub.records`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from cloud_hub.migrations import upgrade
from cloud_hub.records import Records
from models.errors import TryAgain

BUSY_SECONDS = 5.0
"""How long a writer waits for another process (a backup, the sqlite3 shell) before giving up."""
LOCK_SECONDS = 10.0
"""How long a writer waits for the writers of this process."""


class Storage:
    """An open database, its schema brought up to date. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS})
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(writes=True)
        upgrade(self._writer)

    @contextmanager
    def read(self) -> Iterator[Records]:
        """Queries over one snapshot. Raises TryAgain when the database stays locked."""
        with _translated(), Session(self._engine) as session:
            yield Records(session)

    @contextmanager
    def write(self) -> Iterator[Records]:
        """One transaction, committed at the end of the block. Raises TryAgain when the disk or a lock refuses."""
        if not self._lock.acquire(timeout=LOCK_SECONDS):
            raise TryAgain("the database is busy")
        try:
            with _translated(), Session(self._writer) as session:
                yield Records(session)
                session.commit()
        finally:
            self._lock.release()

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    """Locked, full or failing disk: time must pass or somebody must make room; it is never the caller's fault."""
    try:
        yield
    except OperationalError as error:
        raise TryAgain(f"the database did not answer: {error.orig}") from error


def _configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    # The driver's own transaction control would begin a write late, after a read that may be outdated by then.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
