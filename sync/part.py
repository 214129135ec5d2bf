"""A half download: one file, one writer. What a transfer adds to it and another publishes must never be the same inode."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from sync.durable import disk
from sync.errors import Unavailable

CHUNK = 256 * 1024


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Part:
    """The file under `path`, locked for as long as it is open. Raises StoreFailed when the disk refuses."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file

    def length(self) -> int:
        with disk(f"write {self._path}"):
            return os.fstat(self._file.fileno()).st_size

    def hash(self, hasher: Hash, length: int) -> None:
        """Feed the first `length` bytes to `hasher`; writing continues behind them."""
        with disk(f"write {self._path}"):
            self._file.seek(0)
            while length and (block := self._file.read(min(CHUNK, length))):
                hasher.update(block)
                length -= len(block)

    def restart(self) -> None:
        with disk(f"write {self._path}"):
            self._file.seek(0)
            self._file.truncate()

    def write(self, chunk: bytes) -> None:
        with disk(f"write {self._path}"):
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]

    def remove(self) -> None:
        with disk(f"write {self._path}"):
            self._path.unlink(missing_ok=True)


@contextmanager
def taken(path: Path) -> Iterator[Part]:
    """Open `path` for this transfer alone. Raises Unavailable while another one, perhaps given up on, still has it."""
    with _opened(path) as file:
        yield Part(path, file)


def _opened(path: Path) -> BinaryIO:
    while True:
        with disk(f"write {path}"):
            # Appending opens without truncating. Unbuffered, so that a full disk shows at the write and not at the close.
            file = path.open("a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(path, file):
                    return file
            except BlockingIOError as error:
                file.close()
                raise Unavailable(f"another transfer still writes {path.name}") from error
            except BaseException:
                file.close()
                raise
            file.close()  # published or removed between the open and the lock: that inode is nobody's to write any more


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
