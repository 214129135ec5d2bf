from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge_node import blobs
from edge_node.blobs import MAX_FILE_BYTES, BlobMirror
from edge_node.shares import MirrorSettings
from models.errors import InvalidRequest, MethodNotAllowed, NotFound, Overloaded, TooLarge, Unreachable
from models.serving.caller import Peer
from models.serving.exchange import FileBody, HttpHead, HttpRequest, HttpResponse
from sync.errors import Absent, DigestMismatch, StoreFailed, Unavailable
from sync.store import BlobStore

DIGEST = "sha256:" + "ab" * 32


class Fetcher:
    """One source that has one file of ten bytes, unless it has `error` to offer."""

    def __init__(self, store: BlobStore, error: Exception | None = None, size: int = 10) -> None:
        self.store = store
        self.error = error
        self.bytes = size
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def size(self, digest: str) -> int:
        self.asked.append(digest)
        if self.error:
            raise self.error
        return self.bytes

    async def fetch(self, digest: str, size: int) -> Path:
        if self.gate is not None:
            await self.gate.wait()
        self.store.path(digest).write_bytes(b"x" * size)
        return self.store.path(digest)


def mirror(
    path: Path, error: Exception | None = None, size: int = 10, settings: MirrorSettings | None = None
) -> BlobMirror:
    store = BlobStore(path)
    return BlobMirror(store, Fetcher(store, error, size), None, settings)  # type: ignore[arg-type]


def body_of(answer: HttpResponse) -> tuple[str, int, int]:
    assert isinstance(answer.body, FileBody)
    return answer.body.path.name, answer.body.offset, answer.body.length


NAME = DIGEST.removeprefix("sha256:")


def get(path: str, address: bytes = b"127.0.0.1", **headers: bytes) -> HttpRequest:
    given = {name.encode(): value for name, value in headers.items()}
    return HttpRequest(HttpHead("GET", path, "", given, Peer(address.decode())))


async def test_a_file_is_fetched_once_and_sent_whole(tmp_path: Path) -> None:
    passing = mirror(tmp_path)
    for _ in range(2):
        answer = await passing.blob(get(f"/blobs/{DIGEST}"))
        assert (answer.status, body_of(answer)) == (200, (NAME, 0, 10))
    assert passing._fetcher.asked == [DIGEST]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "body", "shown"),
    [
        (b"bytes=0-", (0, 10), b"bytes 0-9/10"),
        (b"bytes=4-", (4, 6), b"bytes 4-9/10"),
        (b"bytes=4-5", (4, 2), b"bytes 4-5/10"),
        (b"bytes=4-99", (4, 6), b"bytes 4-9/10"),
        (b"bytes=9-9", (9, 1), b"bytes 9-9/10"),
    ],
)
async def test_a_range_is_sent_as_asked(tmp_path: Path, asked: bytes, body: tuple[int, int], shown: bytes) -> None:
    answer = await mirror(tmp_path).blob(get(f"/blobs/{DIGEST}", range=asked))
    assert (answer.status, body_of(answer)) == (206, (NAME, *body))
    assert b"content-range: " + shown in answer.headers


async def test_a_range_behind_the_end_is_416(tmp_path: Path) -> None:
    answer = await mirror(tmp_path).blob(get(f"/blobs/{DIGEST}", range=b"bytes=10-"))
    assert answer.status == 416
    assert b"content-range: bytes */10" in answer.headers


@pytest.mark.parametrize(
    "asked",
    [b"bytes=-5", b"bytes=5-4", b"items=0-1", b"bytes=0-1,3-4", b"bytes=a-b", b"", b"bytes=" + b"9" * 30 + b"-"],
)
async def test_a_range_we_do_not_speak_is_refused_naming_the_header(tmp_path: Path, asked: bytes) -> None:
    with pytest.raises(InvalidRequest, match="Range"):
        await mirror(tmp_path).blob(get(f"/blobs/{DIGEST}", range=asked))


