"""What goes when there is no room: half downloads first, then the longest unused, never what documents name."""

from __future__ import annotations

import pytest

from sync.errors import InvalidConfig, StoreFailed
from sync.quota import Entry, Quota, check_room, to_remove

PLENTY = 1 << 40
OPEN = Quota(cache_bytes=1 << 40, free_bytes=0)


def names(entries: object) -> list[str]:
    return [entry.digest for entry in entries]  # type: ignore[attr-defined]


FILES = [Entry("new", 10, 3.0), Entry("old", 10, 1.0), Entry("half", 10, 9.0, half=True), Entry("needed", 10, 0.0)]


def test_nothing_goes_while_all_limits_hold() -> None:
    assert to_remove(FILES, {"needed"}, (), OPEN, PLENTY) == []


def test_a_node_that_mirrors_nothing_keeps_nothing_that_no_document_names() -> None:
    assert names(to_remove(FILES, {"needed"}, (), Quota(), PLENTY)) == ["half", "old", "new"]


@pytest.mark.parametrize(
    ("cache", "gone"), [(30, []), (29, ["half"]), (20, ["half"]), (19, ["half", "old"]), (9, ["half", "old", "new"])]
)
def test_the_cache_loses_half_downloads_first_then_the_longest_unused(cache: int, gone: list[str]) -> None:
    assert names(to_remove(FILES, {"needed"}, (), Quota(cache_bytes=cache, free_bytes=0), PLENTY)) == gone


def test_room_for_what_comes_is_made_from_the_cache_alone() -> None:
    quota = Quota(max_bytes=40, cache_bytes=1000, free_bytes=0)
    assert names(to_remove(FILES, {"needed"}, (), quota, PLENTY, room=15)) == ["half", "old"]
    assert names(to_remove(FILES, {"needed"}, (), quota, PLENTY, room=1000)) == ["half", "old", "new"]


def test_a_disk_that_fills_takes_from_the_cache() -> None:
    quota = Quota(cache_bytes=1000, free_bytes=100)
    assert names(to_remove(FILES, {"needed"}, (), quota, free=95)) == ["half"]


def test_what_is_being_written_stays() -> None:
    assert names(to_remove(FILES, {"needed"}, {"half"}, Quota(), PLENTY)) == ["old", "new"]


def test_no_room_is_said_with_figures() -> None:
    with pytest.raises(StoreFailed, match="quota is 50"):
        check_room(45, PLENTY, 6, Quota(max_bytes=50))
    with pytest.raises(StoreFailed, match="the disk has 5 left"):
        check_room(0, 5, 1, Quota(free_bytes=5))
    check_room(44, PLENTY, 6, Quota(max_bytes=50))


@pytest.mark.parametrize("field", ["max_bytes", "cache_bytes", "free_bytes"])
def test_a_bad_quota_is_refused_naming_the_field(field: str) -> None:
    with pytest.raises(InvalidConfig, match=f"store.{field}"):
        Quota(**{field: -1})
