"""Files by digest, in a folder today and in any object store that obstore speaks to tomorrow.

A file is written under a staging name, checked against its digest while it streams by, then renamed: what stands under a
digest has that digest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore

from models.errors import InvalidRequest, NotFound, TooLarge, TryAgain
from models.manifest import MAX_VARIANT_BYTES
from sync.durable import flush
from sync.errors import Malformed
from sync.trust import check_digest

MAX_BLOB_BYTES = MAX_VARIANT_BYTES
CHUNK_BYTES = 256 * 1024
"""Read at a time when a file is sent: large enough to be cheap, small enough for many readers."""
MAX_UPLOADS = 16
"""Files received at the same time; further ones wait their turn."""


class Blobs:
    """Async; every method checks the digest's form and raises InvalidRequest for a bad one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store = LocalStore(prefix=root, mkdir=True)
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)
        for name in ("staging", "sha256"):
            (root / name).mkdir(exist_ok=True)
        for left_over in (root / "staging").iterdir():
            left_over.unlink()

    def path(self, digest: str) -> Path:
        """Where a file lies, or would."""
        return self._root / _key(digest)

    async def size(self, digest: str) -> int | None:
        """Bytes of a file, None when it is not here."""
        try:
            return int((await obstore.head_async(self._store, _key(digest)))["size"])
        except (NotFoundError, FileNotFoundError):
            return None

    async def put(self, digest: str, chunks: AsyncIterator[bytes], limit: int = MAX_BLOB_BYTES) -> tuple[int, bool]:
        """Receive a file; (its size, whether it is new).

        Raises InvalidRequest when the bytes do not have the digest, TooLarge above `limit` bytes, TryAgain when the disk
        refuses. Nothing is left behind then.
        """
        key, staged = _key(digest), f"staging/{uuid4().hex}"
        check = _Check(chunks, limit)
        async with self._uploads:
            try:
                await obstore.put_async(self._store, staged, check.stream())
                check.finish(digest)
                created = await self.size(digest) is None
                await asyncio.to_thread(flush, self._root / staged)
                await obstore.rename_async(self._store, staged, key)
                await asyncio.to_thread(flush, (self._root / key).parent)
            except (BaseError, OSError) as error:
                raise TryAgain(f"the blob store refused: {error}") from error
            finally:
                (self._root / staged).unlink(missing_ok=True)
        return check.size, created

    async def put_bytes(self, digest: str, content: bytes) -> None:
        """Store a small file that is in memory already."""

        async def once() -> AsyncIterator[bytes]:
            yield content

        await self.put(digest, once())

    async def read(self, digest: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (exclusive) in chunks. Raises NotFound, TryAgain when the disk refuses."""
        try:
            found = await obstore.get_async(self._store, _key(digest), options={"range": (start, end)})
            async for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except (NotFoundError, FileNotFoundError) as error:
            raise NotFound(f"no blob {digest}") from error
        except (BaseError, OSError) as error:
            raise TryAgain(f"the blob store refused: {error}") from error


class _Check:
    """Counts and hashes what streams by."""

    def __init__(self, chunks: AsyncIterator[bytes], limit: int) -> None:
        self._chunks = chunks
        self._limit = limit
        self._hash = sha256()
        self.size = 0

    async def stream(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self.size += len(chunk)
            if self.size > self._limit:
                raise TooLarge(f"the file has more than {self._limit} bytes")
            self._hash.update(chunk)
            yield chunk

    def finish(self, digest: str) -> None:
        actual = f"sha256:{self._hash.hexdigest()}"
        if self.size == 0:
            raise InvalidRequest("the file is empty")
        if actual != digest:
            raise InvalidRequest(f"the bytes received are {actual}, not {digest}")


def _key(digest: str) -> str:
    try:
        return check_digest(digest).replace(":", "/")
    except Malformed as error:
        raise InvalidRequest(str(error)) from error
