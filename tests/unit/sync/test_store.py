"""A blob is complete and right, or it is not there."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from sync.errors import Malformed, StoreFailed
from sync.store import BlobStore


def digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def put(store: BlobStore, data: bytes) -> str:
    name = digest(data)
    store.staging(name).write_bytes(data)
    store.publish(name, store.staging(name))
    return name


def test_a_published_blob_is_read_only_and_its_staging_is_gone(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name = put(store, b"one")
    assert store.has(name)
    assert store.path(name).read_bytes() == b"one"
    assert store.path(name).stat().st_mode & 0o777 == 0o444
    assert not store.staging(name).exists()
    assert list(store.digests()) == [name]


@pytest.mark.parametrize(
    "bad", ["", "sha256:", "sha256:../x", "sha256:" + "A" * 64, "md5:" + "a" * 64, "sha256:" + "a" * 63]
)
def test_no_string_but_a_digest_reaches_the_file_system(tmp_path: Path, bad: str) -> None:
    store = BlobStore(tmp_path)
    for method in (store.path, store.has, store.staging):
        with pytest.raises(Malformed):
            method(bad)


def test_entries_are_files_and_half_downloads_with_their_sizes(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    whole, half = put(store, b"whole"), digest(b"half")
    store.staging(half).write_bytes(b"ha")
    (tmp_path / "blobs" / "stray").write_bytes(b"nothing of ours")
    assert {(entry.digest, entry.size, entry.half) for entry in store.entries()} == {(whole, 5, False), (half, 2, True)}


def test_a_file_claimed_after_a_sweep_began_is_not_removed_by_it(tmp_path: Path) -> None:
    now = [100.0]
    store = BlobStore(tmp_path, monotonic=lambda: now[0])
    name = put(store, b"one")
    entry = next(store.entries())
    now[0] = began = 200.0
    assert store.claim(name)
    assert not store.remove(entry, unless_claimed_since=began)
    assert store.has(name)
    assert store.remove(entry, unless_claimed_since=began + 1)
    assert not store.claim(name)
    assert not store.remove(entry, unless_claimed_since=began + 1)


def test_resumable_parts_survive_a_restart_and_other_leftovers_do_not(tmp_path: Path) -> None:
    part = BlobStore(tmp_path).staging(digest(b"x"))
    part.write_bytes(b"half")
    leftover = part.with_suffix(".tmp")
    leftover.write_bytes(b"")
    BlobStore(tmp_path)
    assert part.exists()
    assert not leftover.exists()


def test_a_disk_that_refuses_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreFailed):
        BlobStore(tmp_path / "file")
    store = BlobStore(tmp_path)
    with pytest.raises(StoreFailed):
        store.publish(digest(b"x"), tmp_path / "missing")
