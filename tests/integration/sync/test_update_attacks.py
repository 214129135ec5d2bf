"""The table of update attacks: each is played against a node, nothing of it is accepted, and the refusal says why.

An attack prepares what it controls - the mirror, stolen keys, the cache, the clock - and says what the node is then asked to
install. Accepted would mean that the node gets to fetch a file that is not approved now.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cloud_hub import ceremony
from cloud_hub import tuf_metadata as tuf
from cloud_hub.tuf_repository import Repository
from sync.errors import SyncError
from sync.testing import FakeClock
from sync.trust import Keyring, SigningKey, digest_of, encode_keyring
from tests.integration.sync.update_site import DAY, EVIL, GOOD, NODE, OLD, SIZE, THIEF, Site

Attack = Callable[[Site], Awaitable[bytes]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's folder to start from: making the first 256 bins takes longer than an attack."""
    folder = tmp_path_factory.mktemp("template")
    Site(folder, FakeClock()).stop()
    return folder / "hub"


@pytest.fixture
def site(hub: Path, tmp_path: Path):
    shutil.copytree(hub, tmp_path / "hub")
    made = Site(tmp_path, FakeClock())
    yield made
    made.stop()


def honest(site: Site, digest: str) -> bytes:
    """What the hub itself, or who stole its envelope key, would send."""
    return site.document(digest, site.keys.documents)


def swap(site: Site, role: str, data: bytes) -> None:
    site.mirror.served[site.name_of(role)] = data


# --- what is not signed by whom it must be -----------------------------------------------------------------------


async def arbitrary_bin(site: Site) -> bytes:
    path, data = site.evil_bin(THIEF)
    site.mirror.served[path] = data
    return honest(site, EVIL)


async def arbitrary_targets(site: Site) -> bytes:
    swap(site, "targets", site.forge("targets", lambda metadata: None, [THIEF]))
    return honest(site, EVIL)


async def arbitrary_snapshot(site: Site) -> bytes:
    swap(site, "snapshot", site.forge("snapshot", lambda metadata: None, [THIEF]))
    return honest(site, EVIL)


async def arbitrary_timestamp(site: Site) -> bytes:
    swap(site, "timestamp", site.forge("timestamp", lambda metadata: None, [THIEF]))
    return honest(site, EVIL)


async def arbitrary_root(site: Site) -> bytes:
    def next_root(metadata) -> None:
        metadata.signed.version += 1

    site.mirror.served["/tuf/2.root.json"] = site.forge("root", next_root, [THIEF, SigningKey.from_bytes(b"\x67" * 32)])
    return honest(site, EVIL)


async def unsigned_metadata(site: Site) -> bytes:
    swap(site, "timestamp", site.forge("timestamp", lambda metadata: None, []))
    return honest(site, EVIL)


async def other_keyring(site: Site) -> bytes:
    site.mirror.served[f"/blobs/{digest_of(site.keyring)}"] = encode_keyring(Keyring((THIEF.key("desired"),)))
    return site.document(GOOD, THIEF)


# --- old things again ----------------------------------------------------------------------------------------------


async def withdrawn(site: Site) -> dict[str, bytes]:
    """The node has seen that OLD is approved no more; what the hub served before."""
    before = site.capture()
    await site.know()
    site.publish({GOOD: SIZE})
    await site.packages.refresh()
    site.clock.advance(120)
    return before


async def withdrawn_version(site: Site) -> bytes:
    await withdrawn(site)
    return honest(site, OLD)


async def replayed_repository(site: Site) -> bytes:
    site.mirror.frozen = await withdrawn(site)
    return honest(site, OLD)


async def replayed_snapshot(site: Site) -> bytes:
    old = await withdrawn(site)
    site.publish({GOOD: SIZE, EVIL: SIZE})
    site.publish({GOOD: SIZE})
    swap(site, "snapshot", next(data for path, data in old.items() if "snapshot" in path))
    return honest(site, OLD)


