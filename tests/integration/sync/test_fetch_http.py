"""Files over real sockets from sources that break, lie, drip and redirect."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from http_fake import HttpFake

from sync.download import Download, Limits
from sync.errors import Absent, DigestMismatch, Malformed, StoreFailed, Unavailable
from sync.fetch import Fetcher, Source
from sync.part import taken
from sync.store import BlobStore

DATA = bytes(range(256)) * 4_000
DIGEST = f"sha256:{sha256(DATA).hexdigest()}"
LIMITS = Limits(connect_seconds=1, read_seconds=0.5, budget_seconds=0.5, slowest_rate=10_000_000)


class Server(HttpFake):
    """`behaviour` is the name of a method of the handler below; `requests` are (path, Range) pairs."""

    def __init__(self) -> None:
        self.behaviour = "honest"
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.data = DATA
        self.elsewhere = ""
        self.stopped = threading.Event()
        self.go = threading.Event()
        outer = self

        class Handler(_Handler):
            server_state = outer

        super().__init__(Handler)

    def close(self) -> None:
        self.stopped.set()
        super().close()


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_GET(self) -> None:
        state = self.server_state
        state.requests.append((self.path, self.headers.get("Range")))
        state.headers.append(dict(self.headers))
        try:
            getattr(self, state.behaviour)()
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def honest(self) -> None:
        data, asked = self.server_state.data, self.headers.get("Range")
        if asked is None:
            self.head(200, Content_Length=len(data))
            self.wfile.write(data)
        else:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.head(206, Content_Length=len(data) - start, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.wfile.write(data[start:])

    def cut(self) -> None:
        """Delivers half and closes; honest from the next request on."""
        self.server_state.behaviour = "honest"
        self.head(200, Content_Length=len(DATA))
        self.wfile.write(DATA[: len(DATA) // 2])

    def rangeless(self) -> None:
        self.head(200, Content_Length=len(DATA))
        self.wfile.write(DATA)

    def shifted(self) -> None:
        self.head(206, Content_Length=len(DATA), Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
        self.wfile.write(DATA)

    def unsatisfiable(self) -> None:
        if self.headers.get("Range") is not None:
            self.head(416, Content_Length=0)
        else:
            self.honest()

    def longer(self) -> None:
        self.head(200, Content_Length=len(DATA) + 1)
        self.wfile.write(DATA + b"x")

    def endless(self) -> None:
        self.head(200)
        while not self.server_state.stopped.is_set():
            self.wfile.write(b"x" * 65536)

    def drip(self) -> None:
        self.head(200, Content_Length=len(DATA))
        for byte in DATA:
            if self.server_state.stopped.wait(0.05):
                return
            self.wfile.write(bytes([byte]))

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server_state.stopped.wait(0.05):
            self.wfile.write(b"a")

    def paused(self) -> None:
        """Half, then nothing until `go`, then zeros."""
        self.head(200, Content_Length=len(DATA))
        self.wfile.write(DATA[: len(DATA) // 2])
        self.server_state.go.wait(5)
        self.wfile.write(b"\0" * (len(DATA) - len(DATA) // 2))

    def silent(self) -> None:
        self.head(200, Content_Length=len(DATA))
        self.server_state.stopped.wait(10)

    def wrong(self) -> None:
        self.head(200, Content_Length=len(DATA))
        self.wfile.write(b"\0" * len(DATA))

    def redirect(self) -> None:
        self.head(302, Location=self.server_state.elsewhere, Content_Length=0)

    def missing(self) -> None:
        self.head(404, Content_Length=0)

    def busy(self) -> None:
        """Asks to come back; honest from the third request on."""
        if len(self.server_state.requests) >= 3:
            self.server_state.behaviour = "honest"
        self.head(429 if len(self.server_state.requests) == 1 else 503, Retry_After=2, Content_Length=0)

    def always_busy(self) -> None:
        self.head(429, Retry_After=10**8, Content_Length=0)

    def garbage(self) -> None:
        self.wfile.write(b"\0\1\2 this is not HTTP\r\n\r\n")


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started = [Server(), Server()]
    yield started
    for server in started:
        server.close()


class Quick:
    """The real clock, without the pauses between rounds."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def fetcher(store: BlobStore, *servers: Server, limits: Limits = LIMITS) -> Fetcher:
    return Fetcher([Source(server.url, "secret") for server in servers], store, clock=Quick(), limits=limits)