@pytest.mark.parametrize("path", ["/blobs/", "/blobs/../../etc/passwd", "/blobs/sha256:00"])
async def test_what_is_no_digest_does_not_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(NotFound):
        await mirror(tmp_path).blob(get(path))


@pytest.mark.parametrize("error", [Unavailable("hub down"), DigestMismatch("other bytes")])
async def test_a_file_that_cannot_be_had_is_unreachable_not_missing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(Unreachable):
        await mirror(tmp_path, error).blob(get(f"/blobs/{DIGEST}"))


async def test_a_file_nobody_has_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await mirror(tmp_path, Absent("404")).blob(get(f"/blobs/{DIGEST}"))


async def test_a_file_beyond_the_limit_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(TooLarge):
        await mirror(tmp_path, size=MAX_FILE_BYTES + 1).blob(get(f"/blobs/{DIGEST}"))


async def test_a_store_without_room_is_unreachable_not_missing(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no room"):
        await mirror(tmp_path, StoreFailed("no room")).blob(get(f"/blobs/{DIGEST}"))


async def test_a_file_on_its_way_makes_devices_come_back_and_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "ANSWER_SECONDS", 0.01)
    passing = mirror(tmp_path)
    source = passing._fetcher
    source.gate = asyncio.Event()  # type: ignore[attr-defined]
    asked = await asyncio.gather(*(passing.blob(get(f"/blobs/{DIGEST}")) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(error, Overloaded) and error.retry_after > 0 for error in asked)
    assert passing.refusals() == {"coming": 20, "busy": 0}
    source.gate.set()  # type: ignore[attr-defined]
    answers = await asyncio.gather(*(passing.blob(get(f"/blobs/{DIGEST}", b"10.0.0.%d" % n)) for n in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert source.asked == [DIGEST]  # type: ignore[attr-defined]


async def test_what_nobody_has_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    passing = mirror(tmp_path, Absent("404"))
    for _ in range(5):
        with pytest.raises(NotFound):
            await passing.blob(get(f"/blobs/{DIGEST}"))
    assert passing._fetcher.asked == [DIGEST]  # type: ignore[attr-defined]


async def test_asking_for_what_is_not_here_uses_up_the_devices_share(tmp_path: Path) -> None:
    passing = mirror(tmp_path, Absent("404"), settings=MirrorSettings(window_bytes=blobs.MISS_BYTES * 3 - 1000))
    for number in range(3):
        with pytest.raises(NotFound):
            await passing.blob(get(f"/blobs/sha256:{number:064x}"))
    with pytest.raises(Overloaded):
        await passing.blob(get(f"/blobs/sha256:{9:064x}"))


ETAG = f'"{DIGEST}"'.encode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"if-match": ETAG}, 200),
        ({"if-match": b"*"}, 200),
        ({"if-match": b'"other", ' + ETAG}, 200),
        ({"if-match": b'"other"'}, 412),
        ({"if-none-match": ETAG}, 304),
        ({"if-none-match": b'"other"'}, 200),
        ({"range": b"bytes=4-", "if-range": ETAG}, 206),
        ({"range": b"bytes=4-", "if-range": b'"other"'}, 200),
    ],
)
async def test_the_digest_is_the_etag_of_every_condition(
    tmp_path: Path, headers: dict[str, bytes], status: int
) -> None:
    answer = await mirror(tmp_path).blob(get(f"/blobs/{DIGEST}", **headers))
    assert answer.status == status
    if status != 412:
        assert b"etag: " + ETAG in answer.headers


async def test_a_question_about_a_file_takes_no_slot(tmp_path: Path) -> None:
    passing = mirror(tmp_path, settings=MirrorSettings(slots=1))
    held = await passing.blob(get(f"/blobs/{DIGEST}"))
    with pytest.raises(Overloaded):
        await passing.blob(get(f"/blobs/{DIGEST}"))
    request = get(f"/blobs/{DIGEST}")
    request.head.method = "HEAD"
    assert (await passing.blob(request)).status == 200
    request.head.method = "POST"
    with pytest.raises(MethodNotAllowed):
        await passing.blob(request)
    del held
