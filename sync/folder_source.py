"""A folder as a source of files: what a medium brought. Trusted for nothing, like every other source."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from threading import Event

from sync.download import Mismatch
from sync.errors import Absent, Malformed, Unavailable
from sync.part import CHUNK, Part

SCHEME = "file://"
_PATH = re.compile(r"/(?:blobs/sha256:[0-9a-f]{64}|tuf/[A-Za-z0-9.-]{1,64})")


class FolderRead:
    """One file of the folder that `url` names; the same methods as `sync.download.Download`."""

    def __init__(self, url: str, path: str) -> None:
        self.received = 0
        self.resumed = False
        self._name = url + path
        self._path = Path(url.removeprefix(SCHEME) + path.replace("sha256:", "")) if _PATH.fullmatch(path) else None
        self._stopped = Event()
        self._why = ""

    def stop(self, why: str = "the transfer was cancelled") -> None:
        self._why = self._why or why
        self._stopped.set()

    def into(self, part: Part, digest: str, size: int) -> None:
        """Make `part` the `size` bytes of `digest`. Raises Absent, Unavailable, Mismatch (deleted), StoreFailed."""
        hasher, done = sha256(), 0
        part.restart()
        for chunk in self._chunks(size + 1):
            part.write(chunk)
            hasher.update(chunk)
            done += len(chunk)
        if done != size or f"sha256:{hasher.hexdigest()}" != digest:
            part.remove()
            raise Mismatch(f"{self._name} holds other bytes than were signed for")

    def read(self, limit: int) -> bytes:
        """The whole file. Raises Absent, Unavailable, Malformed when it is longer than `limit` bytes."""
        data = b"".join(self._chunks(limit + 1))
        if len(data) > limit:
            raise Malformed(f"{self._name} has more than {limit} bytes")
        return data

    def size(self) -> int:
        """Bytes of the file. Raises Absent, Unavailable."""
        descriptor = self._open()
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        if self._path is None:
            raise Absent(f"{self._name}: a folder has no such file")
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise Absent(f"{self._name} is not there") from error
        except OSError as error:
            raise Unavailable(f"{self._name}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Unavailable(f"{self._name} is no file")
        return descriptor

    def _chunks(self, most: int) -> Iterator[bytes]:
        descriptor = self._open()
        try:
            while most > 0 and (chunk := os.read(descriptor, min(CHUNK, most))):
                if self._stopped.is_set():
                    raise Unavailable(f"{self._name}: {self._why}")
                most -= len(chunk)
                self.received += len(chunk)
                yield chunk
        except OSError as error:
            raise Unavailable(f"{self._name}: {error.strerror}") from error
        finally:
            os.close(descriptor)