async def replayed_targets(site: Site) -> bytes:
    old = site.capture()
    await site.know()
    envelope = honest(site, OLD)
    ceremony.rotate(site.hub, "documents", site.clock)
    site.open_hub()
    swap(site, "targets", next(data for path, data in old.items() if ".targets." in path))
    return envelope


async def replayed_bin(site: Site) -> bytes:
    old = site.capture()
    await site.know()
    site.publish({GOOD: SIZE})
    role = tuf.bin_of(f"sha256/{OLD.removeprefix('sha256:')}")
    swap(site, role, next(data for path, data in old.items() if f".{role}." in path))
    return honest(site, OLD)


async def bin_of_another_bin(site: Site) -> bytes:
    role, other = (tuf.bin_of(f"sha256/{digest.removeprefix('sha256:')}") for digest in (GOOD, OLD))
    data = site.repository.read(site.name_of(other).removeprefix("/tuf/"))
    assert data is not None
    swap(site, role, data)
    return honest(site, GOOD)


async def mixed_states(site: Site) -> bytes:
    """The new timestamp with everything else as it was."""
    old = await withdrawn(site)
    site.publish({GOOD: SIZE, EVIL: SIZE})
    site.mirror.frozen = {**old, "/tuf/timestamp.json": site.capture()["/tuf/timestamp.json"]}
    return honest(site, OLD)


async def freeze(site: Site) -> bytes:
    site.mirror.frozen = await withdrawn(site)
    site.mirror.frozen = site.capture()
    site.clock.advance(2 * DAY)
    return honest(site, GOOD)


async def rollback_with_zeroed_cache(site: Site) -> bytes:
    site.mirror.frozen = await withdrawn(site)
    site.zero_cache()
    return honest(site, OLD)


async def rollback_with_deleted_cache(site: Site) -> bytes:
    site.mirror.frozen = await withdrawn(site)
    site.delete_cache()
    return honest(site, OLD)


async def rollback_with_deleted_cache_after_a_restart(site: Site) -> bytes:
    site.mirror.frozen = await withdrawn(site)
    site.stop()
    site.delete_cache()
    site.start()
    return honest(site, OLD)


async def root_rollback_with_deleted_cache(site: Site) -> bytes:
    """The snapshot key was stolen and replaced; the mirror hides the new root and plays the repository before it."""
    before = site.capture()
    await site.know()
    ceremony.rotate(site.hub, "snapshot", site.clock)
    site.open_hub()
    await site.packages.refresh()
    site.clock.advance(120)
    site.delete_cache()
    site.mirror.frozen = before
    return honest(site, OLD)


async def node_restored_from_a_month_old_backup(site: Site) -> bytes:
    before = site.capture()
    await site.know()
    site.stop()
    shutil.copytree(site.node, site.node.with_name("backup"), symlinks=True)
    site.start()
    site.publish({GOOD: SIZE})
    site.clock.advance(30 * DAY)
    site.stop()
    shutil.rmtree(site.node)
    shutil.move(site.node.with_name("backup"), site.node)
    site.start()
    site.mirror.frozen = before
    return honest(site, OLD)


# --- the clock ------------------------------------------------------------------------------------------------------


async def clock_set_back(site: Site) -> bytes:
    """A month later; then the clock is set to when the old metadata was fresh."""
    before = site.capture()
    await site.know()
    site.publish({GOOD: SIZE})
    site.clock.advance(30 * DAY)
    site.publish({GOOD: SIZE})
    await site.packages.refresh()
    site.delete_cache()
    site.clock.advance(-30 * DAY)
    site.mirror.frozen = before
    return honest(site, OLD)


async def clock_ahead(site: Site) -> bytes:
    await site.know()
    site.mirror.frozen = site.capture()
    site.clock.advance(400 * DAY)
    return honest(site, GOOD)


# --- one stolen key each --------------------------------------------------------------------------------------------


