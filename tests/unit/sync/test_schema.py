"""A folder of a later release is refused; one without a stamp gets it when the disk lets us."""

from __future__ import annotations

from pathlib import Path

import pytest

from sync.errors import StoreFailed
from sync.schema import FOLDER_FORMAT, FORMAT_FILE, check_folder


def test_a_folder_without_a_stamp_is_stamped_once(tmp_path: Path) -> None:
    for _ in range(2):
        check_folder(tmp_path)
        assert int((tmp_path / FORMAT_FILE).read_text()) == FOLDER_FORMAT


def test_a_stamp_that_a_power_cut_left_empty_is_written_again(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).touch()
    check_folder(tmp_path)
    assert int((tmp_path / FORMAT_FILE).read_text()) == FOLDER_FORMAT


def test_a_folder_of_a_later_release_is_refused_by_both_numbers(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text("9\n")
    with pytest.raises(StoreFailed, match=f"format 9, .*reads up to {FOLDER_FORMAT}"):
        check_folder(tmp_path)
    assert (tmp_path / FORMAT_FILE).read_text() == "9\n"


def test_a_stamp_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text("nine")
    with pytest.raises(StoreFailed, match="'nine' is no format number"):
        check_folder(tmp_path)


def test_a_disk_that_takes_no_stamp_keeps_nobody_from_starting(tmp_path: Path) -> None:
    check_folder(tmp_path / "missing")
