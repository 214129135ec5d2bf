"""What was accepted stays accepted, across restarts and in one piece."""

from __future__ import annotations

import resource
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def test_floors_and_condemned_versions_are_answered_while_the_disk_makes_a_write_wait(tmp_path: Path) -> None:
    state = StateStore(tmp_path / "state.db")
    state.activate(*version(1))
    state.condemn_candidate(*NAME, "digest 0", "bad")
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = threading.Thread(target=state.activate, args=version(2))
    writer.start()
    while not state._lock.locked():
        time.sleep(0)
    began = time.monotonic()
    assert (state.floor(*NAME), state.time_floor()) == (Floor(1, "digest 1"), 1.0)
    assert state.condemned(*NAME) == ("digest 0", "bad")
    assert time.monotonic() - began < 0.5
    other.execute("ROLLBACK")
    writer.join()
    assert state.floor(*NAME) == Floor(2, "digest 2")
    other.close()
    state.close()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: what a full disk says, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("goodbye", [True, False])
def test_a_full_disk_does_not_stop_a_restart_and_writing_works_again_once_there_is_room(
    tmp_path: Path, goodbye: bool
) -> None:
    state = StateStore(tmp_path / "state.db")
    state.activate(*version(1))
    state.activate(*version(2))
    if goodbye:
        state.close()
    else:
        there, tmp_path = tmp_path, tmp_path / "after a power cut"
        tmp_path.mkdir()
        for name in ("state.db", "state.db-wal"):
            (tmp_path / name).write_bytes((there / name).read_bytes())
    with full_disk():
        again = StateStore(tmp_path / "state.db")
        assert again.slots(*NAME) == Slots(b"envelope 2", b"envelope 1")
        assert again.floor(*NAME) == Floor(2, "digest 2")
        with pytest.raises(StoreFailed):
            again.accept(*version(3))
        assert again.floor(*NAME) == Floor(2, "digest 2")
    again.accept(*version(3))
    assert again.slots(*NAME).candidate == b"envelope 3"
    again.close()
    assert StateStore(tmp_path / "state.db").floor(*NAME) == Floor(3, "digest 3")


def test_a_new_store_on_a_full_disk_is_said_so(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(StoreFailed):
        StateStore(tmp_path / "state.db")
