"""A mirror of approved files for the devices behind this node: what it lacks it fetches from the hub, checks and keeps.

Devices need not trust it: they check the signed catalogue and every digest themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from models.errors import InvalidRequest, NotFound, Unreachable
from models.serving.exchange import JSON, FileBody, Handler, HttpRequest, HttpResponse, error_body, header_lines
from sync.errors import Malformed, NotListed, SyncError
from sync.fetch import Fetcher
from sync.packages import Packages

_FILE = header_lines((("content-type", "application/octet-stream"), ("accept-ranges", "bytes")))
_RANGE = re.compile(rb"bytes=(\d{1,19})-(\d{0,19})")


class BlobMirror:
    """HTTP handlers for `/blobs/{digest}` (with Range) and `/catalog`."""

    def __init__(self, packages: Packages, fetcher: Fetcher) -> None:
        self._packages = packages
        self._fetcher = fetcher

    @property
    def routes(self) -> Mapping[str, Handler]:
        """Path prefix -> handler, as `RestHandler` takes them."""
        return {"/blobs": self.blob, "/catalog": self.catalog}

    async def blob(self, request: HttpRequest) -> HttpResponse:
        """A file by digest, from here or through here. Raises NotFound for one that is not approved, Unreachable when it
        cannot be had."""
        digest = request.path.removeprefix("/blobs/")
        try:
            size = (await self._packages.require((digest,)))[digest]
            path = await self._fetcher.fetch(digest, size)
        except (NotListed, Malformed) as error:
            raise NotFound(f"no such file: {error}") from error
        except SyncError as error:
            raise Unreachable(f"file not here and not to be had now: {error}") from error
        return _answer(request, FileBody(path, 0, size))

    async def catalog(self, request: HttpRequest) -> HttpResponse:
        """The signed catalogue, as fresh as it can be had; the last good one while the hub is away."""
        try:
            envelope = await self._packages.current()
        except SyncError as error:
            raise Unreachable(f"no catalogue here yet: {error}") from error
        return HttpResponse(200, JSON, envelope)


def _answer(request: HttpRequest, whole: FileBody) -> HttpResponse:
    """The whole file, or the one range asked for (RFC 9110, section 14)."""
    asked = request.headers.get(b"range")
    if asked is None:
        return HttpResponse(200, _FILE, whole)
    start, end = _range(asked, whole.length)
    if start >= whole.length:
        unsatisfied = header_lines((("content-range", f"bytes */{whole.length}"),))
        return HttpResponse(416, JSON + unsatisfied, error_body("the range starts behind the end of the file"))
    part = header_lines((("content-range", f"bytes {start}-{end}/{whole.length}"),))
    return HttpResponse(206, _FILE + part, FileBody(whole.path, start, end - start + 1))


def _range(header: bytes, length: int) -> tuple[int, int]:
    """First and last byte of `bytes=a-b` or `bytes=a-`. Raises InvalidRequest for any other form: our clients send no other."""
    found = _RANGE.fullmatch(header.strip())
    if found is None:
        raise InvalidRequest("header Range: only 'bytes=FIRST-' and 'bytes=FIRST-LAST' are understood")
    start = int(found[1])
    end = min(int(found[2]), length - 1) if found[2] else length - 1
    if end < start < length:
        raise InvalidRequest("header Range: the last byte comes before the first")
    return start, end