async def stolen_root_key(site: Site) -> bytes:
    """One of two that are needed: a root under which the thief's keys would count for everything."""

    def taken_over(metadata) -> None:
        root = metadata.signed
        root.version += 1
        for role in ("targets", "snapshot", "timestamp"):
            root.add_key(tuf.public(THIEF), role)

    site.mirror.served["/tuf/2.root.json"] = site.forge("root", taken_over, [site.keys.roles["root-1"]])
    return honest(site, EVIL)


async def stolen_targets_key(site: Site) -> bytes:
    """Its own keyring and its own bins, under the version that the snapshot names."""
    ring = encode_keyring(Keyring((THIEF.key("desired"),)))

    def own(metadata) -> None:
        metadata.signed.targets[tuf.KEYRING].hashes["sha256"] = digest_of(ring).removeprefix("sha256:")
        metadata.signed.targets[tuf.KEYRING].length = len(ring)

    site.mirror.served[f"/blobs/{digest_of(ring)}"] = ring
    swap(site, "targets", site.forge("targets", own, [site.keys.roles["targets"]]))
    return site.document(EVIL, THIEF)


async def stolen_bins_key(site: Site) -> bytes:
    """It can list a file, under the version that the snapshot names. Nobody whose word counts asks for it."""
    path, data = site.evil_bin(site.keys.roles["bins"])
    site.mirror.served[path] = data
    return site.document(EVIL, THIEF)


async def stolen_snapshot_key(site: Site) -> bytes:
    """Old versions of every bin in a snapshot of its own."""
    old = await withdrawn(site)
    before = next(data for path, data in old.items() if ".snapshot." in path)

    def back(metadata) -> None:
        metadata.signed.meta = tuf.read(before, tuf.Snapshot).signed.meta

    site.publish({GOOD: SIZE, EVIL: SIZE})
    site.publish({GOOD: SIZE})
    site.mirror.served |= {path: data for path, data in old.items() if ".bin-" in path}
    swap(site, "snapshot", site.forge("snapshot", back, [site.keys.roles["snapshot"]]))
    return honest(site, OLD)


async def stolen_timestamp_key(site: Site) -> bytes:
    """A new timestamp that leads back to the old snapshot."""
    old = await withdrawn(site)
    before = tuf.read(old["/tuf/timestamp.json"], tuf.Timestamp).signed.snapshot_meta

    def back(metadata) -> None:
        metadata.signed.version += 10
        metadata.signed.snapshot_meta = before

    site.mirror.frozen = old
    swap(site, "timestamp", site.forge("timestamp", back, [site.keys.roles["timestamp"]]))
    return honest(site, OLD)


async def stolen_envelope_key(site: Site) -> bytes:
    return honest(site, EVIL)


async def withdrawn_envelope_key(site: Site) -> bytes:
    await site.know()
    stolen = site.keys.documents
    ceremony.rotate(site.hub, "documents", site.clock)
    ceremony.revoke(site.hub, stolen.kid)
    site.open_hub()
    await site.packages.refresh()
    return site.document(GOOD, stolen)


# --- documents for somebody else ------------------------------------------------------------------------------------


async def document_of_another_node(site: Site) -> bytes:
    return site.document(GOOD, site.keys.documents, scope="node:acme.edge-2")


async def document_of_another_tenant(site: Site) -> bytes:
    return site.document(GOOD, site.keys.documents, scope=f"node:{NODE.replace('acme', 'globex')}")


async def document_of_another_kind(site: Site) -> bytes:
    return site.document(GOOD, site.keys.documents, kind="policy")


async def document_issued_in_the_future(site: Site) -> bytes:
    site.clock.advance(DAY)
    later = site.document(GOOD, site.keys.documents)
    site.clock.advance(-DAY)
    return later


# --- bytes that are no metadata -------------------------------------------------------------------------------------


def served(role: str, data: bytes) -> Attack:
    async def attack(site: Site) -> bytes:
        swap(site, role, data)
        return honest(site, EVIL)

    return attack


