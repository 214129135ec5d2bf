"""A hub on a broker in memory as its tests use it, and small packages to publish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cloud_hub.app import create_app
from cloud_hub.hub import Hub, open_hub
from models.manifest import Blob, Manifest, Variant, encode_manifest
from models.tensor import TensorSpec
from sync.messages import DocumentReport, Reported, State, encode
from sync.testing import FakeClock, MemoryBroker, MemoryLink
from sync.topics import up


@dataclass
class Bench:
    """A running hub, a client with the admin's token, and what the other side of the broker may do."""

    hub: Hub
    client: httpx.AsyncClient
    broker: MemoryBroker
    link: MemoryLink
    clock: FakeClock
    tokens: dict[str, str] = field(default_factory=dict)

    async def call(self, method: str, path: str, expect: int, **request: Any) -> Any:
        answer = await self.client.request(method, path, **request)
        assert answer.status_code == expect, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    async def publish(self, package: str = "digits-cnn", version: str = "1", seed: bytes = b"") -> str:
        """Publish a package of two small files; the digest of its manifest."""
        golden, model = b"golden" + seed, b"model " + version.encode() + seed
        manifest = make_manifest(package, version, golden, model)
        for content in (golden, model):
            await self.client.put(f"/api/v1/blobs/{digest(content)}", content=content)
        answer = await self.call("POST", "/api/v1/packages", 201, content=encode_manifest(manifest))
        return str(answer["manifest"])

    async def add_node(self, node_id: str, tier: str = "edge", **labels: str) -> None:
        answer = await self.call("POST", "/api/v1/nodes", 201, json={"id": node_id, "tier": tier, "labels": labels})
        self.tokens[node_id] = answer["token"]

    async def deploy(self, name: str, models: dict[str, str], expect: int = 201, **selector: str) -> Any:
        body = {"selector": selector, "models": models}
        return await self.call("PUT", f"/api/v1/deployments/{name}", expect, json=body)

    async def says(self, node_id: str, leaf: str, message: msgspec.Struct) -> None:
        """A node says something; returns when the hub has written it down and acted on it."""
        stored = self.hub.fleet.counts["stored"]
        self.broker.publish(up(node_id, leaf), encode(message), retain=True)
        await eventually(lambda: self.hub.fleet.counts["stored"] > stored)
        await settle()

    async def born(self, node_id: str) -> None:
        await self.says(node_id, "state", State(state="ready", boot="b1"))

    async def reports(self, node_id: str, kind: str = "desired", **report: Any) -> None:
        await self.says(
            node_id,
            "reported",
            Reported(boot="b1", seq=1, documents={kind: DocumentReport(**{"state": "idle", **report})}),
        )


def digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def make_manifest(package: str, version: str, golden: bytes, model: bytes) -> Manifest:
    spec = TensorSpec("x", "FP32", (-1, 64))
    return Manifest(
        package=package,
        version=version,
        inputs=(spec,),
        outputs=(TensorSpec("y", "FP32", (-1, 10)),),
        variants=(Variant("onnx", "fp32", Blob(digest(model), len(model))),),
        golden=Blob(digest(golden), len(golden)),
    )


async def eventually(happened: Callable[[], bool], turns: int = 20_000) -> None:
    """Let the loop turn, and the threads it hands work to, until something is so."""
    for _ in range(turns):
        if happened():
            return
        await asyncio.sleep(0)
    pytest.fail("it did not happen")


async def settle() -> None:
    """Let a comparison that was woken run to its end: its database work happens in a thread."""
    for _ in range(5):
        await asyncio.to_thread(lambda: None)


@asynccontextmanager
async def hub_bench(folder: Path) -> AsyncIterator[Bench]:
    """A hub in `folder`, started for the length of the block."""
    clock, broker = FakeClock(), MemoryBroker()
    async with (
        MemoryLink(broker) as link,
        open_hub(folder, link, epoch="e1", clock=clock) as hub,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(hub)),
            base_url="http://hub",
            headers={"authorization": f"Bearer {(hub.data / 'admin.token').read_text().strip()}"},
        ) as client,
    ):
        yield Bench(hub, client, broker, link, clock)
