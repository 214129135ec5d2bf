"""Deltas end to end: asked for, made by the hub, fetched like any file, applied, and given up whenever anything is wrong."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from http_fake import HttpFake
from hub_in_memory import Bench, hub_bench, make_manifest

from edge_node.blobs import BlobMirror
from models.delta import literals, segments
from models.errors import TierlineError
from models.manifest import encode_manifest
from models.serving.exchange import HttpRequest, HttpResponse, error_response
from models.serving.http.server import serve_http
from sync.delta import FORMAT, Offer, Recipe, apply, write
from sync.fetch import Fetcher, Source
from sync.store import BlobStore
from sync.testing import FakeClock

OLD = Random(1).randbytes(400_000)
NEW = OLD[:100_000] + Random(2).randbytes(10_000) + OLD[110_000:]


def digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def delta_between(old: bytes, new: bytes) -> bytes:
    parts = segments(memoryview(old), memoryview(new))
    out = io.BytesIO()
    write(out, Recipe(FORMAT, digest(old), len(old), digest(new), len(new), parts), literals(memoryview(new), parts))
    return out.getvalue()


class Upstream(HttpFake):
    """A hub that may lie. `offer`: what it answers about deltas, None = 404, an int = that status with Retry-After."""

    def __init__(self) -> None:
        delta = delta_between(OLD, NEW)
        self.files = {digest(data): data for data in (NEW, delta)}
        self.offer: dict[str, Any] | int | bytes | None = {
            "base": digest(OLD),
            "delta": digest(delta),
            "size": len(delta),
        }
        self.asked: list[str] = []
        self.sent = 0
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                upstream.asked.append(self.path)
                parts = urlsplit(self.path)
                if parts.path.startswith("/deltas/"):
                    self.answer_offer(parse_qs(parts.query)["from"][0].split(","))
                else:
                    data = upstream.files.get(parts.path.removeprefix("/blobs/"))
                    if data is not None and self.headers.get("Range") == "bytes=0-0":
                        return self.reply(206, data[:1], **{"Content-Range": f"bytes 0-0/{len(data)}"})
                    self.reply(200 if data is not None else 404, data or b"")
                    upstream.sent += len(data or b"")
                return None

            def answer_offer(self, bases: list[str]) -> None:
                offer = upstream.offer
                if isinstance(offer, int):
                    self.reply(offer, b"", **{"Retry-After": "1"})
                elif offer is None:
                    self.reply(404, b"")
                else:
                    self.reply(200, offer if isinstance(offer, bytes) else json.dumps(offer).encode())

            def reply(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Silent."""

        super().__init__(Handler)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    started = Upstream()
    yield started
    started.close()


class Quick(FakeClock):
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def node(folder: Path, url: str) -> tuple[Fetcher, BlobStore]:
    """A node that has the old file."""
    store = BlobStore(folder)
    store.staging(digest(OLD)).write_bytes(OLD)
    store.publish(digest(OLD), store.staging(digest(OLD)))
    return Fetcher([Source(url)], store, clock=Quick()), store


async def test_a_new_version_costs_the_bytes_that_changed(tmp_path: Path, upstream: Upstream) -> None:
    fetcher, store = node(tmp_path, upstream.url)
    assert (await fetcher.fetch(digest(NEW), len(NEW))).read_bytes() == NEW
    assert upstream.sent < 0.2 * len(NEW)
    assert fetcher.traffic.files["delta"] == 1
    assert fetcher.traffic.saved == len(NEW) - upstream.sent
    assert fetcher.traffic.received()["delta"] == upstream.sent
    assert not store.staging(digest(NEW)).exists()


def lie(upstream: Upstream, kind: str) -> None:
    offer: Any = upstream.offer
    honest = upstream.files[offer["delta"]]
    if kind == "tampered":
        upstream.files[offer["delta"]] = honest[:-20] + b"x" + honest[-19:]
    elif kind == "of other bytes":
        data = delta_between(OLD, NEW[:-5] + b"wrong")
        upstream.files[digest(data)] = data
        upstream.offer = {**offer, "delta": digest(data), "size": len(data)}
    elif kind == "garbage":
        upstream.files[digest(b"x" * 500)] = b"x" * 500
        upstream.offer = {**offer, "delta": digest(b"x" * 500), "size": 500}
    elif kind == "of a file not here":
        upstream.offer = {**offer, "base": digest(b"elsewhere")}
    elif kind == "with a path for a digest":
        upstream.offer = {**offer, "delta": "sha256:../../etc/passwd"}
    elif kind == "larger than the file":
        upstream.offer = {**offer, "size": 10 * len(NEW)}
    elif kind == "vanished":
        del upstream.files[offer["delta"]]
    else:
        upstream.offer = {"none": None, "always busy": 503, "broken": 500, "no JSON": b"\xff[", "long": b" " * 5_000}[
            kind
        ]


LIES = [
    "tampered",
    "of other bytes",
    "garbage",
    "of a file not here",
    "with a path for a digest",
    "larger than the file",
]
LIES += ["vanished", "none", "always busy", "broken", "no JSON", "long"]


