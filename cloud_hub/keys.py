"""The hub's signing keys: made at the first run, one file each, never overwritten. What each may sign is written here.

    root-1, root-2, root-3   who holds the other keys; two of three sign. They belong on other machines: see `tierline keys`
    targets                  that bins' key and the documents' keyring count
    bins                     which files are approved
    snapshot, timestamp      that this is the newest state
    documents                desired documents, policies, settings, software (see `sync.trust`)

The public half of every key stands in the root metadata or the keyring; a private half that is missing here only means that
this machine can't sign for the role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sync.durable import write_whole
from sync.errors import Malformed
from sync.trust import Key, Keyring, SigningKey, decode_keyring, encode_keyring

DOCUMENT_KINDS = ("desired", "policy", "settings", "software")
ROOT_KEYS = ("root-1", "root-2", "root-3")
ROOT_THRESHOLD = 2
"""One stolen or lost root key changes nothing."""
ONLINE_ROLES = ("targets", "bins", "snapshot", "timestamp")
"""Roles the hub signs for by itself; `targets` may move away, and is then needed for a new envelope key."""
DOCUMENTS = "documents"
KEYRING_FILE = "documents.json"


@dataclass(frozen=True, slots=True)
class HubKeys:
    """`documents` signs now; `keyring`: it and those before it that still count. `roles`: name -> private key, if here."""

    documents: SigningKey
    keyring_: Keyring
    roles: Mapping[str, SigningKey]

    def keyring(self) -> Keyring:
        """The public halves of the envelope keys, each with the kinds it may sign."""
        return self.keyring_

    def signer(self, kind: str) -> SigningKey:
        """Raises ValueError for a kind nobody signs."""
        if kind not in DOCUMENT_KINDS:
            raise ValueError(f"no key signs documents of kind {kind!r}")
        return self.documents

    def root_keys_here(self) -> tuple[str, ...]:
        """Names of the root keys that lie on this machine, where a thief of the hub would find them."""
        return tuple(name for name in self.roles if name.startswith("root-"))


def open_keys(data: Path) -> HubKeys:
    """Read the keys below `data`, or make them at the very first start.

    Raises Malformed for a damaged key file, and for one that is missing though the repository exists: made anew, it would be
    a key that nobody believes.
    """
    folder = keys_folder(data)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    documents = _document_key(folder, data)
    if not has_repository(data):
        for name in (*ONLINE_ROLES, *ROOT_KEYS):
            make_key(folder, name)
    return HubKeys(documents, _keyring(folder, documents), read_roles(folder))


def keys_folder(data: Path) -> Path:
    return data / "keys"


def metadata_folder(data: Path) -> Path:
    return data / "tuf"


def has_repository(data: Path) -> bool:
    """Whether a root was ever made here. Raises Malformed when there was one and its folder is lost: another would orphan
    every node."""
    if any(metadata_folder(data).glob("*.root.json")):
        return True
    if root_path(data).exists():
        raise Malformed(
            f"{metadata_folder(data)} has no root metadata and {root_path(data)} says that it had: restore it from a backup,"
            " every node needs it"
        )
    return False


def root_path(data: Path) -> Path:
    """The newest root metadata: what nodes pin."""
    return data / "root.json"


def read_roles(folder: Path) -> dict[str, SigningKey]:
    """Every private key of a role that lies in `folder`. Raises Malformed naming a damaged file."""
    return {path.stem: read_key(path) for path in sorted(folder.glob("*.key")) if path.stem != DOCUMENTS}


def read_key(path: Path) -> SigningKey:
    """Raises Malformed naming the file."""
    try:
        return SigningKey.from_bytes(path.read_bytes())
    except Malformed as error:
        raise Malformed(f"{path}: {error}") from error


def make_key(folder: Path, name: str) -> SigningKey:
    """The key of that name; made, mode 0600, unless it is there."""
    path = folder / f"{name}.key"
    if not path.exists():
        write_whole(path, SigningKey.generate().to_bytes(), mode=0o600)
    return read_key(path)


def replace_key(folder: Path, name: str) -> SigningKey:
    """A new key under `name`; the old file stays beside it as `<name>.<its kid>.old`, until somebody removes it."""
    path = folder / f"{name}.key"
    if path.exists():
        old = read_key(path)
        write_whole(folder / f"{name}.{old.kid}.old", old.to_bytes(), mode=0o600)
    write_whole(path, SigningKey.generate().to_bytes(), mode=0o600)
    return read_key(path)


def write_keyring(folder: Path, keyring: Keyring) -> None:
    write_whole(folder / KEYRING_FILE, encode_keyring(keyring), mode=0o644)


def with_key(keyring: Keyring | None, key: SigningKey) -> Keyring:
    """`keyring` with `key` in front."""
    new = key.key(*DOCUMENT_KINDS)
    old: tuple[Key, ...] = () if keyring is None else keyring.keys
    return Keyring((new, *(other for other in old if other.kid != new.kid)))


def _document_key(folder: Path, data: Path) -> SigningKey:
    path = folder / f"{DOCUMENTS}.key"
    if not path.exists() and has_repository(data):
        raise Malformed(f"{path} is missing; put it back, or make another one with 'tierline keys rotate documents'")
    return make_key(folder, DOCUMENTS)


def _keyring(folder: Path, documents: SigningKey) -> Keyring:
    path = folder / KEYRING_FILE
    if path.exists():
        try:
            keyring = decode_keyring(path.read_bytes())
        except Malformed as error:
            raise Malformed(f"{path}: {error}") from error
        key = keyring.find(documents.kid)
        # A release may add kinds; without the targets key here nobody would believe the longer list, and the old one serves.
        if key is not None and (set(DOCUMENT_KINDS) <= set(key.kinds) or not (folder / "targets.key").exists()):
            return keyring
    else:
        keyring = None
    keyring = with_key(keyring, documents)
    write_keyring(folder, keyring)
    return keyring
