"""Files over MQTT, block by block, for networks that let nothing else through. Asked for by the node, used when all else fails.

    node -> hub, up/block      {"call":"blocks","id":7,"path":"/blobs/sha256:...","offset":0,"length":61440,"n":1}
    hub -> node, down/block    a head of 26 bytes, then the bytes of one block

Both at QoS 0: a block that is lost is asked for again. At most `WINDOW` blocks are on their way to a node, so what the hub has
to say to it never waits behind more than 256 KiB. Pure but for the waiting; what arrives is verified like from any source.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from hashlib import sha256
from threading import Event
from typing import Literal

import msgspec

from sync import topics
from sync.channel import LinkLike
from sync.clock import Clock
from sync.download import Busy, Mismatch
from sync.errors import Absent, InvalidConfig, Malformed, Unavailable
from sync.messages import encode
from sync.pace import Pace
from sync.part import Part

SCHEME = "mqtt:"
"""The URL of the source that this is."""
BLOCK = 60 * 1024
"""Bytes of a block: with its head and topic it stays below the 64 KiB that every broker carries."""
MAX_BLOCKS = 8
"""Blocks that one request may ask for."""
WINDOW = 4
BLOCK_SECONDS = 15.0
TRIES = 4
"""How often a block is asked for: it goes at QoS 0, and the broker may have been away."""
SILENT_SECONDS = 60.0
"""How long a hub that did not answer is not asked again."""
MAX_FILE_BYTES = 4 << 30
MAX_PATH = 100
BUSY_SECONDS = 5.0
"""When to come back to a hub that says it is busy."""
MIN_RATE = 1_000.0

OK, ABSENT, BUSY = 0, 1, 2
_HEAD = struct.Struct(">4sIBQQB")  # magic, id, status, offset, total, reserved
_MAGIC = b"TLB1"


class BlockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[blocks]`. `enabled`: files come over MQTT when no other source answers. `rate`: bytes per second they may take."""

    enabled: bool = True
    rate: float = 128_000.0

    def __post_init__(self) -> None:
        if not MIN_RATE <= self.rate <= 1e9:
            raise InvalidConfig(f"blocks.rate: {self.rate} is not between {MIN_RATE:g} and 1e9 bytes per second")


class GetBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """`n` blocks of `length` bytes of the file at `path`, from byte `offset` on; answered one by one, all under this `id`."""

    call: Literal["blocks"] = "blocks"
    id: int
    path: str
    offset: int
    length: int = BLOCK
    n: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """`total`: bytes of the whole file."""

    id: int
    status: int
    offset: int
    total: int
    data: bytes


def pack(block: Block) -> bytes:
    return _HEAD.pack(_MAGIC, block.id, block.status, block.offset, block.total, 0) + block.data


def unpack(payload: bytes) -> Block:
    """Raises Malformed."""
    if len(payload) < _HEAD.size or len(payload) > _HEAD.size + BLOCK:
        raise Malformed(f"block: {len(payload)} bytes")
    magic, number, status, offset, total, _ = _HEAD.unpack_from(payload)
    if magic != _MAGIC or status not in (OK, ABSENT, BUSY) or total > MAX_FILE_BYTES:
        raise Malformed("block: not a block of a format this release reads")
    return Block(number, status, offset, total, payload[_HEAD.size :])


