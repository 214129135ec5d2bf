"""Signed metadata of the update repository, made and read: pure values, no files. TUF specification, section 4.

Layout: targets delegates to 256 bins by the first byte of sha256(target name); a change of one model re-signs at most as
many bins as it has files. Targets are `sha256/<hex>`, and `keys/documents.json` in the targets role itself, so that who can
approve files still cannot make envelope keys. Nothing else is ever delegated: no diamonds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    TOP_LEVEL_ROLE_NAMES,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    SuccinctRoles,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from cloud_hub.keys import ROOT_THRESHOLD
from sync.errors import Malformed
from sync.trust import SigningKey

BIN_BITS = 8
BIN_PREFIX = "bin"
ISSUED = "x-issued"
"""Unix seconds of signing; `sync.tuf_client` reads it."""
KEYRING = "keys/documents.json"
DAY = 86_400.0
LIFETIME = {"root": 365 * DAY, "targets": 90 * DAY, "bins": 90 * DAY, "snapshot": 7 * DAY, "timestamp": DAY}
"""Seconds until a role's metadata expires. Root and targets are signed by hand; the rest by the hub, long before."""

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)


def signer(key: SigningKey) -> CryptoSigner:
    """python-tuf's form of a private key."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.to_bytes()))


def public(key: SigningKey) -> SSlibKey:
    return signer(key).public_key


def bin_names() -> list[str]:
    return list(_succinct([]).get_roles())


def bin_of(name: str) -> str:
    """The bin that a target belongs to."""
    return str(_succinct([]).get_role_for_target(name))


def target_of(digest: str, size: int) -> TargetFile:
    """A file by its digest, `sha256:<hex>`."""
    value = digest.removeprefix("sha256:")
    return TargetFile(size, {"sha256": value}, f"sha256/{value}")


def new_root(
    version: int, keys: Mapping[str, Sequence[SSlibKey]], now: float, threshold: int = ROOT_THRESHOLD
) -> Metadata[Root]:
    """Unsigned. `keys`: role -> public keys; one signature is enough for all but root."""
    root = Root(version, expires=_expiry("root", now), consistent_snapshot=True, unrecognized_fields=_issued(now))
    for role in sorted(TOP_LEVEL_ROLE_NAMES):
        for key in keys[role]:
            root.add_key(key, role)
    root.roles[Root.type].threshold = threshold
    return Metadata(root)


def new_targets(version: int, bins_key: SSlibKey, keyring: tuple[str, int], now: float) -> Metadata[Targets]:
    """Unsigned. `keyring`: digest and size of the keyring file."""
    digest, size = keyring
    file = TargetFile(size, {"sha256": digest.removeprefix("sha256:")}, KEYRING)
    return Metadata(
        Targets(
            version,
            expires=_expiry("targets", now),
            targets={KEYRING: file},
            delegations=Delegations({bins_key.keyid: bins_key}, succinct_roles=_succinct([bins_key.keyid])),
            unrecognized_fields=_issued(now),
        )
    )


def new_bin(version: int, targets: Mapping[str, TargetFile], now: float) -> Metadata[Targets]:
    return Metadata(
        Targets(
            version,
            expires=_expiry("bins", now),
            targets=dict(sorted(targets.items())),
            unrecognized_fields=_issued(now),
        )
    )


def new_snapshot(version: int, versions: Mapping[str, int], targets: bytes, now: float) -> Metadata[Snapshot]:
    """`versions`: role -> version of the targets role and of every bin. `targets`: the file of the targets role.

    That one is named by its hash too, and the snapshot in the timestamp: so a stolen targets key alone can't put another file
    under a version that is vouched for. For 256 bins the hashes would take 22 kB of every change; who steals their key can
    list a file, and still needs an envelope key to have it installed.
    """
    meta = {f"{role}.json": MetaFile(number) for role, number in sorted(versions.items())}
    meta["targets.json"] = named(versions["targets"], targets)
    return Metadata(Snapshot(version, expires=_expiry("snapshot", now), meta=meta, unrecognized_fields=_issued(now)))


def named(version: int, data: bytes) -> MetaFile:
    """A metadata file by its version, length and hash."""
    return MetaFile(version, len(data), {"sha256": sha256(data).hexdigest()})


def new_timestamp(version: int, snapshot: MetaFile, now: float) -> Metadata[Timestamp]:
    return Metadata(
        Timestamp(
            version,
            expires=_expiry("timestamp", now),
            snapshot_meta=snapshot,
            unrecognized_fields=_issued(now),
        )
    )


def signed_bytes(metadata: Metadata[S], keys: Sequence[SigningKey]) -> bytes:
    """The file, signed by every key."""
    for key in keys:
        metadata.sign(signer(key), append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def read(data: bytes, kind: type[S]) -> Metadata[S]:
    """Raises Malformed for what is no metadata of that kind."""
    try:
        metadata: Metadata[S] = Metadata[S].from_bytes(data)
    except RepositoryError as error:
        raise Malformed(f"metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise Malformed(f"metadata: of type {metadata.signed.type!r}, {kind.type!r} is expected")
    return metadata


def vouched(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> bool:
    """Whether enough of the role's keys signed it."""
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError):
        return False
    return True


def remaining(signed: Signed, now: float) -> float:
    """Seconds until it expires."""
    return signed.expires.timestamp() - now


def _succinct(keyids: list[str]) -> SuccinctRoles:
    return SuccinctRoles(keyids, 1, BIN_BITS, BIN_PREFIX)


def _expiry(role: str, now: float) -> datetime:
    return datetime.fromtimestamp(int(now + LIFETIME[role]), UTC)


def _issued(now: float) -> dict[str, int]:
    return {ISSUED: int(now)}
