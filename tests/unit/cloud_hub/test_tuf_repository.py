"""The repository says what the database says: after every change, after a crash between two files, and before it expires."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_hub import tuf_metadata as tuf
from cloud_hub.keys import open_keys
from cloud_hub.tuf_repository import TIMESTAMP_SECONDS, Repository
from models.errors import TryAgain
from sync.errors import Malformed
from sync.testing import FakeClock
from sync.trust import digest_of

A, B = digest_of(b"a"), digest_of(b"b")
RING = (digest_of(b"ring"), 4)


class Hub:
    def __init__(self, data: Path) -> None:
        self.data, self.clock = data, FakeClock()
        self.start()

    def start(self) -> None:
        self.repository = Repository(self.data, open_keys(self.data), self.clock)

    def names(self) -> set[str]:
        return {path.name for path in (self.data / "tuf").glob("*.json")}

    def timestamp(self) -> tuf.Timestamp:
        data = self.repository.read("timestamp.json")
        assert data is not None
        return tuf.read(data, tuf.Timestamp).signed

    def listed(self) -> set[str]:
        """Every approved file, read as a client follows it: timestamp, snapshot, bins."""
        number = self.timestamp().snapshot_meta.version
        data = self.repository.read(f"{number}.snapshot.json")
        assert data is not None
        found: set[str] = set()
        for name, meta in tuf.read(data, tuf.Snapshot).signed.meta.items():
            data = self.repository.read(f"{meta.version}.{name}")
            assert data is not None
            found |= tuf.read(data, tuf.Targets).signed.targets.keys()
        return {f"sha256:{name.removeprefix('sha256/')}" for name in found if name.startswith("sha256/")}


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    made = Hub(tmp_path)
    made.repository.publish({A: 1}, RING)
    return made


def test_a_change_signs_the_bins_that_changed_and_nothing_else(hub: Hub) -> None:
    before = hub.names()
    hub.clock.advance(1)
    assert hub.repository.publish({A: 1, B: 1}, RING)
    new = {name.partition(".")[2] for name in hub.names() - before}
    assert new == {f"{tuf.bin_of('sha256/' + B.removeprefix('sha256:'))}.json", "snapshot.json"}
    assert hub.listed() == {A, B}


def test_what_is_said_already_is_not_signed_again(hub: Hub) -> None:
    before = {name: (hub.data / "tuf" / name).read_bytes() for name in hub.names()}
    assert not hub.repository.publish({A: 1}, RING)
    hub.start()
    assert not hub.repository.publish({A: 1}, RING)
    assert {name: (hub.data / "tuf" / name).read_bytes() for name in hub.names()} == before


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_crash_between_two_files_heals_at_the_next_start(hub: Hub, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """The old state stays whole until the timestamp is written; then the new one is there."""
    steps = ["_bring_bins", "_bring_snapshot", "_bring_timestamp"]
    with monkeypatch.context() as patch:
        for step in steps[cut:]:
            patch.setattr(Repository, step, lambda *arguments: (_ for _ in ()).throw(OSError("power cut")))
        hub.clock.advance(1)
        if cut < 3:
            with pytest.raises(OSError, match="power cut"):
                hub.repository.publish({A: 1, B: 1}, RING)
            assert hub.listed() == {A}
    hub.start()
    hub.clock.advance(1)
    hub.repository.publish({A: 1, B: 1}, RING)
    assert hub.listed() == {A, B}


def test_everything_is_signed_again_before_it_expires(hub: Hub) -> None:
    began = hub.clock.wall()
    while hub.clock.wall() < began + 200 * tuf.DAY:
        hub.clock.advance(5 * TIMESTAMP_SECONDS)
        hub.repository.renew()
        left = {role: at - hub.clock.wall() for role, at in hub.repository.expiries().items()}
        assert min(left.values()) > tuf.DAY / 2, left
    assert hub.listed() == {A}


def test_versions_rise_even_when_the_hub_is_restored_from_a_backup(hub: Hub) -> None:
    backup = {path: path.read_bytes() for path in (hub.data / "tuf").glob("*.json")}
    hub.clock.advance(100)
    hub.repository.publish({A: 1, B: 1}, RING)
    seen = hub.timestamp()
    for path in (hub.data / "tuf").glob("*.json"):
        path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    hub.start()
    hub.clock.advance(100)
    hub.repository.publish({A: 1, B: 2}, RING)
    assert hub.timestamp().version > seen.version
    assert hub.timestamp().snapshot_meta.version > seen.snapshot_meta.version


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "bin-00"])
def test_a_damaged_file_is_kept_aside_and_replaced_under_a_higher_version(hub: Hub, role: str) -> None:
    (path,) = (path for path in (hub.data / "tuf").glob("*.json") if path.name.endswith(f"{role}.json"))
    path.write_bytes(b"{")
    hub.start()
    hub.clock.advance(1)
    hub.repository.publish({A: 1}, RING)
    (aside,) = (hub.data / "tuf" / "damaged").iterdir()
    assert aside.read_bytes() == b"{"
    assert hub.listed() == {A}


def test_a_damaged_root_stops_the_hub_instead_of_orphaning_its_nodes(hub: Hub) -> None:
    (hub.data / "tuf" / "1.root.json").write_bytes(b"{}")
    with pytest.raises(Malformed, match="restore it from a backup"):
        hub.start()


def test_a_missing_key_is_named_and_changes_nothing(hub: Hub) -> None:
    (hub.data / "keys" / "snapshot.key").unlink()
    hub.start()
    before = hub.timestamp().version
    with pytest.raises(TryAgain, match="role snapshot"):
        hub.repository.publish({A: 1, B: 1}, RING)
    assert hub.timestamp().version == before
    assert any("snapshot" in problem for problem in hub.repository.problems())


@pytest.mark.parametrize(
    "name", ["../keys/targets.key", "timestamp.json/..", "0.root.json", "root.json", "1.bin-zz.json"]
)
def test_only_metadata_can_be_read(hub: Hub, name: str) -> None:
    assert hub.repository.read(name) is None
