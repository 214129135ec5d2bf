"""New versions of the root: who may sign for which role. Pure values; `cloud_hub.keys_cli` reads and writes the files.

A new root is made on the hub, signed wherever the root keys are - one signature at a time, in any order - and counts once
enough keys of the old root AND of the new one have signed it (TUF specification 5.3.4, 6.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime

from securesystemslib.signer import SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization.json import JSONSerializer

from cloud_hub import tuf_metadata as tuf
from sync.errors import BadSignature, Malformed
from sync.trust import SigningKey


def successor(root: Root, replaced: Mapping[str, Sequence[SSlibKey]], now: float) -> Metadata[Root]:
    """The next version, unsigned. `replaced`: role -> its keys from then on; roles not named keep theirs."""
    new = deepcopy(root)
    new.version += 1
    new.expires = datetime.fromtimestamp(int(now + tuf.LIFETIME[Root.type]), UTC)
    new.unrecognized_fields[tuf.ISSUED] = int(now)
    for role, keys in replaced.items():
        for keyid in list(new.roles[role].keyids):
            new.revoke_key(keyid, role)
        for key in keys:
            new.add_key(key, role)
    return Metadata(new)


def add_signature(metadata: Metadata[Root], key: SigningKey, old: Root) -> None:
    """Raises BadSignature for a key that neither root names: it would only look like a signature."""
    keyid = tuf.public(key).keyid
    if keyid not in {*old.roles[Root.type].keyids, *metadata.signed.roles[Root.type].keyids}:
        raise BadSignature(f"the key {key.kid} is no root key, neither of version {old.version} nor of the new one")
    metadata.sign(tuf.signer(key), append=True)


def missing(metadata: Metadata[Root], old: Root) -> int:
    """How many signatures it still needs, of the old root's keys or the new one's."""
    return max(_missing(metadata, root) for root in (old, metadata.signed))


def check(metadata: Metadata[Root], old: Root) -> bytes:
    """The file, when it may follow `old`. Raises Malformed, BadSignature."""
    if metadata.signed.version != old.version + 1:
        raise Malformed(f"root: version {metadata.signed.version} does not follow {old.version}")
    if (wanted := missing(metadata, old)) > 0:
        raise BadSignature(f"root: {wanted} more signature(s) of root keys are needed")
    return encode(metadata)


def encode(metadata: Metadata[Root]) -> bytes:
    return metadata.to_bytes(JSONSerializer(compact=True))


def _missing(metadata: Metadata[Root], root: Root) -> int:
    try:
        result = root.get_verification_result(Root.type, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise Malformed(f"root: {error}") from error
    return max(result.threshold - len(result.signed), 0)
