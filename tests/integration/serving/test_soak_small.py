"""A slice of `make soak`: versions come and go under load, no request fails and no answer is another version's."""

from __future__ import annotations

from pathlib import Path

import pytest
from proofs import soak


@pytest.mark.timeout(90)
def test_swaps_and_reloads_under_load_fail_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SETTLE_SECONDS", 0.2)
    rows = soak.run(tmp_path, swaps=30, cycles=10, clients=8)
    # So few steps say nothing of memory: whether it grows is for the long run.
    assert soak.verdict(rows, growth=1.0) == [], rows
    assert all(row["answers"] > 100 for row in rows)
    assert rows[0]["versions_seen"] > 15
