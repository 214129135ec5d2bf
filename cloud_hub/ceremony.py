"""What `tierline keys` does: the files of a key ceremony, one step at a time. A step that was cut off can be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Metadata, Root

from cloud_hub import tuf_metadata as tuf
from cloud_hub import tuf_roots
from cloud_hub.files import locked
from cloud_hub.keys import (
    DOCUMENTS,
    KEYRING_FILE,
    ONLINE_ROLES,
    ROOT_KEYS,
    HubKeys,
    has_repository,
    keys_folder,
    make_key,
    metadata_folder,
    open_keys,
    read_key,
    read_roles,
    replace_key,
    root_path,
    with_key,
    write_keyring,
)
from cloud_hub.tuf_repository import Repository, first_root
from sync.clock import Clock, SystemClock
from sync.durable import write_whole
from sync.errors import Malformed
from sync.trust import Key, Keyring, decode_keyring

NEXT_ROOT = "root-next.json"
NEXT_KEYS = "next"


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """`keys`: ids the metadata names; `here`: files of those that lie on this machine. `expires`: Unix seconds."""

    role: str
    needed: int
    keys: tuple[str, ...]
    here: tuple[str, ...]
    expires: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """`documents`: (kid, kinds) of the envelope keys, the one that signs first."""

    roles: tuple[RoleStatus, ...]
    documents: tuple[tuple[str, tuple[str, ...]], ...]
    problems: tuple[str, ...]

    def as_json(self) -> object:
        return asdict(self)


def init(data: Path, offline: Path | None, clock: Clock | None = None) -> Path:
    """Every key and the first root; the path of the root. Raises Malformed when there is a repository already."""
    with locked(data):
        if has_repository(data):
            raise Malformed(f"{data} has a repository already: 'tierline keys rotate' changes its keys")
        folder = keys_folder(data)
        apart = offline or folder
        for place in (folder, apart):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        online = {name: make_key(folder, name) for name in ONLINE_ROLES}
        roots = {name: make_key(apart, name) for name in ROOT_KEYS}
        documents = make_key(folder, DOCUMENTS)
        keys = HubKeys(documents, with_key(None, documents), {**online, **roots})
        root = first_root(keys, (clock or SystemClock()).wall())
        metadata_folder(data).mkdir(mode=0o700, exist_ok=True)
        write_whole(metadata_folder(data) / "1.root.json", root, mode=0o644)
        write_whole(root_path(data), root, mode=0o644)
        return root_path(data)


def status(data: Path, clock: Clock | None = None) -> Status:
    """Read only, also while the hub runs. Raises Malformed when there is no repository."""
    _, root = current_root(data)
    folder = keys_folder(data)
    repository = Repository(data, open_keys(data), clock or SystemClock(), repair=False)
    expires, here = repository.expiries(), read_roles(folder)
    ids = {name: tuf.public(key).keyid for name, key in here.items()}
    roles = []
    for role in (Root.type, "targets", "snapshot", "timestamp"):
        named = root.roles[role]
        files = tuple(f"{name}.key" for name, keyid in ids.items() if keyid in named.keyids)
        roles.append(RoleStatus(role, named.threshold, tuple(named.keyids), files, expires.get(role)))
    bins = ("bins.key",) if "bins" in here else ()
    roles.insert(2, RoleStatus("bins", 1, (ids["bins"],) if bins else (), bins, expires.get("bins")))
    ring = decode_keyring((folder / KEYRING_FILE).read_bytes())
    return Status(tuple(roles), tuple((key.kid, key.kinds) for key in ring.keys), tuple(repository.problems()))


def rotate(data: Path, role: str, clock: Clock | None = None) -> Sequence[str]:
    """Replace a role's key. Envelope and bins' keys need no root; for the others a new root is prepared, and put in force when
    the root keys are here."""
    with locked(data):
        _, root = current_root(data)
        folder = keys_folder(data)
        if role == DOCUMENTS:
            return _rotate_documents(folder)
        if role == "bins":
            new = replace_key(folder, role)
            return [f"new key {new.kid} for the bins; the hub signs them with it at its next start"]
        old = read_roles(folder)
        new = make_key(_next_keys(folder), role)
        public = tuf.public(new)
        if role in ROOT_KEYS:
            if role not in old:
                raise Malformed(f"{role}.key is not here: put it into {folder} to say which key is replaced")
            gone = tuf.public(old[role]).keyid
            kept = [key for keyid, key in root.keys.items() if keyid in root.roles[Root.type].keyids and keyid != gone]
            return _prepare(data, {Root.type: [*map(_ssl, kept), public]}, clock)
        return _prepare(data, {role: [public]}, clock)


def renew_root(data: Path, clock: Clock | None = None) -> Sequence[str]:
    with locked(data):
        return _prepare(data, {}, clock)


def sign(file: Path, root: Path, key: Path) -> int:
    """Add one signature to a prepared root; how many it still needs. Needs no hub and no network."""
    prepared = tuf.read(file.read_bytes(), Root)
    old = tuf.read(root.read_bytes(), Root).signed
    tuf_roots.add_signature(prepared, read_key(key), old)
    write_whole(file, tuf_roots.encode(prepared), mode=0o644)
    return tuf_roots.missing(prepared, old)


def install(data: Path, file: Path) -> Sequence[str]:
    """Put a fully signed root in force, and the keys that were made for it in their places."""
    with locked(data):
        return _install(data, tuf.read(file.read_bytes(), Root))


def reissue(data: Path, clock: Clock | None = None) -> Sequence[str]:
    """Sign everything again above all that nodes can have seen, after a restore from a backup."""
    with locked(data):
        current_root(data)
        Repository(data, open_keys(data), clock or SystemClock()).reissue()
        return ["every approved file is signed again under a higher version; start the hub"]


def revoke(data: Path, kid: str) -> Sequence[str]:
    """Take an envelope key off the keyring. Raises Malformed for the one that signs, which must be rotated first."""
    with locked(data):
        folder = keys_folder(data)
        ring = decode_keyring((folder / KEYRING_FILE).read_bytes())
        if ring.find(kid) is None:
            raise Malformed(f"no envelope key {kid!r}; there are {', '.join(key.kid for key in ring.keys)}")
        if read_key(folder / f"{DOCUMENTS}.key").kid == kid:
            raise Malformed(f"{kid} signs now: 'tierline keys rotate documents' first")
        write_keyring(folder, Keyring(tuple(key for key in ring.keys if key.kid != kid)))
        return [f"{kid} is withdrawn; nodes learn it with their next refresh after the hub's start"]


def current_root(data: Path) -> tuple[bytes, Root]:
    """The root in force. Raises Malformed."""
    if not has_repository(data):
        raise Malformed(f"{data} has no repository: 'tierline keys init' or the first start of the hub makes it")
    newest = max(metadata_folder(data).glob("*.root.json"), key=lambda path: int(path.name.partition(".")[0]))
    content = newest.read_bytes()
    return content, tuf.read(content, Root).signed


def _rotate_documents(folder: Path) -> Sequence[str]:
    ring = decode_keyring((folder / KEYRING_FILE).read_bytes())
    # The keyring first: a key that signs before nodes can know it would only be refused.
    new = make_key(_next_keys(folder), DOCUMENTS)
    write_keyring(folder, with_key(ring, new))
    _take(folder, DOCUMENTS)
    lines = [f"new envelope key {new.kid}; the hub signs every document again at its next start"]
    old: tuple[Key, ...] = ring.keys
    return [
        *lines,
        *(f"{key.kid} still counts until 'tierline keys revoke {key.kid}'" for key in old if key.kid != new.kid),
    ]


def _prepare(data: Path, replaced: Mapping[str, Sequence[SSlibKey]], clock: Clock | None) -> Sequence[str]:
    _, root = current_root(data)
    folder = keys_folder(data)
    prepared = tuf_roots.successor(root, replaced, (clock or SystemClock()).wall())
    known = {*root.roles[Root.type].keyids, *prepared.signed.roles[Root.type].keyids}
    for source in (folder, _next_keys(folder)):
        for key in read_roles(source).values():
            if tuf.public(key).keyid in known:
                tuf_roots.add_signature(prepared, key, root)
    if (wanted := tuf_roots.missing(prepared, root)) == 0:
        return _install(data, prepared)
    path = folder / NEXT_ROOT
    write_whole(path, tuf_roots.encode(prepared), mode=0o644)
    return [
        f"prepared {path}: {wanted} more signature(s) of root keys are needed",
        f"on each machine with a root key: tierline keys sign {path.name} --root root.json --key root-N.key",
        f"then here: tierline keys install --data {data} {path}",
    ]


def _install(data: Path, prepared: Metadata[Root]) -> Sequence[str]:
    _, root = current_root(data)
    content = tuf_roots.check(prepared, root)
    folder = keys_folder(data)
    version = prepared.signed.version
    keyids = {keyid for role in prepared.signed.roles.values() for keyid in role.keyids}
    # Keys first: with the new root and without its keys the hub could sign nothing.
    for name, key in read_roles(_next_keys(folder)).items():
        if tuf.public(key).keyid in keyids:
            _take(folder, name)
    write_whole(metadata_folder(data) / f"{version}.root.json", content, mode=0o644)
    write_whole(root_path(data), content, mode=0o644)
    (folder / NEXT_ROOT).unlink(missing_ok=True)
    return [f"root version {version} is in force; nodes follow it with their next refresh after the hub's start"]


def _next_keys(folder: Path) -> Path:
    """Keys that are made and not in force yet."""
    path = folder / NEXT_KEYS
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _take(folder: Path, name: str) -> None:
    """Put a key made for later in its place; the one before stays beside it, under its own name."""
    path, new = folder / f"{name}.key", _next_keys(folder) / f"{name}.key"
    if path.exists():
        old = read_key(path)
        write_whole(folder / f"{name}.{old.kid}.old", old.to_bytes(), mode=0o600)
    write_whole(path, read_key(new).to_bytes(), mode=0o600)
    new.unlink()


def _ssl(key: object) -> SSlibKey:
    assert isinstance(key, SSlibKey)
    return key
