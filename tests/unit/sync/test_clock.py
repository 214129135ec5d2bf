"""The clock's test hook: read only when it is set, at every call."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sync.clock import OFFSET_FILE, SystemClock


def test_without_the_hook_the_clock_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFFSET_FILE, raising=False)
    assert abs(SystemClock().wall() - time.time()) < 1


def test_the_wall_clock_jumps_with_the_file_and_the_monotonic_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "offset"
    path.write_text("+0")
    monkeypatch.setenv(OFFSET_FILE, str(path))
    clock = SystemClock()
    before = clock.monotonic()
    path.write_text("+34560000.000\n")
    assert abs(clock.wall() - time.time() - 400 * 86_400) < 1
    path.write_text("-7200")
    assert abs(clock.wall() - time.time() + 7_200) < 1
    assert 0 <= clock.monotonic() - before < 5


@pytest.mark.parametrize("text", ["soon", "1;2"])
def test_what_is_no_number_is_an_error_and_not_a_wrong_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    (tmp_path / "offset").write_text(text)
    monkeypatch.setenv(OFFSET_FILE, str(tmp_path / "offset"))
    with pytest.raises(ValueError):
        SystemClock().wall()


def test_a_file_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFSET_FILE, "/nowhere/offset")
    with pytest.raises(ValueError, match=OFFSET_FILE):
        SystemClock().wall()
