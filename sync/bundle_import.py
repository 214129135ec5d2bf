"""Taking a bundle in, on the node's machine, whether the node runs or not: unpack, verify, put where the node finds it.

The node verifies all of it again when it uses it: what is checked here is checked so that a person hears why it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sync.bundle import Index, read_back, remove, unpack, write_index
from sync.clock import Clock
from sync.durable import flush
from sync.errors import (
    BadSignature,
    DigestMismatch,
    Expired,
    Malformed,
    NotListed,
    Replayed,
    StoreFailed,
    SyncError,
    Unavailable,
    WrongScope,
)
from sync.folder_source import FolderRead
from sync.identity import Membership
from sync.packages import KEYRING, Client
from sync.state import StateStore
from sync.trust import MAX_KEYRING_BYTES, Keyring, Verified, decode_keyring, digest_of, unseal, verify
from sync.tuf_messages import Answer, Ask
from sync.tuf_process import TufProcess

FOLDER = "bundles"
"""Below the node's data folder: `<id>/` is an unpacked bundle, `<id>.json` what became of it."""
LEFT_OVER_SECONDS = 86_400.0
"""What an import that was killed left behind is removed after so long."""
_ERRORS: dict[str, type[SyncError]] = {
    error.code: error
    for error in (BadSignature, DigestMismatch, Expired, Malformed, NotListed, Replayed, StoreFailed, Unavailable)
}


@dataclass(frozen=True, slots=True)
class Taken:
    """`name`: of the bundle, as the node will speak of it. `documents`: kind -> revision, of those for this node.

    `known`: kinds whose revision the node had accepted already."""

    name: str
    index: Index
    documents: Mapping[str, int]
    known: tuple[str, ...]


def take_in(path: Path, membership: Membership, clock: Clock, *, client: Client | None = None) -> Taken:
    """Verify the bundle `path` for this node and put it below its data folder.

    Raises Malformed, DigestMismatch, StoreFailed; Expired or Replayed for a stale one, BadSignature or WrongScope for a
    foreign one, NotListed for one with files that nobody approved. Nothing is left behind then.
    """
    folder = membership.data / FOLDER
    staged = folder / f".{os.getpid()}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".*.new"):
            if left_over == staged or clock.wall() - left_over.stat().st_mtime > LEFT_OVER_SECONDS:
                remove(left_over)
        staged.mkdir()
        file = path.open("rb")
    except OSError as error:
        raise StoreFailed(f"{error}") from error
    asking = client or TufProcess()
    try:
        with file:
            index = unpack(file, staged)
        write_index(staged, index)
        documents, known = _check(staged, index, membership, clock, asking)
        name = sha256((staged / "index.json").read_bytes()).hexdigest()[:16]
        _place(staged, folder, name)
    finally:
        asking.close()
        remove(staged)
    return Taken(name, index, documents, known)


def _check(
    staged: Path, index: Index, membership: Membership, clock: Clock, client: Client
) -> tuple[dict[str, int], tuple[str, ...]]:
    with closing(StateStore(membership.data / "state.db")) as state:
        now = max(clock.wall(), state.time_floor())
        answer = _ask(staged, index, membership.pinned(), state, now, client)
        keyring = _keyring(staged, answer)
        _check_files(index, answer)
        return _check_documents(staged, keyring, membership, state, now)


def _ask(staged: Path, index: Index, root: bytes, state: StateStore, now: float, client: Client) -> Answer:
    """What the metadata inside says, by the node's own floors, in a folder of its own."""
    source = f"file://{staged}"
    scratch = staged / "scratch"
    names = (KEYRING, *(f"sha256/{digest.removeprefix('sha256:')}" for digest in sorted(index.files)))
    ask = Ask(root=root, folder=str(scratch), now=now, floors=state.tuf_floors(), kept=state.tuf_kept(), names=names)
    answer = client.ask(ask, lambda path, limit: FolderRead(source, f"/tuf/{path}").read(limit))
    remove(scratch)
    if answer.code:
        raise _ERRORS.get(answer.code, Malformed)(answer.text)
    return answer


def _keyring(staged: Path, answer: Answer) -> Keyring:
    listed = answer.files.get(KEYRING)
    if listed is None:
        raise NotListed("the metadata has no keyring for documents")
    data = FolderRead(f"file://{staged}", f"/blobs/{listed.digest}").read(MAX_KEYRING_BYTES)
    if digest_of(data) != listed.digest:
        raise DigestMismatch("the keyring is not the one signed for")
    return decode_keyring(data)


def _check_files(index: Index, answer: Answer) -> None:
    approved = {listed.digest: listed.size for listed in answer.files.values()}
    for digest, size in index.files.items():
        if approved.get(digest) != size:
            raise NotListed(f"{digest} is not an approved file of {size} bytes")


def _check_documents(
    staged: Path, keyring: Keyring, membership: Membership, state: StateStore, now: float
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Those for this node; kinds that it knows already. Raises WrongScope when all are for others."""
    index, envelopes = read_back(staged)
    found: dict[str, int] = {}
    known = []
    for envelope in envelopes:
        claimed = unseal(envelope).document
        if claimed.scope not in (f"node:{membership.id}", f"tenant:{membership.tenant}"):
            continue
        verified = _verified(envelope, claimed.kind, claimed.scope, keyring, state, now)
        found[claimed.kind] = verified.document.revision
        if state.floor(claimed.kind, claimed.scope).digest == verified.digest:
            known.append(claimed.kind)
    if envelopes and not found:
        raise WrongScope(f"the bundle is for {', '.join(index.nodes) or 'others'}, this node is {membership.id}")
    return found, tuple(known)


def _verified(envelope: bytes, kind: str, scope: str, keyring: Keyring, state: StateStore, now: float) -> Verified:
    floor = state.floor(kind, scope)
    return verify(envelope, keyring, kind=kind, scope=scope, floor=floor.revision, seen=floor.digest, now=now)


def _place(staged: Path, folder: Path, name: str) -> None:
    try:
        (folder / f"{name}.json").unlink(missing_ok=True)
        if not (folder / name).exists():
            staged.rename(folder / name)
        flush(folder)
    except OSError as error:
        raise StoreFailed(f"could not put the bundle in place: {error}") from error
