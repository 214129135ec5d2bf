"""One node that takes files and deltas without end, against the hub's real server: the others do not notice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from hub_in_memory import Bench, digest, hub_bench, make_manifest

from cloud_hub import deltas, server, shares
from cloud_hub.app import create_app
from models.manifest import encode_manifest
from sync.fetch import Fetcher, Source
from sync.store import BlobStore
from sync.testing import FakeClock

GREEDY, OTHER = "acme.greedy", "acme.other"
LARGE = Random(3).randbytes(1 << 20) * 24
"""More than the buffers of a connection hold on both sides."""


@dataclass
class Site:
    bench: Bench
    url: str

    def client(self, node: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.bench.tokens[node]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=10)

    def hang(self, node: str, path: str) -> socket.socket:
        """A request whose answer nobody reads."""
        port = int(self.url.rpartition(":")[2])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        token = self.bench.tokens[node]
        sock.sendall(f"GET {path} HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {token}\r\n\r\n".encode())
        return sock

    async def running(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.bench.hub.shares.running != count:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def site_in(folder: Path) -> AsyncIterator[Site]:
    listener = socket.create_server(("127.0.0.1", 0))
    async with hub_bench(folder) as bench, server._serving(create_app(bench.hub), listener, None):
        for node in (GREEDY, OTHER):
            await bench.add_node(node)
        yield Site(bench, f"http://127.0.0.1:{listener.getsockname()[1]}")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_in(tmp_path / "hub") as running:
        await running.bench.client.put(f"/api/v1/blobs/{digest(LARGE)}", content=LARGE)
        yield running


class Waiting(FakeClock):
    """Does something instead of waiting."""

    def __init__(self, instead: Callable[[], Any]) -> None:
        super().__init__()
        self.instead = instead
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await self.instead()


async def test_a_node_that_hangs_on_to_its_downloads_keeps_no_other_node_out(site: Site, tmp_path: Path) -> None:
    path = f"/blobs/{digest(LARGE)}"
    with ExitStack() as held:
        for _ in range(shares.NODE_SLOTS):
            held.enter_context(site.hang(GREEDY, path))
        await site.running(shares.NODE_SLOTS)
        async with site.client(GREEDY) as greedy, site.client(OTHER) as other:
            refused = await greedy.get(path)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert "this node" in refused.json()["error"]
            assert (await greedy.get(path, headers={"range": "bytes=0-0"})).status_code == 206
            assert (await greedy.get("/tuf/timestamp.json")).status_code == 200
            assert (await other.get(path)).content == LARGE

        async def let_go() -> None:
            held.close()
            await site.running(0)

        clock = Waiting(let_go)
        source = Source(site.url, site.bench.tokens[GREEDY])
        fetched = await Fetcher([source], BlobStore(tmp_path / "node"), clock=clock).fetch(digest(LARGE), len(LARGE))
        assert fetched.read_bytes() == LARGE
        assert [2.0 <= pause <= 3.0 for pause in clock.pauses] == [True], "it came back when the hub had said, jittered"


async def test_a_download_that_nobody_reads_is_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "PIECE_SECONDS", 0.2)
    with site.hang(GREEDY, f"/blobs/{digest(LARGE)}"):
        await site.running(1)
        await site.running(0)


async def test_a_node_that_asks_for_deltas_without_end_keeps_the_worker_from_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    make = deltas.Deltas._make

    async def held_up(self: deltas.Deltas, base: str, target: str, size: int) -> deltas.Made:
        began.set()
        await go_on.wait()
        return await make(self, base, target, size)

    monkeypatch.setattr(deltas.Deltas, "_make", held_up)
    async with site_in(tmp_path / "hub") as site:
        old = Random(1).randbytes(40_000)
        files = [old, *(old[:30_000] + bytes([number]) + old[30_000:] for number in range(deltas.NODE_WAITING + 2))]
        for version, model in enumerate(files, 1):
            golden = b"golden %d" % version
            for content in (golden, model):
                await site.bench.client.put(f"/api/v1/blobs/{digest(content)}", content=content)
            manifest = encode_manifest(make_manifest("digits-cnn", str(version), golden, model))
            await site.bench.call("POST", "/api/v1/packages", 201, content=manifest)
        *most, late, last = [f"/deltas/{digest(model)}?from={digest(old)}" for model in files[1:]]
        async with site.client(GREEDY) as greedy, site.client(OTHER) as other:
            assert {(await greedy.get(path)).status_code for path in most} == {503}
            await began.wait()
            refused = await greedy.get(late)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert (await other.get(last)).status_code == 503
            go_on.set()
            async with asyncio.timeout(60):
                while (found := await other.get(last)).status_code == 503:
                    await asyncio.sleep(0.05)
            assert found.status_code == 200
            assert (await greedy.get(late)).status_code == 503, "and it has its turn again"
