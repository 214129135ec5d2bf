"""The update repository: files below `data/tuf`, brought in line with the database at every start and every change.

    bins that changed -> targets, if the keyring changed -> snapshot -> timestamp        each flushed before the next

Clients follow the timestamp, so a crash between two of these leaves the old state whole; what was written ahead is picked up
or passed over at the next start. A versioned file is never written twice and a damaged one is put aside, not overwritten.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

from cloud_hub import tuf_metadata as tuf
from cloud_hub.keys import ROOT_KEYS, HubKeys, metadata_folder, root_path
from models.errors import TryAgain
from sync.clock import Clock
from sync.durable import flush, write_new, write_whole
from sync.errors import Malformed
from sync.trust import SigningKey

TIMESTAMP_SECONDS = 3_600.0
"""Age at which the timestamp is signed again: a node that hears a fresh one knows that nobody holds back anything newer."""
RENEW = {"targets": 30 * tuf.DAY, "bins": 30 * tuf.DAY, "snapshot": 3.5 * tuf.DAY}
"""Seconds of life left at which a role is signed again."""
ROOT_WARNING = 60 * tuf.DAY
"""Seconds of life left at which the root, which only people can sign, becomes a problem that is shown."""
REISSUE_EPOCH = 1_704_067_200.0
"""2024-01-01: versions after a restore count hours from there."""
KEEP_SECONDS = 3_600.0
"""How long a file that was replaced stays: a client may be in the middle of its refresh."""

log = logging.getLogger(__name__)

_NAME = re.compile(r"(?:[1-9][0-9]{0,15}\.(?:root|targets|snapshot|bin-[0-9a-f]{2})|timestamp)\.json")
_VERSIONED = re.compile(r"([1-9][0-9]{0,15})\.(root|targets|snapshot|bin-[0-9a-f]{2})\.json")


@dataclass(frozen=True, slots=True)
class Bin:
    """The current metadata of one bin. `targets`: name -> size. `good`: signed by the key that counts now."""

    version: int
    targets: Mapping[str, int]
    expires: float
    good: bool


class Repository:
    """Thread-safe. `repair` False: only look. Raises OSError when the disk refuses, Malformed when no good root is here."""

    def __init__(self, data: Path, keys: HubKeys, clock: Clock, *, repair: bool = True) -> None:
        self._repair = repair
        self._folder = metadata_folder(data)
        self._keys = keys
        self._clock = clock
        self._lock = RLock()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._highest: dict[str, int] = {}
        self._note_versions()
        if Root.type not in self._highest:
            self._write_root(first_root(keys, clock.wall()))
        self.root = self._newest_root()
        self._root = tuf.read(self.root, Root).signed
        if repair:
            write_whole(root_path(data), self.root, mode=0o644)
        self._targets: Targets | None = None
        self._bins: dict[str, Bin] = {}
        self._snapshot: Snapshot | None = None
        self._timestamp: Timestamp | None = None
        self._load()

    def read(self, name: str) -> bytes | None:
        """A metadata file by its name in the repository; None when there is none."""
        if not _NAME.fullmatch(name):
            return None
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def publish(self, files: Mapping[str, int], keyring: tuple[str, int]) -> bool:
        """Make `files` (digest -> size) the approved ones and `keyring` (digest, size) the envelope keys.

        Whether anything had to be signed. Raises TryAgain naming the role whose key is not here.
        """
        with self._lock:
            now = self._clock.wall()
            self._bring_targets(keyring, now)
            changed = self._bring_bins(files, now)
            self._bring_snapshot(now)
            signed = self._bring_timestamp(now)
            self._prune(now)
            return changed or signed

    def renew(self) -> None:
        """Sign again what would expire. To be called every few minutes. Raises TryAgain as `publish` does."""
        with self._lock:
            if self._targets is None or self._timestamp is None:
                return
            self.publish(*self._said())

    def reissue(self) -> None:
        """Sign targets and every bin again under versions that no node can have seen: for a hub restored from a backup, which
        would otherwise be refused as a replay. Raises TryAgain as `publish` does."""
        with self._lock:
            if self._targets is None:
                return
            said = self._said()
            # A role is signed less than once an hour on average, so this is above what was lost; five digits keep it small.
            above = int((self._clock.wall() - REISSUE_EPOCH) / 3_600)
            for role in (Targets.type, *tuf.bin_names()):
                self._highest[role] = max(above, self._highest.get(role, 0))
            self._targets = None
            self.publish(*said)

    def _said(self) -> tuple[dict[str, int], tuple[str, int]]:
        """Files and keyring as the metadata has them now."""
        assert self._targets is not None
        keyring = self._targets.targets[tuf.KEYRING]
        files = {
            f"sha256:{name.removeprefix('sha256/')}": size
            for bin_ in self._bins.values()
            for name, size in bin_.targets.items()
        }
        return files, (f"sha256:{keyring.hashes['sha256']}", keyring.length)

    def problems(self) -> list[str]:
        """What an operator should act on, in words."""
        found = []
        left = tuf.remaining(self._root, self._clock.wall())
        if left < ROOT_WARNING:
            found.append(
                f"the root metadata expires in {left / tuf.DAY:.0f} days: sign a new one with 'tierline keys renew-root'"
            )
        if here := self._keys.root_keys_here():
            found.append(
                f"root keys lie on this machine ({', '.join(here)}): move them offline, two of three are needed to sign"
            )
        found += [
            f"the key for role {role} is not here: 'tierline keys status' says which one is wanted"
            for role in ("targets", "bins", "snapshot", "timestamp")
            if self._targets is not None and self._key(role) is None
        ]
        return found

    def expiries(self) -> dict[str, float]:
        """Role -> Unix seconds when its metadata expires; of the bins, the first."""
        with self._lock:
            found = {Root.type: self._root.expires.timestamp()}
            for role, signed in (
                (Targets.type, self._targets),
                (Snapshot.type, self._snapshot),
                (Timestamp.type, self._timestamp),
            ):
                if signed is not None:
                    found[role] = signed.expires.timestamp()
            if self._bins:
                found["bins"] = min(bin_.expires for bin_ in self._bins.values())
            return found

    # --- reading what is there ----------------------------------------------------------------------------------

    def _note_versions(self) -> None:
        """From the names, so that a damaged file's version is not used again either."""
        for path in (*self._folder.iterdir(), *self._damaged()):
            match = _VERSIONED.match(path.name)
            if match:
                role, version = match[2], int(match[1])
                self._highest[role] = max(version, self._highest.get(role, 0))

    def _damaged(self) -> Iterable[Path]:
        folder = self._folder / "damaged"
        return folder.iterdir() if folder.is_dir() else ()

    def _newest_root(self) -> bytes:
        """Raises Malformed: without its root the repository cannot go on, and making another would orphan every node."""
        for version in range(1, self._highest[Root.type] + 1):
            path = self._folder / f"{version}.root.json"
            try:
                data = path.read_bytes()
                metadata = tuf.read(data, Root)
            except (OSError, Malformed) as error:
                raise Malformed(f"{path}: {error}; restore it from a backup, every node needs it") from error
            if metadata.signed.version != version or not tuf.vouched(metadata.signed, Root.type, metadata):
                raise Malformed(f"{path}: damaged or not fully signed; restore it from a backup, every node needs it")
        return data

    def _load(self) -> None:
        self._targets = self._current(Targets.type, Targets, self._root)
        if self._targets is None:
            return
        read: dict[bytes, Bin | None] = {}
        for name in tuf.bin_names():
            data = self._newest(name)
            if data is None:
                continue
            if data not in read:
                read[data] = self._read_bin(name, data, self._targets)
            bin_ = read[data]
            if bin_ is not None and bin_.version == self._highest[name]:
                self._bins[name] = bin_
        self._snapshot = self._current(Snapshot.type, Snapshot, self._root)
        self._load_timestamp()

    def _load_timestamp(self) -> None:
        path = self._folder / "timestamp.json"
        if not path.exists():
            return
        try:
            metadata = tuf.read(path.read_bytes(), Timestamp)
        except Malformed as error:
            self._put_aside(path, error)
            return
        if tuf.vouched(self._root, Timestamp.type, metadata):
            self._timestamp = metadata.signed
        self._highest[Timestamp.type] = metadata.signed.version

    def _newest(self, role: str) -> bytes | None:
        path = self._folder / f"{self._highest.get(role, 0)}.{role}.json"
        return path.read_bytes() if path.exists() else None

    def _current(self, role: str, kind: type[tuf.S], delegator: Root) -> tuf.S | None:
        data = self._newest(role)
        if data is None:
            return None
        path = self._folder / f"{self._highest[role]}.{role}.json"
        try:
            metadata = tuf.read(data, kind)
        except Malformed as error:
            self._put_aside(path, error)
            return None
        if metadata.signed.version != self._highest[role] or not tuf.vouched(delegator, role, metadata):
            log.warning("%s is not signed by the keys that count now; it is issued anew", path)
            return None
        return metadata.signed

    def _read_bin(self, name: str, data: bytes, delegator: Targets) -> Bin | None:
        try:
            metadata = tuf.read(data, Targets)
        except Malformed as error:
            self._put_aside(self._folder / f"{self._highest[name]}.{name}.json", error)
            return None
        signed = metadata.signed
        sizes = {target: file.length for target, file in signed.targets.items()}
        good = tuf.vouched(delegator, name, metadata)
        return Bin(signed.version, sizes, signed.expires.timestamp(), good)

    def _put_aside(self, path: Path, error: Malformed) -> None:
        if not self._repair:
            return
        log.error("%s is damaged (%s); it is put aside and issued anew under a higher version", path, error)
        aside = path.parent / "damaged"
        aside.mkdir(exist_ok=True)
        path.rename(aside / f"{path.name}.{int(self._clock.wall())}")
        flush(path.parent)

    # --- writing what is wanted ---------------------------------------------------------------------------------

    def _key(self, role: str) -> SigningKey | None:
        """The private key of a role, if it is here and is the one that counts."""
        key = self._keys.roles.get(role)
        if key is None:
            return None
        keyid = tuf.public(key).keyid
        if role == "bins":
            delegations = self._targets.delegations if self._targets is not None else None
            return key if delegations is not None and keyid in delegations.keys else None
        return key if keyid in self._root.roles[role].keyids else None

    def _must(self, role: str) -> SigningKey:
        key = self._key(role)
        if key is None:
            raise TryAgain(f"the key for role {role} is not on this machine; see 'tierline keys status'")
        return key

    def _bring_targets(self, keyring: tuple[str, int], now: float) -> None:
        bins = self._keys.roles.get("bins")
        old = self._targets
        if old is not None:
            known = old.targets[tuf.KEYRING]
            same = (f"sha256:{known.hashes['sha256']}", known.length) == keyring
            keys = old.delegations.keys if old.delegations is not None else {}
            if same and (bins is None or tuf.public(bins).keyid in keys):
                if tuf.remaining(old, now) > RENEW["targets"]:
                    return
                if self._key(Targets.type) is None:
                    log.warning("the targets metadata expires soon and its key is not here")
                    return
        if bins is None:
            raise TryAgain("the key for role bins is not on this machine; see 'tierline keys status'")
        version = self._next(Targets.type)
        metadata = tuf.new_targets(version, tuf.public(bins), keyring, now)
        self._write(f"{version}.targets.json", tuf.signed_bytes(metadata, [self._must(Targets.type)]))
        self._targets = metadata.signed
        rotated = old is None or old.delegations is None or tuf.public(bins).keyid not in old.delegations.keys
        if rotated:
            self._bins = {
                name: Bin(bin_.version, bin_.targets, bin_.expires, good=False) for name, bin_ in self._bins.items()
            }

    def _bring_bins(self, files: Mapping[str, int], now: float) -> bool:
        wanted: dict[str, dict[str, int]] = defaultdict(dict)
        for digest, size in files.items():
            name = f"sha256/{digest.removeprefix('sha256:')}"
            wanted[tuf.bin_of(name)][name] = size
        written: dict[str, bytes] = {}
        made: dict[tuple[int, bytes], bytes] = {}
        changed: dict[str, Bin] = {}
        for name in tuf.bin_names():
            old, sizes = self._bins.get(name), wanted.get(name, {})
            if old is not None and old.good and old.targets == sizes and old.expires - now > RENEW["bins"]:
                continue
            version = self._next(name)
            if sizes or (version, b"") not in made:
                targets = {target: tuf.target_of(target.replace("/", ":", 1), size) for target, size in sizes.items()}
                metadata = tuf.new_bin(version, targets, now)
                data = tuf.signed_bytes(metadata, [self._must("bins")])
                if not sizes:
                    made[version, b""] = data  # empty bins of one version have the same bytes: signed once
            else:
                data = made[version, b""]
            written[f"{version}.{name}.json"] = data
            changed[name] = Bin(version, sizes, now + tuf.LIFETIME["bins"], good=True)
        self._write_all(written)
        self._bins.update(changed)
        return bool(changed)

    def _bring_snapshot(self, now: float) -> None:
        assert self._targets is not None
        versions = {name: bin_.version for name, bin_ in self._bins.items()} | {Targets.type: self._targets.version}
        old = self._snapshot
        if old is not None and tuf.remaining(old, now) > RENEW["snapshot"]:
            said = {name.removesuffix(".json"): meta.version for name, meta in old.meta.items()}
            if said == versions:
                return
        # Time-based: a hub restored from a backup goes above what it signed before, as long as its clock is right.
        version = max(self._next(Snapshot.type), int(now))
        metadata = tuf.new_snapshot(version, versions, self._file(Targets.type, self._targets.version), now)
        self._write(f"{version}.snapshot.json", tuf.signed_bytes(metadata, [self._must(Snapshot.type)]))
        self._snapshot = metadata.signed

    def _bring_timestamp(self, now: float) -> bool:
        assert self._snapshot is not None
        old = self._timestamp
        if old is not None and old.snapshot_meta.version == self._snapshot.version:
            age = tuf.LIFETIME["timestamp"] - tuf.remaining(old, now)
            if 0 <= age < TIMESTAMP_SECONDS:
                return False
        version = max(self._next(Timestamp.type), int(now))
        number = self._snapshot.version
        metadata = tuf.new_timestamp(version, tuf.named(number, self._file(Snapshot.type, number)), now)
        data = tuf.signed_bytes(metadata, [self._must(Timestamp.type)])
        write_whole(self._folder / "timestamp.json", data, mode=0o644)
        self._highest[Timestamp.type] = version
        self._timestamp = metadata.signed
        return True

    def _file(self, role: str, version: int) -> bytes:
        return (self._folder / f"{version}.{role}.json").read_bytes()

    def _next(self, role: str) -> int:
        return self._highest.get(role, 0) + 1

    def _write_root(self, data: bytes) -> None:
        self._write(f"{tuf.read(data, Root).signed.version}.root.json", data)

    def _write(self, name: str, data: bytes) -> None:
        self._write_all({name: data})

    def _write_all(self, files: Mapping[str, bytes]) -> None:
        """All of them, or after a power cut some: none is referred to before this returns."""
        staged = []
        for name, data in files.items():
            path = self._folder / name
            part = path.with_name(f".{name}.new")
            part.unlink(missing_ok=True)
            write_new(part, data, mode=0o644)
            staged.append((part, path))
        for part, path in staged:
            if path.exists():
                raise Malformed(f"{path} is there already: another process writes into this repository")
            part.rename(path)
            match = _VERSIONED.fullmatch(path.name)
            assert match is not None
            self._highest[match[2]] = int(match[1])
        if staged:
            flush(self._folder)

    def _prune(self, now: float) -> None:
        current = self._named()
        for path in self._folder.iterdir():
            if _VERSIONED.fullmatch(path.name) and path.name not in current and ".root." not in path.name:
                try:
                    if now - path.stat().st_mtime > KEEP_SECONDS:
                        path.unlink()
                except OSError:
                    continue  # gone meanwhile, or the disk refuses: it is only space

    def _named(self) -> Collection[str]:
        assert self._targets is not None and self._snapshot is not None
        bins = {f"{bin_.version}.{name}.json" for name, bin_ in self._bins.items()}
        return bins | {f"{self._targets.version}.targets.json", f"{self._snapshot.version}.snapshot.json"}


def first_root(keys: HubKeys, now: float) -> bytes:
    """Version 1, signed by every root key that is here. Raises Malformed when they are too few."""
    roots = [keys.roles[name] for name in ROOT_KEYS if name in keys.roles]
    if len(roots) < len(ROOT_KEYS):
        raise Malformed(
            f"{len(roots)} of {len(ROOT_KEYS)} root keys are here: 'tierline keys init' makes the first root"
        )
    public = {role: [tuf.public(keys.roles[role])] for role in ("targets", "snapshot", "timestamp")}
    public[Root.type] = [tuf.public(key) for key in roots]
    return tuf.signed_bytes(tuf.new_root(1, public, now), roots)
