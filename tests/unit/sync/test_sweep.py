"""The store stays within its quota while the node runs, and what documents name stays in the store."""

from __future__ import annotations

import asyncio
import os
from hashlib import sha256
from pathlib import Path

import pytest

from sync.errors import StoreFailed
from sync.quota import Quota
from sync.store import BlobStore
from sync.sweep import SWEEP_SECONDS, Sweeper, Usage
from sync.testing import FakeClock


class Place:
    def __init__(self, folder: Path, **quota: int) -> None:
        self.now = 0.0
        self.store = BlobStore(folder, monotonic=lambda: self.now)
        self.needed: set[str] = set()
        self.free = 1 << 40
        self.clock = FakeClock()
        self.asked = 0
        self.sweeper = Sweeper(self.store, self.names, Quota(**quota), self.clock, free=lambda path: self.free)

    def names(self) -> set[str]:
        self.asked += 1
        return set(self.needed)

    def put(self, data: bytes, used: float) -> str:
        digest = f"sha256:{sha256(data).hexdigest()}"
        self.store.staging(digest).write_bytes(data)
        os.utime(self.store.publish(digest, self.store.staging(digest)), (used, used))
        self.now += 1
        return digest

    def half(self, data: bytes) -> str:
        digest = f"sha256:{sha256(data).hexdigest()}"
        self.store.staging(digest).write_bytes(data[: len(data) // 2])
        return digest


async def test_a_sweep_removes_what_no_document_names(tmp_path: Path) -> None:
    place = Place(tmp_path)
    kept, gone, half = place.put(b"kept", 1), place.put(b"gone", 2), place.half(b"half a file")
    place.needed = {kept}
    assert await place.sweeper.sweep() == 2
    assert (place.store.has(kept), place.store.has(gone), place.store.staging(half).exists()) == (True, False, False)
    assert (await place.sweeper.usage()).removed == 2
    assert place.sweeper.removed_bytes == len(b"gone") + len(b"half a file") // 2
    assert place.sweeper.latest == Usage(total=4, needed=4, free=place.free, removed=2)
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(StoreFailed):
        await place.sweeper.usage()
    assert place.sweeper.latest is None


async def test_a_cache_keeps_the_files_used_last(tmp_path: Path) -> None:
    place = Place(tmp_path, cache_bytes=8, free_bytes=0)
    files = [place.put(bytes([65 + number]) * 4, used=number) for number in range(4)]
    await place.sweeper.sweep()
    assert [place.store.has(file) for file in files] == [False, False, True, True]


async def test_room_is_made_before_a_download_and_refused_when_there_is_none(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=20, cache_bytes=100, free_bytes=0)
    needed, cached = place.put(b"n" * 10, 1), place.put(b"c" * 10, 2)
    place.needed = {needed}
    async with place.sweeper.room_for("sha256:" + "0" * 64, 10):
        assert not place.store.has(cached)
        with pytest.raises(StoreFailed, match="no room for"):
            async with place.sweeper.room_for("sha256:" + "1" * 64, 1):
                raise AssertionError
    async with place.sweeper.room_for("sha256:" + "1" * 64, 10):
        assert place.store.has(needed)


async def test_a_download_under_way_is_neither_removed_nor_counted_twice(tmp_path: Path) -> None:
    place = Place(tmp_path, max_bytes=10, free_bytes=0)
    half = place.half(b"x" * 10)
    async with place.sweeper.room_for(half, 10):
        await place.sweeper.sweep()
        assert place.store.staging(half).exists()
    await place.sweeper.sweep()
    assert not place.store.staging(half).exists()


async def test_a_full_disk_is_said_before_it_is_full(tmp_path: Path) -> None:
    place = Place(tmp_path, free_bytes=100)
    place.free = 105
    with pytest.raises(StoreFailed, match="the disk has 105 left"):
        async with place.sweeper.room_for("sha256:" + "0" * 64, 6):
            raise AssertionError
    async with place.sweeper.room_for("sha256:" + "0" * 64, 5):
        pass


async def test_it_sweeps_when_told_and_now_and_then_and_survives_a_disk_that_refuses(tmp_path: Path) -> None:
    place = Place(tmp_path)
    running = asyncio.create_task(place.sweeper.run())

    async def swept(times: int) -> None:
        async with asyncio.timeout(3):
            while place.asked < times:
                await asyncio.sleep(0.001)

    try:
        await asyncio.sleep(0)
        (tmp_path / "blobs").rename(tmp_path / "away")
        place.sweeper.look_again()
        await swept(1)
        (tmp_path / "away").rename(tmp_path / "blobs")
        async with asyncio.timeout(3):
            while not place.clock.sleepers:
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        place.clock.advance(1.5 * SWEEP_SECONDS)
        await swept(2)
    finally:
        running.cancel()
        await asyncio.wait({running})
