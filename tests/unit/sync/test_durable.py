"""What is written whole is on the disk before it gets its name, and its name before anybody is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sync.durable import disk, write_new, write_whole
from sync.errors import StoreFailed


def test_bytes_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def flushed(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "bytes")
        fsync(descriptor)

    def named(staged: Path, target: Path) -> Path:
        order.append("name")
        return replace(staged, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", named)
    write_whole(tmp_path / "state", b"new")
    assert order == ["bytes", "name", "folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_is_never_readable_beyond_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "key").write_bytes(b"old")
    (tmp_path / "key").chmod(0o666)
    write_whole(tmp_path / "key", b"new", mode)
    assert (tmp_path / "key").stat().st_mode & 0o777 & ~mode == 0


def test_what_a_killed_writer_left_does_not_hinder_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".state.new").write_bytes(b"half")
    write_whole(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


def test_a_new_file_takes_no_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with pytest.raises(StoreFailed, match="could not keep it: "), disk("keep it"):
        write_new(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"old"