async def test_a_file_arrives_whole_with_the_credential_shown(store: BlobStore, servers: list[Server]) -> None:
    path = await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))
    assert path.read_bytes() == DATA
    assert servers[0].requests == [(f"/blobs/{DIGEST}", None)]
    assert servers[0].headers[0]["Authorization"] == "Bearer secret"


async def test_a_broken_transfer_is_resumed_where_it_broke(store: BlobStore, servers: list[Server]) -> None:
    servers[0].behaviour = "cut"
    fetching = fetcher(store, servers[0])
    await fetching.fetch(DIGEST, len(DATA))
    assert servers[0].requests[1][1] == f"bytes={len(DATA) // 2}-"
    assert store.path(DIGEST).read_bytes() == DATA
    counts = fetching.traffic
    assert counts.received() == {"whole": len(DATA) // 2, "resumed": len(DATA) // 2}
    assert (counts.files, counts.attempts, counts.failures) == ({"resumed": 1}, {"unavailable": 1}, {})


async def test_a_part_left_by_an_earlier_process_is_continued(store: BlobStore, servers: list[Server]) -> None:
    store.staging(DIGEST).write_bytes(DATA[:1000])
    await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))
    assert servers[0].requests == [(f"/blobs/{DIGEST}", "bytes=1000-")]
    assert store.path(DIGEST).read_bytes() == DATA


@pytest.mark.parametrize("part", [DATA[:1000], b"\0" * 1000, DATA, b"\0" * len(DATA), DATA + b"more", b""])
@pytest.mark.parametrize("behaviour", ["honest", "rangeless", "unsatisfiable"])
async def test_whatever_was_left_behind_the_right_file_comes_out(
    store: BlobStore, servers: list[Server], behaviour: str, part: bytes
) -> None:
    servers[0].behaviour = behaviour
    store.staging(DIGEST).write_bytes(part)
    await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))
    assert store.path(DIGEST).read_bytes() == DATA


@pytest.mark.parametrize("behaviour", ["wrong", "longer", "endless"])
async def test_other_bytes_are_a_mismatch_and_nothing_of_them_stays(
    store: BlobStore, servers: list[Server], behaviour: str
) -> None:
    servers[0].behaviour = behaviour
    with pytest.raises(DigestMismatch):
        await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))
    assert not store.has(DIGEST)
    assert not store.staging(DIGEST).exists()
    assert len(servers[0].requests) == 1


@pytest.mark.parametrize("behaviour", ["drip", "drip_headers", "silent", "redirect", "missing", "garbage"])
async def test_a_source_that_does_not_deliver_is_unavailable_within_the_budget(
    store: BlobStore, servers: list[Server], behaviour: str
) -> None:
    servers[0].behaviour, servers[0].elsewhere = behaviour, servers[1].url
    began = time.monotonic()
    with pytest.raises(Unavailable):
        await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))
    assert time.monotonic() - began < 6
    assert servers[1].requests == []
    assert not store.has(DIGEST)


@pytest.mark.parametrize("behaviour", ["wrong", "missing", "cut", "garbage", "shifted"])
async def test_the_next_source_is_asked_when_the_nearest_fails(
    store: BlobStore, servers: list[Server], behaviour: str
) -> None:
    servers[0].behaviour = behaviour
    await fetcher(store, *servers).fetch(DIGEST, len(DATA))
    assert store.path(DIGEST).read_bytes() == DATA


async def test_concurrent_calls_share_one_transfer(store: BlobStore, servers: list[Server]) -> None:
    both = fetcher(store, servers[0])
    await asyncio.gather(*(both.fetch(DIGEST, len(DATA)) for _ in range(5)))
    assert len(servers[0].requests) == 1


