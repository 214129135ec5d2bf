"""What `tests/skew/record.py` recorded: messages and files of other releases."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "skew"
RELEASES = ("before-tuf", "0.1.0", "later")
"""`before-tuf`: approved files were listed in a signed catalogue. `later`: fields and kinds nobody here knows."""


@dataclass(frozen=True)
class Release:
    name: str

    @property
    def at(self) -> float:
        """When it was recorded, Unix seconds."""
        return float(json.loads(self.read("recorded.json"))["at"])

    def read(self, name: str) -> bytes:
        return (FOLDER / self.name / name).read_bytes()

    def has(self, name: str) -> bool:
        return (FOLDER / self.name / name).exists()

    def restore(self, name: str, path: Path) -> None:
        """Make the database file that was recorded as SQL text."""
        with closing(sqlite3.connect(path)) as db:
            db.executescript(self.read(name).decode())
            db.execute("PRAGMA journal_mode=WAL")


def user_version(path: Path, number: int | None = None) -> int:
    """The stamp in a database; set first when `number` is given."""
    with closing(sqlite3.connect(path)) as db:
        if number is not None:
            db.execute(f"PRAGMA user_version={number}")
        return int(db.execute("PRAGMA user_version").fetchone()[0])
