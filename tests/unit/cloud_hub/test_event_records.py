"""What every node may keep at the hub is the same for all of them, and as much as fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.event_records import fair_share


def test_only_those_who_have_more_than_the_others_lose_something() -> None:
    assert fair_share([10, 20, 1_000_000], 100) == 70
    assert fair_share([10, 20, 30], 60) is None
    assert fair_share([], 0) is None


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(0, 500))
def test_what_is_kept_fits_and_no_larger_share_would(weights: list[int], most: int) -> None:
    share = fair_share(weights, most)
    if share is None:
        assert sum(weights) <= most
    else:
        assert sum(min(weight, share) for weight in weights) <= most
        assert sum(min(weight, share + 1) for weight in weights) > most
