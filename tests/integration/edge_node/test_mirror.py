"""Devices behind one edge node, over real sockets: their files cross the uplink once, and the edge is not overrun."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from http_fake import HttpFake
from meter_fakes import numbers

from edge_node.blobs import BlobMirror
from edge_node.shares import MirrorSettings
from models.errors import TierlineError
from models.serving.exchange import HttpRequest, HttpResponse, error_response
from models.serving.http.server import serve_http
from models.serving.meter.delivery import REJECTED, watch_mirror
from models.serving.meter.registry import Registry
from sync.clock import SystemClock
from sync.fetch import Fetcher, Source
from sync.quota import Quota
from sync.store import BlobStore
from sync.sweep import Sweeper

DATA = bytes(range(256)) * 4_000
DIGEST = f"sha256:{sha256(DATA).hexdigest()}"


class Hub(HttpFake):
    """Counts what crosses the uplink. `slow`: seconds before a transfer's first byte."""

    def __init__(self) -> None:
        self.transfers: Counter[str] = Counter()
        self.bytes = 0
        self.files = {DIGEST: DATA}
        self.slow = 0.0
        hub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                digest = self.path.removeprefix("/blobs/")
                data = hub.files[digest]
                asked = self.headers.get("Range")
                whole = asked is None
                part = data if whole else data[:1]
                if whole:
                    threading.Event().wait(hub.slow)
                with lock:
                    hub.transfers[digest] += whole
                    hub.bytes += len(part)
                self.send_response(200 if whole else 206)
                if not whole:
                    self.send_header("Content-Range", f"bytes 0-0/{len(data)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part)

            def log_message(self, *args: Any) -> None:
                """Silent."""

        super().__init__(Handler)


@pytest.fixture
def hub() -> Iterator[Hub]:
    started = Hub()
    yield started
    started.close()


@asynccontextmanager
async def edge(
    folder: Path, hub: Hub, settings: MirrorSettings | None = None, quota: Quota | None = None
) -> AsyncIterator[tuple[str, BlobMirror]]:
    store = BlobStore(folder)
    fetcher = Fetcher([Source(hub.url)], store)
    sweeper = Sweeper(store, frozenset, quota or Quota(cache_bytes=1 << 30, free_bytes=0), SystemClock())
    fetcher.room_for = sweeper.room_for

    async def answer(request: HttpRequest) -> HttpResponse:
        try:
            return await mirror.blob(request)
        except TierlineError as error:
            return error_response(error)

    async with BlobMirror(store, fetcher, None, settings) as mirror, serve_http(answer) as server:  # type: ignore[arg-type]
        yield server.url, mirror
    fetcher.close()


async def test_twenty_devices_that_ask_at_once_cost_one_transfer_over_the_uplink(tmp_path: Path, hub: Hub) -> None:
    hub.slow = 0.2
    # All devices have one address here: what one may do is what twenty may do.
    async with edge(tmp_path / "edge", hub, MirrorSettings(slots=8, device_slots=8)) as (url, mirror):
        stores = [BlobStore(tmp_path / f"device{number}") for number in range(20)]
        devices = [Fetcher([Source(url), Source(hub.url)], store) for store in stores]
        paths = await asyncio.gather(*(device.fetch(DIGEST, len(DATA)) for device in devices))
    assert all(path.read_bytes() == DATA for path in paths)
    assert hub.transfers == {DIGEST: 1}
    assert hub.bytes <= len(DATA) + 20
    assert mirror.counts["fetched"] == 1
    registry = Registry()
    watch_mirror(registry, mirror)
    shown = numbers(registry)
    assert shown["mirror.file.fetched"][()] == 1
    assert shown["mirror.file.sent"][()] >= 20 * len(DATA)
    assert shown["mirror.request.rejected"].keys() == {(reason,) for reason in (*REJECTED, "other")}


async def test_a_device_resumes_from_the_edge_where_it_stopped(tmp_path: Path, hub: Hub) -> None:
    async with edge(tmp_path / "edge", hub) as (url, _):
        store = BlobStore(tmp_path / "device")
        store.staging(DIGEST).write_bytes(DATA[:1000])
        assert (await Fetcher([Source(url)], store).fetch(DIGEST, len(DATA))).read_bytes() == DATA


async def test_the_mirror_forgets_the_longest_unused_file_and_fetches_it_again(tmp_path: Path, hub: Hub) -> None:
    others = [bytes([number]) * 600_000 for number in range(3)]
    digests = [f"sha256:{sha256(data).hexdigest()}" for data in others]
    hub.files |= dict(zip(digests, others, strict=True))
    async with edge(tmp_path / "edge", hub, quota=Quota(max_bytes=1_300_000, cache_bytes=1 << 30, free_bytes=0)) as (
        url,
        _,
    ):
        for turn, digest in enumerate([*digests, digests[0]]):
            store = BlobStore(tmp_path / f"device{turn}")
            await Fetcher([Source(url)], store).fetch(digest, 600_000)
            await asyncio.sleep(0.02)  # so that the times of use differ
        assert len(list(BlobStore(tmp_path / "edge").digests())) <= 2
    assert hub.transfers[digests[0]] == 2
