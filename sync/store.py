"""Files by their content: `sha256:<hex>` names a read-only file that is complete and on the disk, or does not exist.

Layout: `root/blobs/<hex>` are published, `root/staging/<hex>.part` are downloads that can be resumed. Publishing is fsync,
rename, fsync of the folder: a power cut at any point leaves the file or nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sync.errors import StoreFailed
from sync.trust import check_digest


class BlobStore:
    """Raises StoreFailed when the disk refuses, Malformed for a string that is no digest (so no path can escape)."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._staging = root / "staging"
        with _disk("create the store"):
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

    def staging(self, digest: str) -> Path:
        """The file to write a download to; what an earlier attempt left in it may be continued."""
        return self._staging / f"{_hex(digest)}.part"

    def publish(self, digest: str, staged: Path) -> Path:
        """Make a staged file, whose digest the caller has checked, the blob. It is durable when this returns."""
        target = self.path(digest)
        with _disk(f"publish {digest}"):
            staged.chmod(0o444)
            _sync(staged)
            staged.rename(target)
            _sync(self._blobs)
        return target

    def digests(self) -> Iterator[str]:
        """Every published blob."""
        with _disk("list the store"):
            names = sorted(entry.name for entry in self._blobs.iterdir())
        return (f"sha256:{name}" for name in names)

    def sweep(self, keep: Collection[str]) -> int:
        """Remove blobs and half downloads that `keep` does not name. Returns how many files went.

        A process that has a removed file open keeps reading it.
        """
        kept = {_hex(digest) for digest in keep}
        removed = 0
        with _disk("sweep the store"):
            for folder in (self._blobs, self._staging):
                for entry in folder.iterdir():
                    if entry.stem not in kept:
                        entry.unlink()
                        removed += 1
        return removed


def _hex(digest: str) -> str:
    return check_digest(digest).removeprefix("sha256:")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"could not {what}: {error}") from error
