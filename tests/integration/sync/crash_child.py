"""A node's updater in a process of its own, to be killed: `crash_child.py FOLDER URL [ENVELOPE]`.

Starts from the disk, offers the envelope when one is given, waits for the outcome and prints the body in force. Whatever is
loaded is written down in `loaded.log` first, with the digest of the bytes that were really there.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sync.clock import SystemClock
from sync.download import Limits
from sync.fetch import Fetcher, Source
from sync.packages import Packages
from sync.state import StateStore
from sync.store import BlobStore
from sync.testing import FakeRepository
from sync.trust import Keyring, digest_of
from sync.updater import Updater


class FileActivator:
    """The body is a JSON list of the digests it needs."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "loaded.log"
        self.active = b"nothing"

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        return msgspec.json.decode(body, type=list[str])

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        with self._log.open("a") as log:
            for path in blobs.values():
                print(digest_of(path.read_bytes()), file=log)
        return body

    async def commit(self, token: object) -> None:
        assert isinstance(token, bytes)
        self.active = token

    async def discard(self, token: object) -> None:
        """Nothing is held."""

    def verdict(self) -> str:
        return "good"

    def settled(self) -> None:
        """Nothing was kept."""


def settled(updater: Updater) -> bool:
    """Done, or waiting for a source to come right."""
    report = updater.report
    if report.state == "failed":
        return "digest_mismatch" in (report.error or "")
    return report.state in ("applied", "refused") and not updater._admission.waits and updater._running is None


async def main(folder: Path, url: str, envelope: bytes | None) -> None:
    state, store, clock = StateStore(folder / "state.db"), BlobStore(folder), SystemClock()
    repository = FakeRepository(Keyring(()), clock.wall())
    repository.files = msgspec.json.decode((folder / "files.json").read_bytes(), type=dict[str, int])
    repository.keyring = (folder / "keyring.json").read_bytes()
    limits = Limits(connect_seconds=0.5, read_seconds=0.5, budget_seconds=1)
    fetcher = Fetcher([Source(url)], store, clock=clock, limits=limits)
    activator = FileActivator(folder)
    updater = Updater(
        "desired",
        "node:acme.edge-1",
        activator,
        state=state,
        store=store,
        packages=Packages(fetcher, state, b"root", clock, folder / "tuf", client=repository),
        fetcher=fetcher,
        clock=clock,
        capabilities={},
        on_report=lambda kind, report: None,
    )
    await updater.start()
    if envelope is not None:
        updater.offer(envelope)
        async with asyncio.timeout(10):
            while not settled(updater):
                await asyncio.sleep(0.005)
    print(activator.active.decode())
    await updater.close()
    fetcher.close()
    state.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_bytes() if len(sys.argv) > 3 else None))
