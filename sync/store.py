"""Files by their content: `sha256:<hex>` names a read-only file that is complete and on the disk, or does not exist.

Layout: `root/blobs/<hex>` are published, `root/staging/<hex>.part` are downloads that can be resumed. Publishing is fsync,
rename, fsync of the folder: a power cut at any point leaves the file or nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

from sync.durable import disk, flush
from sync.errors import Malformed
from sync.quota import Entry
from sync.trust import check_digest

TOUCH_SECONDS = 600.0
"""A use is written to the disk at most this often: it only has to tell the longest unused files from the others."""


class BlobStore:
    """Raises StoreFailed when the disk refuses, Malformed for a string that is no digest (so no path can escape)."""

    def __init__(self, root: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.root = root
        self.now = monotonic
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        self._lock = Lock()
        self._claimed: dict[str, float] = {}
        with disk("create the store"):
            for folder in (self._blobs, self._staging):
                folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._staging.iterdir():
                if leftover.suffix != ".part":
                    leftover.unlink()

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self._blobs / _hex(digest)

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def claim(self, digest: str) -> bool:
        """Whether the blob is here; then it counts as used now, and no sweep that has begun already removes it."""
        path = self.path(digest)
        with self._lock:
            if not path.is_file():
                return False
            before = self._claimed.get(digest)
            self._claimed[digest] = self.now()
        if before is None or self.now() - before > TOUCH_SECONDS:
            try:
                os.utime(path)
            except OSError:
                pass  # a disk that is read-only: it is still served
        return True

    def entries(self) -> Iterator[Entry]:
        """Every file and every half download, with its size and the time of its last use."""
        with disk("list the store"):
            for folder, half in ((self._blobs, False), (self._staging, True)):
                with os.scandir(folder) as found:
                    names = list(found)
                for entry in names:
                    try:
                        digest = check_digest(f"sha256:{entry.name.removesuffix('.part')}")
                        status = entry.stat(follow_symlinks=False)
                    except (Malformed, FileNotFoundError):
                        continue  # nothing of ours, or published or removed meanwhile
                    yield Entry(digest, status.st_size, status.st_mtime, half)

    def remove(self, entry: Entry, *, unless_claimed_since: float) -> bool:
        """Remove a file of `entries`; False when somebody claimed it, by the clock of `now`, or it was gone already.

        A process that has it open keeps reading it.
        """
        path = self.staging(entry.digest) if entry.half else self.path(entry.digest)
        with self._lock, disk(f"remove {entry.digest}"):
            if not entry.half and self._claimed.get(entry.digest, float("-inf")) >= unless_claimed_since:
                return False
            self._claimed.pop(entry.digest, None)
            try:
                path.unlink()
            except FileNotFoundError:
                return False
            return True

    def staging(self, digest: str) -> Path:
        """The file to write a download to; what an earlier attempt left in it may be continued."""
        return self._staging / f"{_hex(digest)}.part"

    def publish(self, digest: str, staged: Path) -> Path:
        """Make a staged file, whose digest the caller has checked, the blob. It is durable when this returns."""
        target = self.path(digest)
        with disk(f"publish {digest}"):
            staged.chmod(0o444)
            flush(staged)
            os.utime(staged)
            with self._lock:
                staged.rename(target)
                self._claimed[digest] = self.now()
            flush(self._blobs)
        return target

    def digests(self) -> Iterator[str]:
        """Every published blob."""
        with disk("list the store"):
            names = sorted(entry.name for entry in self._blobs.iterdir())
        return (f"sha256:{name}" for name in names)


def _hex(digest: str) -> str:
    return check_digest(digest).removeprefix("sha256:")
