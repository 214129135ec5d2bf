"""Bundles: updates as one file, for nodes that no network reaches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from cloud_hub.api_context import OpenHub
from cloud_hub.bundles import Contents, contents
from cloud_hub.hub import Hub
from sync.bundle import END, heading, padding, small_members

router = APIRouter(prefix="/api/v1", tags=["files"])


@router.get("/bundle", response_class=StreamingResponse)
async def get_bundle(
    hub: OpenHub,
    node: Annotated[list[str], Query()] = [],  # noqa: B006 - FastAPI copies it
    package: Annotated[list[str], Query()] = [],  # noqa: B006
) -> StreamingResponse:
    """A bundle of the documents of nodes, with their files, and of packages (`name/version`)."""

    def read() -> Contents:
        with hub.storage.read() as records:
            repository = hub.approvals.repository
            return contents(records, repository.read, hub.clock.wall(), nodes=node, packages=package)

    found = await asyncio.to_thread(read)
    headers = {"content-disposition": 'attachment; filename="updates.tar"'}
    return StreamingResponse(_stream(hub, found), 200, headers, "application/x-tar")


async def _stream(hub: Hub, found: Contents) -> AsyncIterator[bytes]:
    for member in small_members(found.index, found.metadata, found.documents):
        yield member
    for digest, size in found.index.files.items():
        yield heading(f"blobs/{digest.removeprefix('sha256:')}", size)
        async for chunk in hub.blobs.read(digest, 0, size):
            yield chunk
        yield padding(size)
    yield END
