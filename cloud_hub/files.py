"""Writing small files so that a power cut leaves the old one or the new one; one hub per data folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sync.errors import InvalidConfig


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Replace `path` by `content`; at no time is it readable beyond `mode`. Raises OSError."""
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(data: Path) -> Iterator[None]:
    """Keep `data`, made when absent, for this process until the block ends. The kernel ends the lock with the process.

    Raises InvalidConfig when another hub has it, OSError.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidConfig(f"data: {data} is in use by another hub") from error
        yield
