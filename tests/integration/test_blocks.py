"""Files over MQTT alone: a hub and a node that share nothing but a broker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import httpx
import pytest
from hub_in_memory import Bench, digest, make_manifest

from cloud_hub import blocks as hub_blocks
from cloud_hub.app import create_app
from cloud_hub.hub import open_hub
from models.desired import decode_desired, digests_of
from models.manifest import encode_manifest
from sync.blocks import ABSENT, BLOCK, BUSY, OK, WINDOW, Block, Blocks, BlockSettings, GetBlocks, pack, unpack
from sync.clock import SystemClock
from sync.errors import Absent, Malformed, Unavailable
from sync.fetch import Fetcher, Source
from sync.identity import Membership
from sync.member import join
from sync.messages import Capabilities, encode
from sync.store import BlobStore
from sync.testing import FakeActivator, FakeClock, MemoryBroker, MemoryLink
from sync.topics import down, up

NODE, OTHER = "acme.edge-1", "acme.edge-2"
MODEL = Random(1).randbytes(500_000)
FAST = BlockSettings(rate=1e9)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_blocks, "RATE", 1e9)
    monkeypatch.setattr(hub_blocks, "NODE_RATE", 1e9)


@asynccontextmanager
async def running_hub(folder: Path) -> AsyncIterator[Bench]:
    """With one package deployed to one of two nodes."""
    broker = MemoryBroker()
    async with MemoryLink(broker) as link, open_hub(folder, link, epoch="e1") as hub:
        headers = {"authorization": f"Bearer {(hub.data / 'admin.token').read_text().strip()}"}
        transport = httpx.ASGITransport(create_app(hub))
        async with httpx.AsyncClient(transport=transport, base_url="http://hub", headers=headers) as client:
            bench = Bench(hub, client, broker, link, FakeClock())
            await bench.add_node(NODE, which="first")
            await bench.add_node(OTHER)
            for content in (b"golden", MODEL):
                await client.put(f"/api/v1/blobs/{digest(content)}", content=content)
            manifest = make_manifest("digits-cnn", "1", b"golden", MODEL)
            await bench.call("POST", "/api/v1/packages", 201, content=encode_manifest(manifest))
            await bench.deploy("first", {"digits": "digits-cnn/1"}, which="first")
            yield bench


@asynccontextmanager
async def blocks_of(bench: Bench, node: str = NODE) -> AsyncIterator[Blocks]:
    async with MemoryLink(bench.broker) as link:
        blocks = Blocks(link, node, SystemClock(), FAST)
        link.subscribe(down(node, "block"))

        async def listen() -> None:
            async for message in link.messages():
                blocks.heard(message.payload)

        listening = asyncio.create_task(listen())
        yield blocks
        listening.cancel()


async def until(happened: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.02)


async def test_a_node_is_updated_over_mqtt_alone_metadata_documents_and_files(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        folder = tmp_path / "node"
        folder.mkdir()
        (folder / "root.json").write_bytes(bench.hub.root)
        (folder / "token").write_bytes(b"secret")
        (folder / "token").chmod(0o600)
        desired = FakeActivator()
        desired.plan = lambda body, capabilities: digests_of(decode_desired(body))  # type: ignore[method-assign]
        membership = Membership(
            id=NODE,
            tier="edge",
            broker="mqtt://127.0.0.1:1",
            root=folder / "root.json",
            credential=folder / "token",
            data=folder / "data",
        )
        async with (
            MemoryLink(bench.broker) as link,
            join(
                membership,
                activators={"desired": desired, "policy": FakeActivator()},
                capabilities=Capabilities(tier="edge"),
                running=dict,
                link=link,
                blocks=FAST,
            ),
        ):
            await until(lambda: desired.active is not None)
        assert MODEL in desired.prepared[0][1].values()


async def test_a_half_download_is_continued_and_the_hub_never_runs_ahead_of_the_window(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench, blocks_of(bench) as blocks:
        store = BlobStore(tmp_path / "node")
        store.staging(digest(MODEL)).write_bytes(MODEL[:300_000])
        fetcher = Fetcher([], store)
        fetcher.fall_back_to(blocks)
        ahead, most = 0, 0
        original = bench.broker.publish

        def counted(topic: str, payload: bytes, *, retain: bool = False) -> None:
            nonlocal ahead, most
            if topic == up(NODE, "block"):
                ahead += 1
                most = max(most, ahead)
            elif topic == down(NODE, "block"):
                ahead -= 1
                assert len(payload) < 64 * 1024
            original(topic, payload, retain=retain)

        bench.broker.publish = counted  # type: ignore[method-assign]
        assert (await fetcher.fetch(digest(MODEL), len(MODEL))).read_bytes() == MODEL
        assert blocks.received == 200_000
        assert (fetcher.traffic.files, fetcher.traffic.received()) == ({"blocks": 1}, {"blocks": 200_000})
        assert most <= WINDOW


async def test_a_node_gets_what_its_own_document_names_and_nothing_else(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        secret = b"uploaded, never approved"
        await bench.client.put(f"/api/v1/blobs/{digest(secret)}", content=secret)
        async with blocks_of(bench) as mine, blocks_of(bench, OTHER) as theirs:
            assert (await mine.get(f"/blobs/{digest(MODEL)}", 0, 10)).data == MODEL[:10]
            assert (await theirs.get("/tuf/timestamp.json", 0, 10)).total > 100
            for asking, path in (
                (mine, f"/blobs/{digest(secret)}"),
                (theirs, f"/blobs/{digest(MODEL)}"),
                (mine, "/tuf/../hub.sqlite"),
                (mine, "/../admin.token"),
                (mine, "/api/v1/nodes"),
            ):
                with pytest.raises(Absent):
                    await asking.get(path, 0, 10)
            assert (await mine.get(f"/blobs/{digest(MODEL)}", 10**9, 10)).data == b""


async def test_a_node_that_asks_without_end_is_answered_within_bounds(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench:
        path = f"/blobs/{digest(MODEL)}"
        for number in range(500):
            bench.broker.publish(up(NODE, "block"), encode(GetBlocks(id=number, path=path, offset=0, n=8)))
        for garbage in (
            b"",
            b"\xff",
            b"[" * 400,
            b"{}",
            b'{"call":"blocks","id":-1,"path":"/","offset":0}',
            b"x" * 5_000,
        ):
            bench.broker.publish(up(NODE, "block"), garbage)
        bench.broker.publish(up(NODE, "block"), encode(GetBlocks(id=1, path=path, offset=0, length=BLOCK + 1)))
        bench.broker.publish(up("acme.stranger", "block"), encode(GetBlocks(id=1, path=path, offset=0)))
        async with blocks_of(bench) as blocks:
            assert (await blocks.get(path, 0, 10)).data == MODEL[:10]
        answers = Counter(message.topic for message in bench.broker.log if message.topic.endswith("down/block"))
        assert set(answers) == {down(NODE, "block")}
        assert answers[down(NODE, "block")] <= 3 * (8 + WINDOW)


async def test_http_sources_are_asked_first_and_blocks_only_when_none_delivers(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub") as bench, blocks_of(bench) as blocks:

        class Quick(SystemClock):
            async def sleep(self, seconds: float) -> None:
                await asyncio.sleep(0)

        fetcher = Fetcher([Source("http://127.0.0.1:9")], BlobStore(tmp_path / "node"), clock=Quick())
        fetcher.fall_back_to(blocks)
        assert [source.url for source in fetcher.sources] == ["http://127.0.0.1:9", "mqtt:"]
        assert (await fetcher.fetch(digest(MODEL), len(MODEL))).read_bytes() == MODEL


async def test_a_lost_block_is_asked_for_again_and_a_dead_hub_is_unavailable() -> None:
    clock, broker = FakeClock(), MemoryBroker()
    async with MemoryLink(broker) as link:
        blocks = Blocks(link, NODE, clock, FAST)
        blocks.heard(pack(Block(0, OK, 0, 0, b"")))  # a hub that speaks blocks is given several tries
        asking = asyncio.ensure_future(blocks.get("/tuf/timestamp.json", 0, 10))
        for lost in range(4):
            while len(broker.payloads(up(NODE, "block"))) <= lost or not clock.sleepers:
                await asyncio.sleep(0)
            clock.advance(20)
        with pytest.raises(Unavailable, match="no block"):
            await asking
        with pytest.raises(Unavailable, match="a while ago"):
            await blocks.get("/tuf/timestamp.json", 0, 10)
        assert len(broker.payloads(up(NODE, "block"))) == 4
        link.drop()
        with pytest.raises(Unavailable, match="not connected"):
            await blocks.get("/tuf/timestamp.json", 0, 10)
        link.heal()


@pytest.mark.parametrize(
    "payload",
    [b"", b"TLB1", b"x" * 26, b"x" * 100_000, pack(Block(1, 9, 0, 0, b"")), pack(Block(1, OK, 0, 1 << 50, b""))],
)
def test_what_is_no_block_is_refused(payload: bytes) -> None:
    with pytest.raises(Malformed):
        unpack(payload)


def test_a_block_survives_the_wire() -> None:
    for status in (OK, ABSENT, BUSY):
        block = Block(7, status, 5, 10, b"bytes")
        assert unpack(pack(block)) == block
