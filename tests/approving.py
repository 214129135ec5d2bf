"""What the misbehaving hub of `sync.chaos` serves so that real nodes take its files for approved: the real hub's repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cloud_hub.keys import metadata_folder, open_keys
from cloud_hub.tuf_repository import Repository
from sync.clock import Clock
from sync.trust import Keyring, digest_of, encode_keyring


class Approving:
    """An `Approve` on the folder `data`. `root`: what nodes pin."""

    def __init__(self, data: Path, clock: Clock) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self._data = data
        self._repository = Repository(data, open_keys(data), clock)
        self.root = self._repository.root

    def __call__(self, files: Mapping[str, bytes], keyring: Keyring) -> Mapping[str, bytes]:
        ring = encode_keyring(keyring)
        sizes = {digest: len(content) for digest, content in files.items()}
        self._repository.publish(sizes, (digest_of(ring), len(ring)))
        paths = [path for path in metadata_folder(self._data).iterdir() if path.is_file()]
        return {f"/blobs/{digest_of(ring)}": ring, **{f"/tuf/{path.name}": path.read_bytes() for path in paths}}
