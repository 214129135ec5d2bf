"""What stands under a digest has that digest, and any part of it can be read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hub_in_memory import Bench, digest

from cloud_hub.api_blobs import parse_range
from cloud_hub.blobs import Blobs
from models.errors import InvalidRequest, NotFound, TooLarge

CONTENT = bytes(range(256)) * 2000
NAME = digest(CONTENT)


async def pieces(content: bytes, size: int = 65_536, fails: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]
    if fails:
        raise InvalidRequest("the upload was cut off")


async def test_a_file_is_stored_once_and_read_in_any_part(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    assert await blobs.put(NAME, pieces(CONTENT)) == (len(CONTENT), True)
    assert await blobs.put(NAME, pieces(CONTENT)) == (len(CONTENT), False)
    for start, end in ((0, len(CONTENT)), (0, 1), (1000, 300_000), (len(CONTENT) - 1, len(CONTENT))):
        assert b"".join([chunk async for chunk in blobs.read(NAME, start, end)]) == CONTENT[start:end]


@pytest.mark.parametrize(
    ("name", "content", "fails", "limit", "error"),
    [
        (digest(b"other"), CONTENT, False, 1 << 30, InvalidRequest),
        (NAME, CONTENT + b"x", False, 1 << 30, InvalidRequest),
        (NAME, CONTENT, False, len(CONTENT) - 1, TooLarge),
        (NAME, CONTENT[:100_000], True, 1 << 30, InvalidRequest),
        (digest(b""), b"", False, 1 << 30, InvalidRequest),
        ("sha256:../../../etc/passwd", CONTENT, False, 1 << 30, InvalidRequest),
        (NAME.upper(), CONTENT, False, 1 << 30, InvalidRequest),
    ],
)
async def test_a_refused_file_leaves_nothing_behind(
    tmp_path: Path, name: str, content: bytes, fails: bool, limit: int, error: type[Exception]
) -> None:
    blobs = Blobs(tmp_path / "blobs")
    with pytest.raises(error):
        await blobs.put(name, pieces(content, fails=fails), limit=limit)
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


async def test_a_refused_upload_harms_no_file_that_is_here(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    await blobs.put(NAME, pieces(CONTENT))
    with pytest.raises(InvalidRequest):
        await blobs.put(NAME, pieces(b"tampered"))
    assert b"".join([chunk async for chunk in blobs.read(NAME, 0, len(CONTENT))]) == CONTENT


async def test_what_an_interrupted_upload_left_is_swept_at_the_start(tmp_path: Path) -> None:
    Blobs(tmp_path / "blobs")
    (tmp_path / "blobs" / "staging" / "half").write_bytes(b"half")
    assert await Blobs(tmp_path / "blobs").size(NAME) is None
    assert not (tmp_path / "blobs" / "staging" / "half").exists()


async def test_a_file_that_is_not_here_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        [chunk async for chunk in Blobs(tmp_path / "blobs").read(NAME, 0, 1)]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-99", (0, 100)),
        ("bytes=10-", (10, 1000)),
        ("bytes=990-5000", (990, 1000)),
        ("bytes=-10", (990, 1000)),
        ("bytes=-5000", (0, 1000)),
        ("bytes=1000-", (1000, 1000)),
        ("bytes=-0", (1000, 1000)),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=0-1,3-4", None),
        ("items=0-1", None),
        ("bytes=\u0661-2", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_ranges_are_read_as_the_http_standard_says(header: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 1000) == expected


@pytest.mark.parametrize(
    ("headers", "status", "content"),
    [
        ({}, 200, CONTENT),
        ({"range": "bytes=100-199"}, 206, CONTENT[100:200]),
        ({"range": "bytes=500000-"}, 206, CONTENT[500000:]),
        ({"range": "bytes=512000-"}, 416, None),
        ({"range": "bytes=0-1", "if-range": f'"{NAME}"'}, 206, CONTENT[:2]),
        ({"range": "bytes=0-1", "if-range": '"other"'}, 200, CONTENT),
        ({"if-none-match": f'"{NAME}"'}, 304, b""),
    ],
)
async def test_files_are_served_whole_by_range_or_not_again(
    bench: Bench, headers: dict[str, str], status: int, content: bytes | None
) -> None:
    await bench.call("PUT", f"/api/v1/blobs/{NAME}", 201, content=CONTENT)
    await bench.call("PUT", f"/api/v1/blobs/{NAME}", 200, content=CONTENT)
    answer = await bench.client.get(f"/blobs/{NAME}", headers=headers)
    assert answer.status_code == status
    if content is not None:
        assert answer.content == content
        assert answer.headers["etag"] == f'"{NAME}"'
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"
    if status == 206:
        assert answer.headers["content-range"].endswith(f"/{len(CONTENT)}")


async def test_the_head_of_a_file_tells_whether_it_is_here(bench: Bench) -> None:
    assert (await bench.client.head(f"/api/v1/blobs/{NAME}")).status_code == 404
    await bench.call("PUT", f"/api/v1/blobs/{NAME}", 201, content=CONTENT)
    answer = await bench.client.head(f"/api/v1/blobs/{NAME}")
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(CONTENT)))
