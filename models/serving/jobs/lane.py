"""One SQLite connection and the thread that it is used in."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from models.errors import Overloaded

T = TypeVar("T")

MAX_PENDING = 256
"""Calls that may wait for one thread; each may hold a body in memory."""


class Lane:
    """What `run` is given is done one after another. `writes`: each in a transaction that is begun by taking the write lock."""

    def __init__(self, opened: Callable[[], sqlite3.Connection], *, name: str, writes: bool) -> None:
        """Raises what `opened` raises; it is called in the thread."""
        self._pending = 0
        self._writes = writes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        try:
            self._db = self._thread.submit(opened).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Ends even when who waits for it has gone. Raises Overloaded, sqlite3.Error; RuntimeError once closed."""
        if self._pending >= MAX_PENDING:
            raise Overloaded("too many calls wait for the job store")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._done, act)
        finally:
            self._pending -= 1

    def _done(self, act: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        db.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")
        try:
            answer = act(db)
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
        return answer

    async def close(self) -> None:
        """Ends what was begun first."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown(wait=False)

    def close_now(self) -> None:
        """As `close`, where there is no loop yet."""
        self._thread.submit(self._db.close)
        self._thread.shutdown()
