"""What `powercut.py` records: a node's updater, or its outbox, at work. Promises go to standard output as `ACK ...` lines.

    powercut_child.py updater FOLDER URL ENVELOPE...     one document after the other, each until it is in force
    powercut_child.py outbox FOLDER COUNT                puts events in, takes acknowledgements for half of them

The updater's files, state, fetcher and transfers are real; the update metadata is played by a fake, whose own files are
another matter.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sync.activation import Probation
from sync.clock import SystemClock
from sync.events import Ack
from sync.fetch import Fetcher, Source
from sync.messages import DocumentReport
from sync.outbox import Outbox
from sync.packages import Packages
from sync.state import StateStore
from sync.store import BlobStore
from sync.testing import FakeRepository
from sync.trust import Keyring, digest_of
from sync.updater import Updater

KIND, SCOPE = "desired", "node:acme.edge-1"


def promise(text: str) -> None:
    os.write(1, f"ACK {text}\n".encode())


class Reader:
    """The activator: a body is a JSON list of digests; each file is read whole and its bytes are compared with its name."""

    def __init__(self) -> None:
        self.active = b""

    def plan(self, body: bytes, capabilities: Mapping[str, object]) -> Sequence[str]:
        return msgspec.json.decode(body, type=list[str])

    async def prepare(self, body: bytes, blobs: Mapping[str, Path]) -> object:
        for digest, path in blobs.items():
            if digest_of(path.read_bytes()) != digest:
                raise ValueError(f"{path.name} has other bytes than its name says")
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


class Node:
    """An updater on `folder`, as `sync.member` would put it together. Without `url` every source is down."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        clock = SystemClock()
        self.state, store = StateStore(folder / "state.db"), BlobStore(folder)
        repository = FakeRepository(Keyring(()), clock.wall())
        if url is not None:
            repository.files = msgspec.json.decode((folder.parent / "files.json").read_bytes(), type=dict[str, int])
            repository.keyring = (folder.parent / "keyring.json").read_bytes()
        self.fetcher = Fetcher([Source(url)] if url else [], store, clock=clock)
        self.activator = Reader()
        self.updater = Updater(
            KIND,
            SCOPE,
            self.activator,
            state=self.state,
            store=store,
            packages=Packages(self.fetcher, self.state, b"root", clock, folder / "tuf", client=repository),
            fetcher=self.fetcher,
            clock=clock,
            capabilities={},
            on_report=self._reported,
            probation=Probation(seconds=0.1, poll=0.02),
        )
        self._said = 0
        self._promising = url is not None

    def _reported(self, kind: str, report: DocumentReport) -> None:
        """What the hub hears must be true after a power cut too."""
        if self._promising and report.applied > self._said:
            self._said = report.applied
            promise(f"applied {report.applied}")

    async def close(self) -> None:
        await self.updater.close()
        self.fetcher.close()
        self.state.close()


async def update(folder: Path, url: str, envelopes: Sequence[Path]) -> None:
    node = Node(folder, url)
    await node.updater.start()
    for revision, path in enumerate(envelopes, start=1):
        node.updater.offer(path.read_bytes())
        async with asyncio.timeout(20):
            while node.updater.report.applied < revision or node.updater.report.state != "applied":
                await asyncio.sleep(0.005)
    await node.close()


async def put_events(folder: Path, count: int) -> None:
    async with Outbox(folder / "outbox.db", clock=SystemClock()) as outbox:
        for start in range(0, count, 4):
            ids = await asyncio.gather(
                *(outbox.put("app.proof", f"event {index}".encode()) for index in range(start, min(start + 4, count)))
            )
            for id_ in ids:
                promise(f"put {id_}")
            taken = tuple(ids[::2])
            for id_ in taken:
                promise(f"taken {id_}")
            outbox.acknowledge(msgspec.json.encode(Ack(ids=taken)))


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "updater":
        asyncio.run(update(Path(folder), rest[0], [Path(each) for each in rest[1:]]))
    else:
        asyncio.run(put_events(Path(folder), int(rest[0])))
