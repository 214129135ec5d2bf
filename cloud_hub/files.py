"""One hub per data folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sync.errors import InvalidConfig


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
