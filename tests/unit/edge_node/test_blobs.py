from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from edge_node.blobs import BlobMirror
from models.errors import InvalidRequest, NotFound, Unreachable
from models.serving.exchange import FileBody, HttpHead, HttpRequest
from sync.errors import DigestMismatch, NotListed, Unavailable

DIGEST = "sha256:" + "ab" * 32


class Packages:
    """A catalogue of one file."""

    def __init__(self, envelope: bytes | None = b"signed") -> None:
        self.signed = envelope

    async def require(self, digests: Collection[str]) -> Mapping[str, int]:
        if list(digests) != [DIGEST]:
            raise NotListed("not in the catalogue")
        return {DIGEST: 10}

    async def current(self) -> bytes:
        if self.signed is None:
            raise Unavailable("no source answered")
        return self.signed


class Fetcher:
    def __init__(self, path: Path, error: Exception | None = None) -> None:
        self.path = path
        self.error = error

    async def fetch(self, digest: str, size: int) -> Path:
        if self.error:
            raise self.error
        return self.path


def mirror(path: Path, error: Exception | None = None, envelope: bytes | None = b"signed") -> BlobMirror:
    return BlobMirror(Packages(envelope), Fetcher(path, error))  # type: ignore[arg-type]


def get(path: str, **headers: bytes) -> HttpRequest:
    return HttpRequest(HttpHead("GET", path, "", {name.encode(): value for name, value in headers.items()}))


async def test_a_listed_file_is_sent_whole(tmp_path: Path) -> None:
    answer = await mirror(tmp_path).blob(get(f"/blobs/{DIGEST}"))
    assert (answer.status, answer.body) == (200, FileBody(tmp_path, 0, 10))


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
    assert (answer.status, answer.body) == (206, FileBody(tmp_path, *body))
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
async def test_what_is_not_approved_does_not_exist(tmp_path: Path, path: str) -> None:
    with pytest.raises(NotFound):
        await mirror(tmp_path).blob(get(path))


@pytest.mark.parametrize("error", [Unavailable("hub down"), DigestMismatch("other bytes")])
async def test_a_file_that_cannot_be_had_is_unreachable_not_missing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(Unreachable):
        await mirror(tmp_path, error).blob(get(f"/blobs/{DIGEST}"))


async def test_the_catalogue_is_passed_on_as_it_was_signed(tmp_path: Path) -> None:
    assert (await mirror(tmp_path).catalog(get("/catalog"))).body == b"signed"
    with pytest.raises(Unreachable):
        await mirror(tmp_path, envelope=None).catalog(get("/catalog"))