def rewritten(change: Callable[[bytes], bytes]) -> Attack:
    async def attack(site: Site) -> bytes:
        site.mirror.rewrite = change
        return honest(site, GOOD)

    return attack


def flipped(part: float) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = min(int(len(data) * part), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return flip


ATTACKS: dict[str, tuple[Attack, str]] = {
    "arbitrary files: bin signed by a stranger": (arbitrary_bin, "bad_signature"),
    "arbitrary files: targets signed by a stranger": (arbitrary_targets, "digest_mismatch"),
    "arbitrary files: snapshot signed by a stranger": (arbitrary_snapshot, "digest_mismatch"),
    "arbitrary files: timestamp signed by a stranger": (arbitrary_timestamp, "bad_signature"),
    "arbitrary files: root signed by strangers": (arbitrary_root, "bad_signature"),
    "arbitrary files: no signature at all": (unsigned_metadata, "bad_signature"),
    "arbitrary files: another keyring": (other_keyring, "digest_mismatch|malformed"),
    "withdrawn version": (withdrawn_version, "not_listed"),
    "replay: the whole repository": (replayed_repository, "replayed"),
    "replay: snapshot": (replayed_snapshot, "digest_mismatch"),
    "replay: targets": (replayed_targets, "digest_mismatch"),
    "replay: bin": (replayed_bin, "replayed"),
    "mix and match: one bin for another": (bin_of_another_bin, "not_listed"),
    "mix and match: new timestamp, old rest": (mixed_states, "unavailable"),
    "freeze": (freeze, "expired"),
    "rollback, cache zeroed": (rollback_with_zeroed_cache, "replayed"),
    "rollback, cache deleted": (rollback_with_deleted_cache, "replayed"),
    "rollback, cache deleted, restarted": (rollback_with_deleted_cache_after_a_restart, "replayed"),
    "rollback of the root, cache deleted": (root_rollback_with_deleted_cache, "replayed"),
    "rollback, node restored from a backup": (node_restored_from_a_month_old_backup, "expired"),
    "time travel: clock set back": (clock_set_back, "replayed|expired"),
    "time travel: clock far ahead": (clock_ahead, "expired"),
    "stolen key: one root key": (stolen_root_key, "bad_signature"),
    "stolen key: targets": (stolen_targets_key, "digest_mismatch|malformed"),
    "stolen key: bins": (stolen_bins_key, "bad_signature"),
    "stolen key: snapshot": (stolen_snapshot_key, "digest_mismatch|malformed"),
    "stolen key: timestamp": (stolen_timestamp_key, "replayed"),
    "stolen key: envelope": (stolen_envelope_key, "not_listed"),
    "envelope key that was withdrawn": (withdrawn_envelope_key, "bad_signature"),
    "foreign document: another node's": (document_of_another_node, "wrong_scope"),
    "foreign document: another tenant's": (document_of_another_tenant, "wrong_scope"),
    "foreign document: another kind": (document_of_another_kind, "wrong_scope"),
    "document issued in the future": (document_issued_in_the_future, "expired"),
    "garbage timestamp": (served("timestamp", b"\x00garbage\xff" * 100), "malformed"),
    "garbage snapshot": (served("snapshot", b"{}"), "digest_mismatch|malformed"),
    "16 kB of [": (served("timestamp", b"[" * 16_000), "malformed"),
    "empty timestamp": (served("timestamp", b""), "malformed"),
    "timestamp that is a targets file": (
        served("timestamp", b'{"signed":{"_type":"targets"},"signatures":[]}'),
        "malformed",
    ),
    "endless timestamp": (served("timestamp", b" " * 20_000_000), "malformed"),
    "endless snapshot": (served("snapshot", b" " * 20_000_000), "malformed"),
    "evil mirror: every file truncated": (rewritten(lambda data: data[: len(data) // 2]), "malformed"),
    "evil mirror: every file longer": (rewritten(lambda data: data + b" " * 1_000), "digest_mismatch|malformed"),
    **{
        f"evil mirror: a bit at {part:.0%} of every file": (
            rewritten(flipped(part)),
            "bad_signature|digest_mismatch|malformed|replayed|unavailable|expired",
        )
        for part in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
    },
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_an_attack_is_refused_with_its_reason(name: str, site: Site) -> None:
    attack, reason = ATTACKS[name]
    envelope = await attack(site)
    with pytest.raises(SyncError) as refused:
        await site.admit(envelope)
    assert refused.value.code in reason.split("|"), refused.value


async def test_the_same_node_accepts_what_is_approved(site: Site) -> None:
    """Without it the table above would prove nothing."""
    assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}


async def test_after_an_attack_the_honest_hub_is_followed_again(site: Site) -> None:
    for attack in (replayed_repository, rollback_with_zeroed_cache, stolen_timestamp_key):
        with pytest.raises(SyncError):
            await site.admit(await attack(site))
        site.mirror.frozen = None
        site.mirror.served.clear()
        site.clock.advance(120)
        site.publish({GOOD: SIZE, OLD: SIZE})
        assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}
        site.clock.advance(120)


async def test_a_fast_forward_is_undone_by_replacing_the_key_that_was_stolen(site: Site) -> None:
    """TUF 5.3.11: versions vouched for by a key that a newer root replaced count no more."""
    await site.know()

    def far_ahead(metadata) -> None:
        metadata.signed.version = 2**40

    swap(site, "timestamp", site.forge("timestamp", far_ahead, [site.keys.roles["timestamp"]]))
    await site.packages.refresh()
    assert site.state.tuf_floors()["timestamp"].version == 2**40
    site.mirror.served.clear()
    site.clock.advance(120)
    with pytest.raises(SyncError) as stuck:
        await site.packages.refresh()
    assert stuck.value.code == "replayed"
    ceremony.rotate(site.hub, "timestamp", site.clock)
    site.open_hub()
    site.clock.advance(120)
    assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}
    assert site.state.tuf_floors()["timestamp"].version < 2**40


async def test_an_expired_repository_that_is_signed_again_is_followed_again(site: Site) -> None:
    await site.know()
    site.clock.advance(40 * DAY)
    with pytest.raises(SyncError) as late:
        await site.admit(honest(site, GOOD))
    assert late.value.code == "expired"
    assert site.packages.status().alarm.startswith("expired: ")
    site.repository.renew()
    site.clock.advance(120)
    assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}
    assert site.packages.status().alarm == ""


async def test_a_hub_restored_from_a_backup_is_followed_again_once_everything_is_reissued(
    site: Site, tmp_path: Path
) -> None:
    shutil.copytree(site.hub, tmp_path / "backup")
    await site.know()
    site.publish({GOOD: SIZE, OLD: SIZE, EVIL: SIZE})
    site.publish({GOOD: SIZE, OLD: SIZE})
    await site.packages.refresh()
    shutil.rmtree(site.hub)
    shutil.move(tmp_path / "backup", site.hub)
    site.clock.advance(120)
    site.open_hub()
    with pytest.raises(SyncError) as refused:
        await site.packages.refresh()
    assert refused.value.code == "replayed"
    ceremony.reissue(site.hub, site.clock)
    site.clock.advance(120)
    site.open_hub()
    assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}


async def test_a_damaged_file_of_the_hub_is_put_aside_and_issued_anew(site: Site) -> None:
    await site.know()
    for role in ("timestamp", "snapshot", tuf.bin_of(f"sha256/{GOOD.removeprefix('sha256:')}")):
        path = site.hub / site.name_of(role).lstrip("/")
        path.write_bytes(b"\x00" * 10)
    site.repository = Repository(site.hub, site.keys, site.clock)
    site.publish()
    assert len(list((site.hub / "tuf" / "damaged").iterdir())) == 3
    assert await site.admit(honest(site, GOOD)) == {GOOD: SIZE}
