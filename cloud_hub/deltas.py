"""Deltas between approved files, made when a node asks, kept as files of their own and bounded like a cache.

    node: GET /deltas/<wanted>?from=<has>,<has>  ->  this: which delta of which base  ->  node: GET /blobs/<delta>, in ranges

A node names files it has; which of them serves best is decided here. What is not worth it, too large or too slow is remembered
as such, and the node fetches the whole file.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import NamedTuple

import msgspec

from cloud_hub.blobs import CHUNK_BYTES, Blobs
from models.errors import InvalidRequest, Overloaded, TryAgain
from sync.delta import Offer
from sync.errors import Malformed
from sync.trust import check_digest

MIN_BYTES = 16 * 1024
"""A smaller file is fetched whole: the questions would cost as much."""
MAX_BYTES = 512 << 20
"""A larger one takes too long to compare."""
MAX_RATIO = 3.0
"""A base that is so many times larger or smaller is another kind of file."""
WORTH = 0.8
"""A delta above this share of the file is not offered: applying it costs time, too."""
MAX_BASES = 16
TRIES = 2
"""Bases that are tried for one question, the closest in size first."""
MAX_WAITING = 32
NODE_WAITING = 4
"""Of those, that one node asked for first: the worker makes one at a time, up to `CHILD_SECONDS` each, in the order asked.
Twice what a node fetches at once: it does not wait for a delta to the end."""
CHILD_SECONDS = 300.0
RETRY_SECONDS = 2
"""When to ask again while a delta is being made."""
MAX_CACHE_BYTES = 2 << 30

log = logging.getLogger(__name__)


class Pending(TryAgain):
    """The delta is being made: ask again in `RETRY_SECONDS`."""


class Made(msgspec.Struct, frozen=True):
    """What came of a pair of files: the digest of the delta and its size, or "" when it is not worth it."""

    delta: str = ""
    size: int = 0


class _Asked(NamedTuple):
    """`size`: of the file to be made. `asker`: the node that asked first."""

    size: int
    asker: str | None


class Deltas:
    """`blob_path`: where a file lies. `approved`: digest -> size, of those given that are approved; called in a thread."""

    def __init__(
        self, folder: Path, blob_path: Callable[[str], Path], approved: Callable[[Collection[str]], Mapping[str, int]]
    ) -> None:
        self.blobs = Blobs(folder)
        self._pairs = folder / "pairs"
        self._pairs.mkdir(exist_ok=True)
        self._folder = folder
        self._blob_path = blob_path
        self._approved = approved
        self._waiting: OrderedDict[tuple[str, str], _Asked] = OrderedDict()
        self._wake = asyncio.Event()

    async def offer(self, target: str, bases: Sequence[str], asker: str | None = None) -> Offer | None:
        """The delta to use, None when the whole file is the better way. `asker`: the node, None = nobody to be limited.

        Raises InvalidRequest, Pending, and Overloaded while the node waits for others.
        """
        if len(bases) > MAX_BASES:
            raise InvalidRequest(f"from: {len(bases)} given, at most {MAX_BASES} are accepted")
        try:
            for digest in (target, *bases):
                check_digest(digest)
        except Malformed as error:
            raise InvalidRequest(str(error)) from error
        sizes = await asyncio.to_thread(self._approved, {target, *bases})
        for base in _closest(target, bases, sizes)[:TRIES]:
            made = await asyncio.to_thread(self._recall, base, target)
            if made is None:
                self._ask(base, target, _Asked(sizes[target], asker))
                return None
            if made.delta and await self.blobs.size(made.delta) == made.size:
                return Offer(base, made.delta, made.size)
        return None

    async def run(self) -> None:
        """Make what was asked for, one at a time, until cancelled."""
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            (base, target), asked = next(iter(self._waiting.items()))
            try:
                made = await self._make(base, target, asked.size)
            except (OSError, TryAgain, InvalidRequest) as error:
                log.warning("no delta to %s: %s", target, error)
                made = Made()
            try:
                await asyncio.to_thread(self._remember, base, target, made)
            except OSError as error:
                log.warning("a delta could not be remembered: %s", error)
            finally:
                self._waiting.pop((base, target), None)

    def _ask(self, base: str, target: str, asked: _Asked) -> None:
        """Have it made. Raises Pending, unless too many wait already; Overloaded when too many of them are this node's."""
        if (base, target) not in self._waiting:
            if len(self._waiting) >= MAX_WAITING:
                return  # the whole file, then
            own = sum(waits.asker == asked.asker for waits in self._waiting.values())
            if asked.asker is not None and own >= NODE_WAITING:
                raise Overloaded(f"{own} deltas that this node asked for are not made yet", RETRY_SECONDS)
            self._waiting[base, target] = asked
            self._wake.set()
        raise Pending("the delta is being made")

    async def _make(self, base: str, target: str, size: int) -> Made:
        """Raises OSError."""
        out = self._folder / "staging" / "made.delta"
        arguments = (str(self._blob_path(base)), str(self._blob_path(target)), str(out), base, target)
        child = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "cloud_hub.delta_child", *arguments)
        try:
            async with asyncio.timeout(CHILD_SECONDS):
                code = await child.wait()
        except TimeoutError:
            code = -1
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        try:
            length = out.stat().st_size if out.is_file() else 0
            if code or not 0 < length < WORTH * size:
                return Made()
            with out.open("rb") as file:
                digest = f"sha256:{(await asyncio.to_thread(file_digest, file, 'sha256')).hexdigest()}"
            await self.blobs.put(digest, _chunks(out))
        finally:
            out.unlink(missing_ok=True)
        log.info("delta of %d bytes for a file of %d", length, size)
        return Made(digest, length)

    def _recall(self, base: str, target: str) -> Made | None:
        try:
            made = msgspec.json.decode(self._pair(base, target).read_bytes(), type=Made)
        except (OSError, msgspec.MsgspecError):
            return None
        # A delta that was removed to make room is made again.
        return None if made.delta and not self._delta_path(made.delta).is_file() else made

    def _remember(self, base: str, target: str, made: Made) -> None:
        staged = self._folder / "staging" / "pair.new"
        staged.write_bytes(msgspec.json.encode(made))
        staged.replace(self._pair(base, target))
        files = sorted((self._folder / "sha256").iterdir(), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= MAX_CACHE_BYTES:
                break
            total -= path.stat().st_size
            path.unlink()

    def _pair(self, base: str, target: str) -> Path:
        return self._pairs / f"{base.removeprefix('sha256:')}-{target.removeprefix('sha256:')}"

    def _delta_path(self, digest: str) -> Path:
        return self._folder / digest.replace(":", "/")


def _closest(target: str, bases: Collection[str], sizes: Mapping[str, int]) -> list[str]:
    """Approved bases of about the target's size, the closest first."""
    size = sizes.get(target, 0)
    if not MIN_BYTES <= size <= MAX_BYTES:
        return []
    ratios = {base: max(size, sizes[base]) / min(size, sizes[base]) for base in bases if sizes.get(base)}
    fitting = [base for base, ratio in ratios.items() if ratio <= MAX_RATIO and base != target]
    return sorted(fitting, key=lambda base: ratios[base])


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
