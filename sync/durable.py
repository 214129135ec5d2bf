"""Files that a power cut leaves whole: the one place that knows the order of write, flush, rename and flush of the folder.

Without the flush of the file a rename may be kept and the bytes lost; without that of the folder the rename itself may be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sync.errors import StoreFailed


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `content`: after a power cut it has the old content or the new, and this one once this has returned.

    At no time is it readable beyond `mode`. Raises OSError.
    """
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    write_new(staged, content, mode)
    staged.replace(path)
    flush(path.parent)


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Make the file `path`, its bytes on the disk; its name is there for good once its folder is flushed. Raises OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk(what: str) -> Iterator[None]:
    """OSError inside becomes StoreFailed: `could not <what>: ...`."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"could not {what}: {error}") from error
