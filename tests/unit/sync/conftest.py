"""A node without network: its disk is real, its sources are a dictionary, its clock is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from sync.errors import DigestMismatch, Unavailable
from sync.fetch import Fetcher, Source
from sync.gate import Gate
from sync.holds import Holds
from sync.messages import Document, DocumentReport
from sync.packages import REFRESH_GAP, Packages
from sync.settings import Settings
from sync.state import Approval, StateStore
from sync.store import BlobStore
from sync.testing import FakeActivator, FakeClock, FakeRepository
from sync.trust import Keyring, SigningKey, encode_keyring, sign
from sync.updater import Probation, Updater

SIGNER = SigningKey.from_bytes(b"\1" * 32)
RING = Keyring((SIGNER.key("desired", "policy"),))


def digest_of(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


class FakeFetcher(Fetcher):
    """Serves files and the keyring from memory; `down` makes every source unreachable, `gate` holds a transfer up."""

    def __init__(self, store: BlobStore, clock: FakeClock) -> None:
        super().__init__([], store, clock=clock)
        self.files: dict[str, bytes] = {}
        self.keyring = encode_keyring(RING)
        self.down = False
        self.gate: asyncio.Event | None = None
        self.asked: list[str] = []

    async def fetch(self, digest: str, size: int) -> Path:
        if self._store.has(digest):
            return self._store.path(digest)
        self.asked.append(digest)
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise Unavailable("the sources are down")
        data = self.files[digest]
        if digest_of(data) != digest:
            raise DigestMismatch(f"other bytes than {digest}")
        staged = self._store.staging(digest)
        staged.write_bytes(data)
        return self._store.publish(digest, staged)

    @property
    def sources(self) -> tuple[Source, ...]:
        return (Source("http://fake"),)

    async def get(self, source: Source, path: str, limit: int) -> bytes:
        self.asked.append(path)
        if self.down:
            raise Unavailable("the sources are down")
        return self.keyring if path.startswith("/blobs/") else b"{}"


class Node:
    """The updater of one kind and everything around it. `restart` is a new process on the same disk."""

    def __init__(self, folder: Path, kind: str = "desired", scope: str = "node:acme.edge-1") -> None:
        self.folder, self.kind, self.scope = folder, kind, scope
        self.clock = FakeClock()
        self.reports: list[DocumentReport] = []
        self.revision = 0
        self.settings = Settings()
        self.repository = FakeRepository(RING, self.clock.wall(), lifetime=1e9)
        self._build()

    def _build(self) -> None:
        self.state = StateStore(self.folder / "state.db")
        self.store = BlobStore(self.folder)
        self.fetcher = FakeFetcher(self.store, self.clock)
        if self.state.approval() is None:
            ring = encode_keyring(RING)
            self.state.approve(Approval(self.clock.wall() + 1e9, self.clock.wall(), digest_of(ring), ring))
        self.packages = Packages(
            self.fetcher, self.state, b"root", self.clock, self.folder / "tuf", client=self.repository
        )
        self.activator = FakeActivator()
        self.holds = Holds(self.clock, lambda: self.settings.max_hold_seconds, self.state)
        self.holds.restore()
        self.gate = Gate(self.holds, lambda: self.settings, self.clock)
        self.updater = Updater(
            self.kind,
            self.scope,
            self.activator,
            state=self.state,
            store=self.store,
            packages=self.packages,
            fetcher=self.fetcher,
            clock=self.clock,
            capabilities={"engines": ["onnx"]},
            on_report=lambda kind, report: self.reports.append(report),
            probation=Probation(seconds=30, poll=1),
            settings=lambda: self.settings,
            gate=self.gate if self.kind == "desired" else None,
        )

    def document(self, body: bytes, digests: Sequence[str] = (), revision: int | None = None, **more: object) -> bytes:
        if revision is None:
            self.revision += 1
            revision = self.revision
        fields = {"issued": self.clock.wall(), **more}
        document = Document(self.kind, self.scope, revision, digests=tuple(digests), body=msgspec.Raw(body), **fields)  # type: ignore[arg-type]
        return sign(document, [SIGNER])

    def package(self, body: bytes, **more: object) -> bytes:
        """A document with one file, approved and ready at the source. Its body names what must load."""
        self.clock.advance(REFRESH_GAP)  # so that the repository may be asked again
        data = b"file of " + body
        self.fetcher.files[digest_of(data)] = data
        self.list_files({digest_of(item): len(item) for item in self.fetcher.files.values()})
        self.activator.wanted = (digest_of(data),)
        return self.document(body, [digest_of(data)], **more)  # type: ignore[arg-type]

    def list_files(self, files: Mapping[str, int]) -> None:
        self.repository.files = dict(files)
        self.repository.issued = self.clock.wall()

    async def restart(self, *, crash: bool = False) -> None:
        wanted = self.activator.wanted
        if crash:
            await self.kill()
        else:
            await self.close()
        self._build()
        self.activator.wanted = wanted

    async def kill(self) -> None:
        """What a kill leaves behind, as far as one process can play it: nothing is said goodbye to."""
        worker = self.updater._worker
        if worker is not None:
            worker.cancel()
            await asyncio.wait({worker})
        self.state.close()
        self.fetcher.close()

    async def close(self) -> None:
        await self.updater.close()
        self.state.close()
        self.fetcher.close()

    async def until(self, *states: str) -> DocumentReport:
        """Let the worker run until its report is in one of `states`."""
        await self.when(lambda: self.updater.report.state in states)
        return self.updater.report

    async def when(self, ready: Callable[[], bool]) -> None:
        async with asyncio.timeout(3):
            while not ready():
                await asyncio.sleep(0)

    def is_retrying(self) -> bool:
        """Whether an update failed and waits for its next try."""
        return self.updater.report.state == "failed" and self.clock.sleepers > 0

    async def pass_time(self) -> None:
        """Until an update waits for its next try; then let enough time pass for it."""
        await self.when(self.is_retrying)
        self.clock.advance(100)

    async def watched(self) -> None:
        """Until the version just committed is on probation and the updater waits for time to pass."""
        await self.when(lambda: self.updater.report.state == "probation" and self.clock.sleepers > 0)

    async def settle(self) -> None:
        """Until an offer has been looked at and nothing is left to do about it."""
        await self.when(lambda: not self.updater._admission.waits)
        for _ in range(50):
            await asyncio.sleep(0)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    await node.close()


@pytest.fixture
async def policy(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path, "policy", "tenant:acme")
    yield node
    await node.close()
