"""What was accepted stays accepted, across restarts and in one piece."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sync.errors import StoreFailed
from sync.messages import Document
from sync.state import Floor, Slots, StateStore
from sync.trust import Verified


def version(revision: int) -> tuple[Verified, bytes]:
    document = Document("policy", "tenant:a", revision, float(revision), (), msgspec.Raw(b"{}"))
    return Verified(document, f"digest {revision}"), b"envelope %d" % revision


NAME = ("policy", "tenant:a")


def test_a_new_store_knows_nothing(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "new" / "state.db")
    assert state.floor(*NAME) == Floor()
    assert state.slots(*NAME) == Slots()
    assert (state.time_floor(), state.condemned(*NAME)) == (0.0, ("", ""))
    state.close()


def test_everything_survives_a_restart_without_goodbye(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    state.accept(*version(1))
    state.activate(*version(1))
    state.end_start(*NAME, "active", confirmed=True)
    state.activate(*version(2))
    state.accept(*version(3))
    again = StateStore(tmp_path / "state.db")
    assert again.slots(*NAME) == Slots(b"envelope 2", b"envelope 1", b"envelope 3")
    assert again.floor(*NAME) == Floor(3, "digest 3")
    assert again.time_floor() == 3.0
    assert again.slots("desired", "tenant:a") == Slots()


def test_a_floor_never_sinks(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    state.accept(*version(5))
    state.activate(*version(4))
    state.roll_back(*NAME, "digest 4", "bad")
    assert state.floor(*NAME) == Floor(5, "digest 5")
    assert state.time_floor() == 5.0
    assert state.condemned(*NAME) == ("digest 4", "bad")


def test_starts_are_counted_until_they_are_confirmed_and_per_envelope(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    assert state.begin_start(*NAME, "candidate") == 0
    state.accept(*version(1))
    assert [state.begin_start(*NAME, "candidate") for _ in range(2)] == [1, 2]
    state.accept(*version(1))
    assert state.begin_start(*NAME, "candidate") == 3
    state.end_start(*NAME, "candidate", confirmed=False)
    assert state.begin_start(*NAME, "candidate") == 1
    state.accept(*version(2))
    assert state.begin_start(*NAME, "candidate") == 1


@pytest.mark.parametrize("waiting", [None, 3])
def test_demoting_makes_the_previous_version_active_and_keeps_the_newest_candidate(
    tmp_path: Path, waiting: int | None
) -> None:
    state = StateStore(tmp_path / "state.db")
    state.activate(*version(1))
    state.activate(*version(2))
    if waiting:
        state.accept(*version(waiting))
    state.demote(*NAME)
    assert state.slots(*NAME) == Slots(b"envelope 1", None, b"envelope %d" % (waiting or 2))


def test_a_failed_transaction_leaves_nothing_half_done(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    good, _ = version(1)
    with pytest.raises(StoreFailed):
        state.accept(good, None)  # type: ignore[arg-type]
    assert state.floor(*NAME) == Floor()
    state.accept(*version(1))


def test_a_file_that_is_no_database_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreFailed):
        StateStore(tmp_path / "state.db")
