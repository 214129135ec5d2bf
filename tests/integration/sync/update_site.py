"""A hub's update repository, a mirror that an attacker owns, a node behind it. Real metadata, no sockets, a clock by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata

from cloud_hub import tuf_metadata as tuf
from cloud_hub.keys import open_keys
from cloud_hub.tuf_repository import Repository
from sync.errors import Absent, Malformed
from sync.fetch import Fetcher, Source
from sync.messages import Document
from sync.packages import Packages
from sync.state import StateStore
from sync.store import BlobStore
from sync.testing import FakeClock
from sync.trust import SigningKey, digest_of, encode_keyring, sign, signer_of, verify
from sync.tuf_client import answer
from sync.tuf_messages import Answer, Ask

NODE, TENANT = "acme.edge-1", "acme"
GOOD, OLD, EVIL = (digest_of(text) for text in (b"good", b"old and bad", b"evil"))
SIZE = 1_000
THIEF = SigningKey.from_bytes(b"\x66" * 32)
DAY = 86_400.0


class InProcess:
    """The metadata child without the child."""

    def ask(self, ask: Ask, get: Callable[[str, int], bytes]) -> Answer:
        return answer(ask, get)

    def close(self) -> None:
        """Nothing runs."""


class Mirror(Fetcher):
    """Answers from the hub unless the attacker has put something in its place. `served`: path -> what is answered."""

    def __init__(self, site: Site, store: BlobStore) -> None:
        super().__init__([Source("http://mirror")], store)
        self._site = site
        self.served: dict[str, bytes] = {}
        self.rewrite: Callable[[bytes], bytes] = bytes
        self.frozen: dict[str, bytes] | None = None

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        found = self.served.get(path)
        if found is None:
            found = self._honest(path) if self.frozen is None else self.frozen.get(path)
        if found is None:
            raise Absent(path)
        found = self.rewrite(found)
        if len(found) > limit:
            raise Malformed(f"{path} has more than {limit} bytes")
        return found

    def _honest(self, path: str) -> bytes | None:
        if path.startswith("/blobs/"):
            return self._site.keyring if path == f"/blobs/{digest_of(self._site.keyring)}" else None
        return self._site.repository.read(path.removeprefix("/tuf/"))


class Site:
    """`hub`: its data folder, `node`: the node's. `files`: approved now."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self.hub, self.node, self.clock = folder / "hub", folder / "node", clock
        self.files: dict[str, int] = {GOOD: SIZE, OLD: SIZE}
        self.open_hub()
        self.root = self.repository.root
        self.mirror = Mirror(self, BlobStore(self.node))
        self.start()

    def open_hub(self) -> None:
        """Start the hub, as after `tierline keys` changed something."""
        self.keys = open_keys(self.hub)
        self.keyring = encode_keyring(self.keys.keyring())
        self.repository = Repository(self.hub, self.keys, self.clock)
        self.publish()

    def publish(self, files: Mapping[str, int] | None = None) -> None:
        self.files = dict(self.files if files is None else files)
        self.repository.publish(self.files, (digest_of(self.keyring), len(self.keyring)))

    def start(self) -> None:
        """Start the node on what its disk has."""
        self.state = StateStore(self.node / "state.db")
        self.packages = Packages(self.mirror, self.state, self.root, self.clock, self.node / "tuf", client=InProcess())

    def stop(self) -> None:
        self.packages.close()
        self.state.close()

    async def know(self) -> None:
        """The node refreshes honestly and looks both files up."""
        await self.packages.require([GOOD])
        self.clock.advance(120)

    def capture(self) -> dict[str, bytes]:
        """All that the hub serves now: what an attacker may keep and serve later."""
        folder = self.hub / "tuf"
        taken = {f"/tuf/{path.name}": path.read_bytes() for path in folder.glob("*.json")}
        return {**taken, f"/blobs/{digest_of(self.keyring)}": self.keyring}

    def zero_cache(self) -> None:
        for path in (self.node / "tuf").rglob("*.json"):
            if not path.is_symlink():
                path.write_bytes(b"")

    def delete_cache(self) -> None:
        shutil.rmtree(self.node / "tuf")

    # --- forging ------------------------------------------------------------------------------------------------

    def name_of(self, role: str) -> str:
        """Path of a role's newest file."""
        if role == "timestamp":
            return "/tuf/timestamp.json"
        versions = [int(path.name.partition(".")[0]) for path in (self.hub / "tuf").glob(f"*.{role}.json")]
        return f"/tuf/{max(versions)}.{role}.json"

    def newest(self, role: str) -> Metadata:  # type: ignore[type-arg]
        data = self.repository.read(self.name_of(role).removeprefix("/tuf/"))
        assert data is not None
        return Metadata.from_bytes(data)

    def forge(self, role: str, change: Callable[[Metadata], None], keys: Sequence[SigningKey]) -> bytes:  # type: ignore[type-arg]
        """The newest metadata of a role, changed, and signed by these keys alone."""
        metadata = self.newest(role)
        metadata.signatures.clear()
        change(metadata)
        return tuf.signed_bytes(metadata, keys)

    def evil_bin(self, key: SigningKey, wanted: str = EVIL) -> tuple[str, bytes]:
        """Path and contents of the bin that would list a digest."""
        role = tuf.bin_of(f"sha256/{wanted.removeprefix('sha256:')}")

        def change(metadata: Metadata) -> None:  # type: ignore[type-arg]
            file = tuf.target_of(wanted, SIZE)
            metadata.signed.targets[file.path] = file

        return self.name_of(role), self.forge(role, change, [key])

    def document(self, digest: str, key: SigningKey, **changed: object) -> bytes:
        fields: dict[str, object] = {"kind": "desired", "scope": f"node:{NODE}", "revision": 1, **changed}
        document = Document(
            issued=self.clock.wall(),
            digests=(digest,),
            body=msgspec.Raw(b"{}"),
            **fields,  # type: ignore[arg-type]
        )
        return sign(document, [key])

    async def admit(self, envelope: bytes) -> Mapping[str, int]:
        """What the updater does before it fetches: the sizes of the files the document names."""
        keyring = await self.packages.keyring(signer_of(envelope))
        now = max(self.clock.wall(), self.state.time_floor())
        verified = verify(envelope, keyring, kind="desired", scope=f"node:{NODE}", floor=0, now=now)
        return await self.packages.require(verified.document.digests)
