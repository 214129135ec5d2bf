"""A mirror of the update repository's metadata for the devices behind this node.

It passes on bytes and verifies nothing: devices do that themselves, so what a source forged here can only delay them. What
changes (the timestamp, a root that does not exist yet) is asked for each time; the rest is kept for a while, and for as long
as the source is away.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import NotFound, Overloaded, Unreachable
from models.serving.exchange import JSON, HttpRequest, HttpResponse
from sync.errors import Absent, StoreFailed, SyncError, Unavailable
from sync.fetch import Fetcher

PREFIX = "/tuf/"
MAX_METADATA_BYTES = 5_000_000
"""Most of one file, as clients accept it. Ours have 3 kB."""
MAX_KEPT_BYTES = 64 << 20
"""All files kept; the longest unused go first. A repository of 100,000 files has 16 MB of them."""
FRESH_SECONDS = 600.0
"""A versioned file is asked for again after so long: what a forging source made us keep must not stay for ever."""
SHARED_SECONDS = 1.0
"""Devices that ask for the timestamp within it share one answer."""
AWAY_SECONDS = 5.0
"""After a question that failed, how long what is kept is passed on without asking: a source that swallows questions would
hold up each device in turn."""
ANSWER_SECONDS = 5.0
"""How long a device waits for a source: then it gets what is kept, or is asked to come back, before its read times out."""
RETRY_SECONDS = 2.0
MAX_ASKING = 16
"""Different files asked for at once, whatever names devices make up."""
MAX_FAILED = 1_024
"""Failures remembered."""

_NAME = re.compile(r"(?:[1-9][0-9]{0,15}\.(?:root|targets|snapshot|bin-[0-9a-f]{2})|timestamp)\.json")


@dataclass(slots=True)
class _Kept:
    data: bytes
    at: float


class MetadataMirror:
    """The HTTP handler of `/tuf/{name}`. `folder`: where the files are kept over a restart."""

    def __init__(self, fetcher: Fetcher, folder: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._fetcher = fetcher
        self._folder = folder
        self._monotonic = monotonic
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._asking: dict[str, asyncio.Task[bytes]] = {}
        self._failed: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._read_back()

    async def metadata(self, request: HttpRequest) -> HttpResponse:
        """A metadata file, as fresh as it can be had. Raises NotFound, Unreachable or Overloaded when it was never here."""
        name = request.path.removeprefix(PREFIX)
        if not _NAME.fullmatch(name):
            raise NotFound("no such metadata file")
        return HttpResponse(200, JSON, await self._file(name))

    async def _file(self, name: str) -> bytes:
        kept = self._kept.get(name)
        if kept is not None and self._monotonic() - kept.at < (
            SHARED_SECONDS if name == "timestamp.json" else FRESH_SECONDS
        ):
            self._kept.move_to_end(name)
            return kept.data
        try:
            return await self._shared(name)
        except Absent as error:
            raise NotFound(f"no such metadata file: {name}") from error
        except Overloaded:
            if kept is not None:
                return kept.data
            raise
        except SyncError as error:
            if kept is not None:
                return kept.data
            raise Unreachable(f"{name} is not here and not to be had now: {error}") from error

    async def _shared(self, name: str) -> bytes:
        """Wait for the one question about this file, which goes on when we do not. Raises Overloaded, or what it ends in."""
        until, why = self._failed.get(name, (float("-inf"), ""))
        if self._monotonic() < until:
            raise Unavailable(why)
        if name not in self._asking:
            if len(self._asking) >= MAX_ASKING:
                raise Overloaded(f"{MAX_ASKING} metadata files are being asked for", RETRY_SECONDS)
            asking = asyncio.create_task(self._bring(name), name="metadata mirror")
            self._asking[name] = asking
            asking.add_done_callback(lambda done: self._answered(name, done))
        asking = self._asking[name]
        await asyncio.wait({asking}, timeout=ANSWER_SECONDS)
        if not asking.done():
            raise Overloaded(f"{name} is being asked for", RETRY_SECONDS)
        if asking.cancelled():
            raise Unreachable("this node is stopping")
        return asking.result()

    async def _bring(self, name: str) -> bytes:
        data = await self._ask(name)
        await self._keep(name, data)
        return data

    def _answered(self, name: str, done: asyncio.Task[bytes]) -> None:
        del self._asking[name]
        self._failed.pop(name, None)
        error = None if done.cancelled() else done.exception()
        if isinstance(error, SyncError) and not isinstance(error, Absent):
            self._failed[name] = (self._monotonic() + AWAY_SECONDS, str(error))
            while len(self._failed) > MAX_FAILED:
                self._failed.popitem(last=False)

    async def _ask(self, name: str) -> bytes:
        failure: SyncError = Absent("no source is configured")
        for source in self._fetcher.sources:
            try:
                return await self._fetcher.get(source, PREFIX + name, MAX_METADATA_BYTES)
            except SyncError as error:
                # One that could not be asked may have it: only when all say no it does not exist.
                failure = error if isinstance(failure, Absent) else failure
        raise failure

    async def _keep(self, name: str, data: bytes) -> None:
        old = self._kept.pop(name, None)
        self._bytes += len(data) - (len(old.data) if old else 0)
        self._kept[name] = _Kept(data, self._monotonic())
        gone = []
        while self._bytes > MAX_KEPT_BYTES:
            dropped, entry = self._kept.popitem(last=False)
            self._bytes -= len(entry.data)
            gone.append(dropped)
        if old is None or old.data != data or gone:
            await asyncio.to_thread(self._store, name, data, gone)

    def _store(self, name: str, data: bytes, gone: list[str]) -> None:
        """Not flushed: what a power cut takes is asked for again."""
        try:
            staged = self._folder / f".{name}.new"
            staged.write_bytes(data)
            staged.replace(self._folder / name)
            for dropped in gone:
                (self._folder / dropped).unlink(missing_ok=True)
        except OSError:
            return  # a full disk: it is still served from memory

    def _read_back(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
            for path in sorted(files, key=lambda path: path.stat().st_mtime):
                if path.stat().st_size > MAX_METADATA_BYTES or self._bytes > MAX_KEPT_BYTES:
                    continue
                data = path.read_bytes()
                self._kept[path.name] = _Kept(data, float("-inf"))
                self._bytes += len(data)
        except OSError as error:
            raise StoreFailed(f"{self._folder}: {error}") from error
