"""A mirror of files for the devices behind this node: what it lacks it fetches by digest, checks against it and keeps.

It does not ask whether a file is approved: devices check that, and every digest, themselves, so it need not be trusted. However
many devices ask for a file, it comes over the node's own uplink once; what is kept is bounded by the store's quota.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Self

from edge_node.metadata import MetadataMirror
from edge_node.shares import MirrorSettings, Shares
from models.errors import InvalidRequest, MethodNotAllowed, NotFound, Overloaded, TooLarge, Unreachable
from models.serving.exchange import JSON, FileBody, Handler, HttpRequest, HttpResponse, error_body, header_lines
from sync.delta_fetch import MAX_OFFER_BYTES
from sync.download import Busy
from sync.errors import Absent, Malformed, SyncError
from sync.fetch import Fetcher
from sync.store import BlobStore
from sync.trust import check_digest

MAX_FILE_BYTES = 4 << 30
"""Largest single file that is fetched for a device (4 GiB), as clients accept it."""
MAX_FETCHES = 16
"""Different files fetched for devices at once."""
ANSWER_SECONDS = 5.0
"""How long a device waits for a file that is on its way here: then it is asked to come back, before its read times out."""
RETRY_SECONDS = 2.0
MISS_BYTES = 64 * 1024
"""What asking for a file that is not here counts for: each such question goes up to the hub."""
ABSENT_SECONDS = 30.0
"""How long it is remembered that nobody has a file."""
MAX_ABSENT = 1_024

_DELTA = re.compile(r"/deltas/sha256:[0-9a-f]{64}\?from=sha256:[0-9a-f]{64}(?:,sha256:[0-9a-f]{64}){0,15}")
_RANGE = re.compile(rb"bytes=(\d{1,19})-(\d{0,19})")


class BlobMirror:
    """HTTP handlers for `/blobs/{digest}` (with Range), `/deltas/{digest}` and `/tuf/{name}`.

    `counts`: questions for files, as hits and misses; files fetched for them; coming, busy: devices asked to come back because
    their file, or too many others, were on the way here.
    """

    def __init__(
        self,
        store: BlobStore,
        fetcher: Fetcher,
        metadata: MetadataMirror,
        settings: MirrorSettings | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._store = store
        self._fetcher = fetcher
        self._metadata = metadata
        self._monotonic = monotonic
        self._shares = Shares(settings or MirrorSettings(), monotonic)
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._absent: OrderedDict[str, float] = OrderedDict()

    @property
    def sent(self) -> int:
        """Bytes of files that devices were sent."""
        return self._shares.sent

    @property
    def downloads(self) -> int:
        """Of devices, under way."""
        return self._shares.running

    def refusals(self) -> Mapping[str, int]:
        """Why devices were asked to come back, and how often."""
        return {**self._shares.refused, **{why: self.counts[why] for why in ("coming", "busy")}}

    @property
    def routes(self) -> Mapping[str, Handler]:
        """Path prefix -> handler, as `RestHandler` takes them."""
        return {"/blobs": self.blob, "/deltas": self.delta, "/tuf": self._metadata.metadata}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End what is being fetched."""
        for coming in list(self._coming.values()):
            coming.cancel()

    async def blob(self, request: HttpRequest) -> HttpResponse:
        """A file by digest, from here or through here. Its digest is its ETag: the content never changes.

        Raises NotFound, TooLarge, Overloaded (when to come back, to a device that has had its share or whose file is on its
        way here), Unreachable when it cannot be had now.
        """
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"files take GET or HEAD, not {request.method}")
        digest = request.path.removeprefix("/blobs/")
        try:
            check_digest(digest)
            if self._store.claim(digest):
                self.counts["hits"] += 1
            else:
                self.counts["misses"] += 1
                self._shares.charge(request.peer, MISS_BYTES)
                await self._bring(digest)
            path = self._store.path(digest)
            size = path.stat().st_size
        except (Absent, Malformed) as error:
            raise NotFound(f"no such file: {error}") from error
        except (SyncError, OSError) as error:
            raise Unreachable(f"file not here and not to be had now: {error}") from error
        return self._answer(request, digest, FileBody(path, 0, size))

    async def delta(self, request: HttpRequest) -> HttpResponse:
        """A device's question for a delta, passed on: what it is told counts for nothing until the result has its digest.

        Raises NotFound, Overloaded, Unreachable.
        """
        path = f"{request.path}?{request.query}"
        if not _DELTA.fullmatch(path):
            raise NotFound("no such question")
        self._shares.charge(request.peer, MISS_BYTES)
        why: SyncError = Absent("no source has a delta")
        for source in self._fetcher.sources:
            try:
                return HttpResponse(200, JSON, await self._fetcher.get(source, path, MAX_OFFER_BYTES))
            except Busy as error:
                raise Overloaded("the delta is being made", error.seconds) from error
            except SyncError as error:
                why = error if isinstance(why, Absent) else why
        if isinstance(why, Absent):
            raise NotFound(str(why))
        raise Unreachable(f"no source was reached: {why}")

    async def _bring(self, digest: str) -> None:
        """Wait for the one transfer of this file, which goes on when we do not."""
        self._check_absent(digest)
        if digest not in self._coming:
            if len(self._coming) >= MAX_FETCHES:
                self.counts["busy"] += 1
                raise Overloaded(f"{MAX_FETCHES} files are being fetched for devices", RETRY_SECONDS)
            coming = asyncio.create_task(self._fetch(digest), name="mirror")
            self._coming[digest] = coming
            coming.add_done_callback(lambda done: self._came(digest, done))
        coming = self._coming[digest]
        await asyncio.wait({coming}, timeout=ANSWER_SECONDS)
        if not coming.done():
            self.counts["coming"] += 1
            raise Overloaded("the file is on its way here", RETRY_SECONDS)
        if coming.cancelled():
            raise Unreachable("this node is stopping")
        coming.result()

    def _came(self, digest: str, done: asyncio.Task[None]) -> None:
        del self._coming[digest]
        error = None if done.cancelled() else done.exception()
        if isinstance(error, Absent):
            self._absent[digest] = self._monotonic() + ABSENT_SECONDS
            while len(self._absent) > MAX_ABSENT:
                self._absent.popitem(last=False)

    def _check_absent(self, digest: str) -> None:
        until = self._absent.get(digest)
        if until is None:
            return
        if self._monotonic() < until:
            raise Absent("no source had it a moment ago")
        del self._absent[digest]

    async def _fetch(self, digest: str) -> None:
        size = await self._fetcher.size(digest)
        if not 0 < size <= MAX_FILE_BYTES:
            raise TooLarge(f"{digest} has {size} bytes, at most {MAX_FILE_BYTES} are passed on")
        await self._fetcher.fetch(digest, size)
        self.counts["fetched"] += 1

    def _answer(self, request: HttpRequest, digest: str, whole: FileBody) -> HttpResponse:
        """The whole file, or the one range asked for (RFC 9110, sections 13 and 14)."""
        etag = f'"{digest}"'
        lines = (("content-type", "application/octet-stream"), ("accept-ranges", "bytes"), ("etag", etag))
        headers, given = header_lines(lines), request.headers
        if not _matches(given.get(b"if-match"), etag, absent=True):
            return HttpResponse(412, JSON, error_body("header If-Match: the file has another digest"))
        if _matches(given.get(b"if-none-match"), etag, absent=False):
            return HttpResponse(304, header_lines(lines[2:]))
        asked = given.get(b"range") if given.get(b"if-range", etag.encode()) == etag.encode() else None
        if asked is None:
            return HttpResponse(200, headers, self._shared(request, whole))
        start, end = _range(asked, whole.length)
        if start >= whole.length:
            unsatisfied = header_lines((("content-range", f"bytes */{whole.length}"),))
            return HttpResponse(416, JSON + unsatisfied, error_body("the range starts behind the end of the file"))
        part = header_lines((("content-range", f"bytes {start}-{end}/{whole.length}"),))
        return HttpResponse(206, headers + part, self._shared(request, FileBody(whole.path, start, end - start + 1)))

    def _shared(self, request: HttpRequest, body: FileBody) -> FileBody:
        if request.method == "HEAD":
            return body
        return FileBody(body.path, body.offset, body.length, self._shares.take(request.peer))


def _matches(header: bytes | None, etag: str, *, absent: bool) -> bool:
    """RFC 9110, 13.1: `*` or a list of tags; ours is strong. `absent`: what it means that the header is not there."""
    if header is None:
        return absent
    tags = {tag.strip() for tag in header.decode("latin-1").split(",")}
    return bool(tags & {"*", etag})


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