class Blocks:
    """The node's side, in its event loop. `counts` of bytes: received."""

    def __init__(
        self, link: LinkLike, node_id: str, clock: Clock, settings: BlockSettings, pace: Pace | None = None
    ) -> None:
        """`pace`: what all transfers of the node may take together."""
        self.received = 0
        self._shared_pace = pace or Pace()
        self._link = link
        self._topic = topics.up(node_id, "block")
        self._clock = clock
        self._pace = Pace(settings.rate, clock.monotonic)
        self._window = asyncio.Semaphore(WINDOW)
        self._waiting: dict[int, asyncio.Future[Block]] = {}
        self._spoke = False
        self._silent_until = float("-inf")
        self._number = 0
        self._loop = asyncio.get_running_loop()

    def heard(self, payload: bytes) -> None:
        """A payload of `down/block`. Raises Malformed; one that nobody waits for any more is dropped."""
        block = unpack(payload)
        self._spoke = True
        waiting = self._waiting.get(block.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(block)

    async def get(self, path: str, offset: int, length: int) -> Block:
        """One block. Raises Absent, Busy, Unavailable."""
        async with self._window:
            # A hub of an older release never answers: it is not waited for again and again.
            for _ in range(TRIES if self._spoke else 1):
                if not self._link.connected:
                    raise Unavailable("mqtt: not connected")
                if self._clock.monotonic() < self._silent_until:
                    raise Unavailable("mqtt: the hub did not answer a while ago")
                block = await self._ask(path, offset, length)
                if block is not None:
                    break
            else:
                self._silent_until = self._clock.monotonic() + SILENT_SECONDS
                raise Unavailable(f"mqtt: no block at {offset} of {path}, the hub does not answer")
            self.received += len(block.data)
            size = len(block.data)
            await self._clock.sleep(max(self._pace.take(size), self._shared_pace.take(size)))
        if block.status == ABSENT:
            raise Absent(f"mqtt: the hub has no {path} for this node")
        if block.status == BUSY:
            raise Busy("mqtt: the hub is busy", BUSY_SECONDS)
        if block.offset != offset or len(block.data) > length:
            raise Unavailable("mqtt: another block than the one asked for")
        return block

    async def _ask(self, path: str, offset: int, length: int) -> Block | None:
        self._number = (self._number + 1) % 2**32
        number = self._number
        answer = self._waiting[number] = self._loop.create_future()
        late = asyncio.ensure_future(self._clock.sleep(BLOCK_SECONDS))
        try:
            self._link.publish(
                self._topic, encode(GetBlocks(id=number, path=path, offset=offset, length=length)), qos=0
            )
            await asyncio.wait({answer, late}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            late.cancel()
            del self._waiting[number]

    def ask(self, path: str, offset: int, length: int) -> Future[Block]:
        """`get`, from another thread."""
        return asyncio.run_coroutine_threadsafe(self.get(path, offset, length), self._loop)

    def transfer(self, path: str) -> BlockRead:
        """One file; the same methods as `sync.download.Download`."""
        return BlockRead(self, path)


class BlockRead:
    """Called in a thread of its own, except `stop`."""

    def __init__(self, blocks: Blocks, path: str) -> None:
        self.received = 0
        self.resumed = False
        self._blocks = blocks
        self._path = path
        self._stopped = Event()
        self._why = ""
        self._asked: list[Future[Block]] = []

    def stop(self, why: str = "the transfer was cancelled") -> None:
        self._why = self._why or why
        self._stopped.set()
        for asked in list(self._asked):
            asked.cancel()

    def size(self) -> int:
        """Bytes of the file. Raises Absent, Unavailable."""
        return self._one(0, 1).total

    def read(self, limit: int) -> bytes:
        """The whole file. Raises Absent, Unavailable, Malformed when it is longer than `limit` bytes."""
        first = self._one(0, min(BLOCK, max(limit, 1)))
        if first.total > limit:
            raise Malformed(f"mqtt: {self._path} has more than {limit} bytes")
        return first.data + b"".join(self._from(len(first.data), first.total))

    def into(self, part: Part, digest: str, size: int) -> None:
        """Complete `part`, continuing what is there. Raises Absent, Unavailable (what came stays), Mismatch (deleted)."""
        have = part.length()
        hasher = sha256()
        if 0 < have <= size:
            part.hash(hasher, have)
            self.resumed = True
        else:
            have = 0
            part.restart()
        for chunk in self._from(have, size):
            part.write(chunk)
            hasher.update(chunk)
        if f"sha256:{hasher.hexdigest()}" != digest:
            part.remove()
            raise Mismatch(f"mqtt: {self._path} delivered bytes with another digest")

    def _from(self, start: int, size: int) -> Iterator[bytes]:
        """The blocks in order, `WINDOW` of them asked for ahead."""
        offsets = iter(range(start, size, BLOCK))
        try:
            for offset in offsets:
                self._ask(offset, size)
                if len(self._asked) >= WINDOW:
                    yield self._next(size)
            while self._asked:
                yield self._next(size)
        finally:
            for asked in self._asked:
                asked.cancel()

    def _ask(self, offset: int, size: int) -> None:
        self._asked.append(self._blocks.ask(self._path, offset, min(BLOCK, size - offset)))

    def _next(self, size: int) -> bytes:
        block = self._wait(self._asked[0])
        self._asked.pop(0)
        if block.total != size:
            raise Mismatch(f"mqtt: {self._path} has {block.total} bytes, {size} were signed for")
        if len(block.data) != min(BLOCK, size - block.offset):
            raise Unavailable(f"mqtt: a block of {self._path} is too short")
        return block.data

    def _one(self, offset: int, length: int) -> Block:
        asked = self._blocks.ask(self._path, offset, length)
        self._asked.append(asked)
        try:
            return self._wait(asked)
        finally:
            self._asked.remove(asked)

    def _wait(self, asked: Future[Block]) -> Block:
        if self._stopped.is_set():
            asked.cancel()
        try:
            block = asked.result(TRIES * BLOCK_SECONDS * WINDOW)
        except (asyncio.CancelledError, CancelledError, TimeoutError) as error:
            raise Unavailable(f"mqtt: {self._why or 'no answer'}") from error
        self.received += len(block.data)
        return block
