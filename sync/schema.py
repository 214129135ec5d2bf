"""Stamps on what is kept on the disk: a later release's files are refused by name, and nothing in them is touched.

A number is raised only when a release that does not know it would read the file wrongly: another table or a column with a
default is no such change. See docs/compatibility.md for how a number is raised so that the release before can be gone back to.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from sync.errors import StoreFailed

FOLDER_FORMAT = 1
"""Of a data folder: which files it has, and where the store keeps its blobs."""
FORMAT_FILE = "format"
MAX_STAMP_BYTES = 64


def check_database(db: sqlite3.Connection, name: str, known: int) -> int:
    """The number `PRAGMA user_version` has on the disk, 0 = from before there were stamps.

    `name` tells the file in messages, `known` is the highest number this release reads. Raises StoreFailed.
    """
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    refuse_later(name, found, known)
    return found


def stamp_database(db: sqlite3.Connection, found: int, known: int) -> None:
    """Write `known`; nothing when it stands there: a full disk must not keep a node from starting."""
    if found != known:
        db.execute(f"PRAGMA user_version={known:d}")


def check_folder(data: Path, known: int = FOLDER_FORMAT) -> None:
    """Refuse a data folder of a later release, stamp one that has no stamp. Raises StoreFailed."""
    path = data / FORMAT_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_STAMP_BYTES)
    except FileNotFoundError:
        _write(path, known)
        return
    except OSError as error:
        raise StoreFailed(f"{path}: {error.strerror}") from error
    if not text.strip():  # a power cut between making the file and filling it
        _write(path, known)
        return
    try:
        found = int(text)
    except ValueError as error:
        raise StoreFailed(f"{path}: {text[:20]!r} is no format number") from error
    refuse_later(str(data), found, known)


def refuse_later(name: str, found: int, known: int) -> None:
    """Raises StoreFailed when `found` is above `known`."""
    if found > known:
        raise StoreFailed(
            f"{name} has format {found}, written by a later release; this one reads up to {known}. Nothing was changed: "
            "run the later release again, or restore a copy from before it"
        )


def _write(path: Path, number: int) -> None:
    # A full or read-only disk must not keep a node from starting: the stamp is written by a later start.
    with suppress(OSError), path.open("wb") as file:
        file.write(b"%d\n" % number)
        file.flush()
        os.fsync(file.fileno())