@pytest.mark.parametrize("behaviour", ["silent", "drip_headers"])
async def test_cancelling_stops_the_transfer_at_once(store: BlobStore, servers: list[Server], behaviour: str) -> None:
    servers[0].behaviour = behaviour
    one = fetcher(store, servers[0], limits=Limits())
    task = asyncio.create_task(one.fetch(DIGEST, len(DATA)))
    while not servers[0].requests:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    servers[0].behaviour = "honest"
    await one.fetch(DIGEST, len(DATA))
    assert time.monotonic() - began < 1


async def test_an_update_uses_no_more_of_the_network_than_it_may(store: BlobStore, servers: list[Server]) -> None:
    limits = Limits(fastest_rate=4_000_000)
    began = time.monotonic()
    await fetcher(store, servers[0], limits=limits).fetch(DIGEST, len(DATA))
    assert time.monotonic() - began >= len(DATA) / 4_000_000 * 0.9


async def test_a_disk_that_refuses_is_not_blamed_on_the_source(store: BlobStore, servers: list[Server]) -> None:
    store.staging(DIGEST).mkdir()
    with pytest.raises(StoreFailed):
        await fetcher(store, servers[0]).fetch(DIGEST, len(DATA))


async def test_a_small_file_comes_from_the_source_asked_and_what_it_lacks_is_told(
    store: BlobStore, servers: list[Server]
) -> None:
    servers[0].data, servers[1].data = b"old", b"new"
    both = fetcher(store, *servers)
    first, second = both.sources
    assert await both.get(first, "/tuf/timestamp.json", 100) == b"old"
    assert await both.get(second, "/tuf/timestamp.json", 100) == b"new"
    with pytest.raises(Malformed):
        await both.get(first, "/tuf/timestamp.json", 2)
    servers[0].behaviour = "missing"
    with pytest.raises(Absent):
        await both.get(first, "/tuf/timestamp.json", 100)
    servers[1].behaviour = "silent"
    with pytest.raises(Unavailable):
        await both.get(second, "/tuf/timestamp.json", 100)


async def test_a_document_without_end_is_cut_off(store: BlobStore, servers: list[Server]) -> None:
    servers[0].behaviour = "endless"
    with pytest.raises(Malformed):
        await asyncio.to_thread(Download(servers[0].url, None, LIMITS).read, 100_000)


async def test_a_call_that_comes_while_others_wait_waits_too(store: BlobStore, servers: list[Server]) -> None:
    servers[0].behaviour = "silent"
    one = fetcher(store, servers[0], limits=Limits())
    first, second = (asyncio.create_task(one.fetch(DIGEST, len(DATA))) for _ in range(2))
    await until(lambda: len(servers[0].requests) == 1)
    first.cancel()
    await asyncio.wait({first})
    await until(lambda: len(servers[0].requests) == 2)
    third = asyncio.create_task(one.fetch(DIGEST, len(DATA)))
    await asyncio.sleep(0.2)
    assert len(servers[0].requests) == 2
    for task in (second, third):
        task.cancel()
        await asyncio.wait({task})


