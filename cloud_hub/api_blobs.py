"""Files: uploaded by the admin, read by digest and range by the nodes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from cloud_hub.api_context import OpenHub, Sender
from cloud_hub.api_types import BlobStored, ErrorBody
from cloud_hub.auth import Role
from cloud_hub.blobs import MAX_BLOB_BYTES
from cloud_hub.deltas import RETRY_SECONDS, Pending
from cloud_hub.gate import next_piece
from cloud_hub.shares import SharedFile
from models.errors import InvalidRequest, NotFound, TooLarge

router = APIRouter(tags=["files"])

_RANGE = re.compile(r"bytes=([0-9]{0,20})-([0-9]{0,20})")


@router.put("/api/v1/blobs/{digest}", response_model=BlobStored, responses={201: {"model": BlobStored}})
async def put_blob(digest: str, request: Request, response: Response, hub: OpenHub) -> BlobStored:
    """Upload a file. 201 when it is new, 200 when it was here; the bytes must have the digest."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BLOB_BYTES:
        raise TooLarge(f"the file has more than {MAX_BLOB_BYTES} bytes")
    size, created = await hub.blobs.put(digest, _body(request))
    response.status_code = 201 if created else 200
    return BlobStored(digest=digest, size=size)


async def _body(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        event = await next_piece(request.receive)
        if event["type"] == "http.disconnect":
            raise InvalidRequest("the upload was cut off")
        if event.get("body"):
            yield event["body"]
        more = event.get("more_body", False)


@router.head("/api/v1/blobs/{digest}", response_class=Response)
async def head_blob(digest: str, hub: OpenHub) -> Response:
    """Whether a file is here, and its size."""
    size = await hub.blobs.size(digest)
    if size is None:
        return Response(status_code=404)
    return Response(headers={"content-length": str(size), "etag": f'"{digest}"'})


@router.get(
    "/blobs/{digest}",
    response_class=StreamingResponse,
    responses={206: {"description": "the range asked for"}, 416: {"model": ErrorBody}, 429: {"model": ErrorBody}},
)
async def get_blob(
    digest: str,
    hub: OpenHub,
    who: Sender,
    range_: Annotated[str | None, Header(alias="range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A file, or one range of it (RFC 9110, section 14). A digest's content never changes, so the digest is the ETag.

    429 with Retry-After while as many are sent as may be, to this node or in all.
    """
    blobs = hub.blobs
    size = await blobs.size(digest)
    if size is None:
        blobs = hub.deltas.blobs
        size = await blobs.size(digest)
    if size is None:
        raise NotFound(f"no blob {digest}")
    etag = f'"{digest}"'
    headers = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, max-age=31536000, immutable"}
    if if_none_match == etag:
        return Response(status_code=304, headers=headers)
    asked = parse_range(range_, size) if if_range in (None, etag) else None
    start, end = asked or (0, size)
    if start >= end:
        return Response(
            b'{"error":"the range starts past the end of the file"}',
            416,
            {"content-range": f"bytes */{size}"},
            "application/json",
        )
    if asked is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    status = 200 if asked is None else 206
    return SharedFile(hub.shares, who, end - start, blobs.read(digest, start, end), status, headers)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of `bytes=a-b`, `bytes=a-` or `bytes=-n`; start >= end = not satisfiable.

    None for no header, and for any other form, which RFC 9110 lets a server ignore.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        return max(size - int(last), 0) if int(last) else size, size
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


@router.get(
    "/deltas/{digest}",
    response_class=Response,
    responses={429: {"model": ErrorBody}, 503: {"description": "it is being made"}},
)
async def get_delta(
    digest: str, hub: OpenHub, who: Sender, from_: Annotated[str, Query(alias="from", max_length=2_000)]
) -> Response:
    """Which delta makes this file from one of `from`, digests with commas between: {base, delta, size}. 404: none does.

    The delta itself is the blob `delta`. 429 while others that this node asked for are being made.
    """
    asker = None if who.role is Role.ADMIN else who.name
    try:
        offer = await hub.deltas.offer(digest, from_.split(","), asker)
    except Pending as error:
        body = msgspec.json.encode({"error": str(error)})
        return Response(body, 503, {"retry-after": str(RETRY_SECONDS)}, "application/json")
    if offer is None:
        raise NotFound("no delta is worth it")
    return Response(msgspec.json.encode(offer), media_type="application/json")


@router.get("/tuf/{name}", response_class=Response)
async def get_metadata(name: str, hub: OpenHub) -> Response:
    """A file of the update repository's signed metadata, e.g. `timestamp.json`, `1.root.json` or `3.bin-0f.json`."""
    data = await asyncio.to_thread(hub.approvals.repository.read, name)
    if data is None:
        raise NotFound(f"no metadata {name[:100]}")
    caching = "no-cache" if name == "timestamp.json" else "private, max-age=31536000, immutable"
    return Response(data, media_type="application/json", headers={"cache-control": caching})
