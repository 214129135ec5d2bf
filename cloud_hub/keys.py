"""The hub's two signing keys, made at the first run, and the keyring that nodes pin.

Two keys, because what may run where changes every day and which files exist changes with a release: the catalogue's key can
move to a machine of its own without touching anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloud_hub.files import write_whole
from sync.trust import Keyring, SigningKey, encode_keyring

DOCUMENT_KINDS = ("desired", "policy", "settings")
CATALOG_KINDS = ("catalog",)


@dataclass(frozen=True, slots=True)
class HubKeys:
    """`documents` signs `DOCUMENT_KINDS`, `catalog` signs `CATALOG_KINDS`; neither may do the other's work."""

    documents: SigningKey
    catalog: SigningKey

    def keyring(self) -> Keyring:
        """The public halves, each with the kinds it may sign."""
        return Keyring((self.documents.key(*DOCUMENT_KINDS), self.catalog.key(*CATALOG_KINDS)))

    def signer(self, kind: str) -> SigningKey:
        return self.catalog if kind in CATALOG_KINDS else self.documents


def open_keys(data: Path) -> HubKeys:
    """Read the keys below `data`, or make them; `keyring.json` is written beside them.

    Raises Malformed for a key file of the wrong size. An existing key is never overwritten: every node pins it.
    """
    folder = data / "keys"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = HubKeys(_open_key(folder / "documents.key"), _open_key(folder / "catalog.key"))
    write_whole(keyring_path(data), encode_keyring(keys.keyring()), mode=0o644)
    return keys


def keyring_path(data: Path) -> Path:
    return data / "keyring.json"


def _open_key(path: Path) -> SigningKey:
    if not path.exists():
        write_whole(path, SigningKey.generate().to_bytes(), mode=0o600)
    return SigningKey.from_bytes(path.read_bytes())