@pytest.mark.parametrize("kind", LIES)
async def test_without_a_good_delta_the_whole_file_is_fetched(tmp_path: Path, upstream: Upstream, kind: str) -> None:
    lie(upstream, kind)
    fetcher, _ = node(tmp_path, upstream.url)
    assert (await fetcher.fetch(digest(NEW), len(NEW))).read_bytes() == NEW
    assert fetcher.traffic.files["delta"] == 0
    assert fetcher.traffic.files["whole"] == 1


async def test_a_download_that_is_nearly_done_is_finished_instead(tmp_path: Path, upstream: Upstream) -> None:
    fetcher, store = node(tmp_path, upstream.url)
    store.staging(digest(NEW)).write_bytes(NEW[:-100])
    await fetcher.fetch(digest(NEW), len(NEW))
    assert fetcher.traffic.files["delta"] == 0


async def test_a_device_gets_its_delta_through_the_edge(tmp_path: Path, upstream: Upstream) -> None:
    edge_store = BlobStore(tmp_path / "edge")
    mirror = BlobMirror(edge_store, Fetcher([Source(upstream.url)], edge_store), None)  # type: ignore[arg-type]

    async def answer(request: HttpRequest) -> HttpResponse:
        try:
            return await (mirror.delta if request.path.startswith("/deltas") else mirror.blob)(request)
        except TierlineError as error:
            return error_response(error)

    async with mirror, serve_http(answer) as server:
        fetcher, _ = node(tmp_path / "device", server.url)
        await fetcher.fetch(digest(NEW), len(NEW))
    assert fetcher.traffic.files["delta"] == 1
    assert upstream.sent < 0.2 * len(NEW)


# --- the hub's side -------------------------------------------------------------------------------------------------


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with hub_bench(tmp_path / "hub") as running:
        for version, model in (("1", OLD), ("2", NEW)):
            golden = b"golden " + version.encode()
            for content in (golden, model):
                await running.client.put(f"/api/v1/blobs/{digest(content)}", content=content)
            manifest = make_manifest("digits-cnn", version, golden, model)
            await running.call("POST", "/api/v1/packages", 201, content=encode_manifest(manifest))
        yield running


async def offered(bench: Bench, wanted: str, *bases: str) -> tuple[int, Any]:
    """The answer once nothing is pending any more."""
    async with asyncio.timeout(60):
        while True:
            answer = await bench.client.get(f"/deltas/{wanted}", params={"from": ",".join(bases)})
            if answer.status_code != 503:
                return answer.status_code, answer.json()
            assert answer.headers["retry-after"] == "2"
            await asyncio.sleep(0.05)


async def test_the_hub_makes_a_delta_once_and_serves_it_as_a_file(bench: Bench, tmp_path: Path) -> None:
    status, answer = await offered(bench, digest(NEW), digest(b"unknown"), digest(OLD))
    assert status == 200
    offer = Offer(**answer)
    blob = await bench.client.get(f"/blobs/{offer.delta}", headers={"range": "bytes=0-"})
    assert (blob.status_code, len(blob.content)) == (206, offer.size)
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "delta").write_bytes(blob.content)
    out = tmp_path / "new"
    apply(tmp_path / "old", tmp_path / "delta", out, base_digest=offer.base, digest=digest(NEW), size=len(NEW))
    assert out.read_bytes() == NEW
    assert await bench.client.get(f"/deltas/{digest(NEW)}", params={"from": digest(OLD)}) is not None
    assert len(list((bench.hub.data / "deltas" / "sha256").iterdir())) == 1


async def test_the_hub_makes_nothing_of_files_it_does_not_approve_or_that_are_not_worth_it(bench: Bench) -> None:
    other = Random(9).randbytes(300_000)
    await bench.client.put(f"/api/v1/blobs/{digest(other)}", content=other)
    assert (await offered(bench, digest(other), digest(OLD)))[0] == 404
    assert (await offered(bench, digest(NEW), digest(other)))[0] == 404
    assert (await offered(bench, digest(NEW), digest(b"golden 1")))[0] == 404
    assert (await offered(bench, digest(NEW), digest(NEW)))[0] == 404
    golden = b"golden 3"
    await bench.client.put(f"/api/v1/blobs/{digest(golden)}", content=golden)
    manifest = make_manifest("digits-cnn", "3", golden, other)
    await bench.call("POST", "/api/v1/packages", 201, content=encode_manifest(manifest))
    for _ in range(2):  # looked at, then remembered
        assert (await offered(bench, digest(other), digest(OLD)))[0] == 404
    assert list((bench.hub.data / "deltas" / "sha256").iterdir()) == []


@pytest.mark.parametrize("bases", ["x", "sha256:../../x", ",".join(["sha256:" + "0" * 64] * 17)])
async def test_a_question_that_makes_no_sense_is_refused_naming_why(bench: Bench, bases: str) -> None:
    answer = await bench.client.get(f"/deltas/{digest(NEW)}", params={"from": bases})
    assert answer.status_code == 400
    assert "digest" in answer.json()["error"] or "from" in answer.json()["error"]