async def test_a_transfer_that_was_given_up_on_cannot_write_into_what_another_publishes(
    store: BlobStore, servers: list[Server]
) -> None:
    servers[0].behaviour = "paused"
    given_up = fetcher(store, servers[0], limits=Limits())
    task = asyncio.create_task(given_up.fetch(DIGEST, len(DATA)))
    await until(lambda: store.staging(DIGEST).exists() and store.staging(DIGEST).stat().st_size == len(DATA) // 2)
    with pytest.raises(Unavailable, match="another transfer"):
        await fetcher(store, servers[1]).fetch(DIGEST, len(DATA))
    assert store.staging(DIGEST).stat().st_size == len(DATA) // 2
    task.cancel()
    await asyncio.wait({task})
    await fetcher(store, servers[1]).fetch(DIGEST, len(DATA))
    servers[0].go.set()
    assert store.path(DIGEST).read_bytes() == DATA


async def test_a_file_that_was_published_meanwhile_is_not_opened_for_writing(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, flock = store.staging(DIGEST), fcntl.flock
    staged.write_bytes(DATA)

    def late(file: Any, operation: int) -> None:
        if not store.has(DIGEST):
            store.publish(DIGEST, staged)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with taken(staged) as part:
        part.restart()
        part.write(b"other")
    assert store.path(DIGEST).read_bytes() == DATA


def test_a_process_ends_while_a_source_drips(servers: list[Server], tmp_path: Path) -> None:
    servers[0].behaviour = "drip_headers"
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from sync.fetch import Fetcher, Source\n"
        "from sync.store import BlobStore\n"
        "async def main():\n"
        "    one = Fetcher([Source(sys.argv[1])], BlobStore(Path(sys.argv[2])))\n"
        "    task = asyncio.create_task(one.fetch('sha256:' + 'a' * 64, 10))\n"
        "    await asyncio.sleep(0.3)\n"
        "    task.cancel()\n"
        "    await asyncio.wait({task})\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", program, servers[0].url, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run(command, env=environment, timeout=5, check=False).returncode == 0


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not ready():
            await asyncio.sleep(0.01)


class Counting(Quick):
    """Remembers every pause."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def test_a_near_source_that_is_busy_is_waited_for_as_long_as_it_says(
    store: BlobStore, servers: list[Server]
) -> None:
    servers[0].behaviour, clock = "busy", Counting()
    sources = [Source(server.url) for server in servers]
    await Fetcher(sources, store, clock=clock, limits=LIMITS).fetch(DIGEST, len(DATA))
    assert (len(servers[0].requests), servers[1].requests) == (4, [])
    assert len(clock.pauses) == 3
    assert all(2.0 <= pause <= 3.0 for pause in clock.pauses)
    assert len(set(clock.pauses)) == 3  # jittered


async def test_a_source_that_is_busy_for_ever_is_passed_over(store: BlobStore, servers: list[Server]) -> None:
    servers[0].behaviour, clock = "always_busy", Counting()
    sources = [Source(server.url) for server in servers]
    await Fetcher(sources, store, clock=clock, limits=LIMITS).fetch(DIGEST, len(DATA))
    assert len(servers[1].requests) == 1
    assert sum(clock.pauses) < 300


async def test_a_store_without_room_starts_no_transfer(store: BlobStore, servers: list[Server]) -> None:
    at_all = fetcher(store, servers[0])

    def full(digest: str, size: int) -> Any:
        raise StoreFailed("no room")

    at_all.room_for = full
    with pytest.raises(StoreFailed, match="no room"):
        await at_all.fetch(DIGEST, len(DATA))
    assert servers[0].requests == []


async def test_a_folder_is_a_source_like_any_other_and_trusted_no_more(
    store: BlobStore, servers: list[Server], tmp_path: Path
) -> None:
    folder = tmp_path / "medium"
    (folder / "blobs").mkdir(parents=True)
    blob = folder / "blobs" / DIGEST.removeprefix("sha256:")
    both = fetcher(store, servers[0])
    both.add(Source(f"file://{folder}"))
    blob.write_bytes(b"\0" * len(DATA))
    await both.fetch(DIGEST, len(DATA))
    assert len(servers[0].requests) == 1  # the folder lied
    store.path(DIGEST).unlink()
    blob.write_bytes(DATA)
    await both.fetch(DIGEST, len(DATA))
    assert len(servers[0].requests) == 1
    blob.unlink()
    blob.symlink_to("/etc/hostname")
    alone = Fetcher([Source(f"file://{folder}")], store, clock=Quick())
    store.path(DIGEST).unlink()
    with pytest.raises(Unavailable):
        await alone.fetch(DIGEST, len(DATA))
    for path in ("/blobs/../x", "/tuf/../../etc/passwd", "/etc/passwd"):
        with pytest.raises(Absent):
            await alone.get(Source(f"file://{folder}"), path, 100)
