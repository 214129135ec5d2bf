"""The hub's side of files over MQTT (`sync.blocks`): a few blocks at a time, of approved files, to the nodes they are for."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from cloud_hub.blobs import Blobs
from cloud_hub.documents import node_scope
from cloud_hub.storage import Storage
from models.errors import TierlineError
from sync.blocks import ABSENT, BLOCK, BUSY, MAX_BLOCKS, OK, WINDOW, Block, GetBlocks, pack
from sync.channel import LinkLike
from sync.clock import Clock
from sync.errors import Malformed
from sync.messages import decode
from sync.pace import Pace
from sync.topics import down
from sync.trust import unseal

RATE = 2_000_000.0
"""Bytes per second for all nodes together: the broker has other things to carry."""
NODE_RATE = 512_000.0
"""Bytes per second for one node; it asks for less unless its settings say otherwise."""
MAX_NODES = 256
"""Nodes that wait for blocks at once; further ones are told to come back."""
ENTITLED_SECONDS = 10.0
"""How long it is remembered what a node may have."""
MAX_REMEMBERED = 1_024
MAX_REQUEST_BYTES = 512
KINDS = ("desired", "software")
"""Documents that name files."""

_BLOB = re.compile(r"/blobs/(sha256:[0-9a-f]{64})")
_METADATA = re.compile(r"/tuf/([A-Za-z0-9.-]{1,64})")

log = logging.getLogger(__name__)


class BlockServer:
    """`metadata`: a file of the update repository by name; `keyring`: digest of the file of envelope keys. `counts`: served,
    refused, garbage, busy."""

    def __init__(
        self,
        link: LinkLike,
        storage: Storage,
        blobs: Blobs,
        metadata: Callable[[str], bytes | None],
        keyring: str,
        clock: Clock,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._link = link
        self._storage = storage
        self._blobs = blobs
        self._metadata = metadata
        self._keyring = keyring
        self._clock = clock
        self._queues: OrderedDict[str, deque[GetBlocks]] = OrderedDict()
        self._pace = Pace(RATE, clock.monotonic)
        self._node_paces: OrderedDict[str, Pace] = OrderedDict()
        self._not_before: dict[str, float] = {}
        self._entitled: OrderedDict[str, tuple[float, dict[str, int]]] = OrderedDict()
        self._wake = asyncio.Event()

    def hear(self, node_id: str, payload: bytes) -> None:
        """A payload of `up/block`. Never raises for what it contains."""
        try:
            asked = decode(payload, GetBlocks, MAX_REQUEST_BYTES)
            _check(asked)
        except Malformed as error:
            self.counts["garbage"] += 1
            log.debug("ignored a request of %s: %s", node_id, error)
            return
        queue = self._queues.get(node_id)
        if queue is None and len(self._queues) >= MAX_NODES:
            self.counts["busy"] += 1
            self._answer(node_id, Block(asked.id, BUSY, asked.offset, 0, b""))
            return
        if queue is None:
            queue = self._queues[node_id] = deque()
        # More than the window waits for nothing: a node that goes by the rules never gets here.
        if sum(item.n for item in queue) + asked.n > MAX_BLOCKS + WINDOW:
            self.counts["busy"] += 1
            return
        queue.append(asked)
        self._wake.set()

    async def run(self) -> None:
        """Answer in turn, one block for each node, until cancelled."""
        while True:
            while not self._queues:
                self._wake.clear()
                await self._wake.wait()
            node = self._next_node()
            if node is None:
                await self._clock.sleep(min(self._not_before.values()) - self._clock.monotonic())
                continue
            sent = await self._serve(node)
            await self._clock.sleep(self._pace.take(sent))

    def _next_node(self) -> str | None:
        """Whose turn it is; None while all that wait have had their share."""
        now = self._clock.monotonic()
        self._not_before = {node: at for node, at in self._not_before.items() if at > now}
        for node in self._queues:
            if node not in self._not_before:
                self._queues.move_to_end(node)
                return node
        return None

    async def _serve(self, node: str) -> int:
        """One block for `node`; how many bytes."""
        queue = self._queues[node]
        asked = queue.popleft()
        try:
            block = await self._block(node, asked)
        except TierlineError as error:
            log.warning("a block for %s could not be read: %s", node, error)
            block = Block(asked.id, BUSY, asked.offset, 0, b"")
        self._answer(node, block)
        following = asked.offset + asked.length
        if block.status == OK and asked.n > 1 and following < block.total:
            queue.appendleft(
                GetBlocks(id=asked.id, path=asked.path, offset=following, length=asked.length, n=asked.n - 1)
            )
        if not queue:
            del self._queues[node]
        pace = self._node_paces.setdefault(node, Pace(NODE_RATE, self._clock.monotonic))
        while len(self._node_paces) > MAX_REMEMBERED:
            self._node_paces.popitem(last=False)
        wait = pace.take(len(block.data))
        if wait > 0:
            self._not_before[node] = self._clock.monotonic() + wait
        return len(block.data)

    async def _block(self, node: str, asked: GetBlocks) -> Block:
        metadata, blob = _METADATA.fullmatch(asked.path), _BLOB.fullmatch(asked.path)
        if metadata is not None:
            content = await asyncio.to_thread(self._metadata, metadata[1])
            if content is not None:
                return self._found(asked, len(content), content[asked.offset : asked.offset + asked.length])
        elif blob is not None and (total := await self._size(node, blob[1])) is not None:
            end = min(asked.offset + asked.length, total)
            data = b""
            if asked.offset < end:
                data = b"".join([chunk async for chunk in self._blobs.read(blob[1], asked.offset, end)])
            return self._found(asked, total, data)
        self.counts["refused"] += 1
        return Block(asked.id, ABSENT, asked.offset, 0, b"")

    def _found(self, asked: GetBlocks, total: int, data: bytes) -> Block:
        self.counts["served"] += 1
        return Block(asked.id, OK, asked.offset, total, data)

    async def _size(self, node: str, digest: str) -> int | None:
        """Bytes of the file, None when this node has no business with it."""
        if digest == self._keyring:
            return await self._blobs.size(digest)
        now = self._clock.monotonic()
        known = self._entitled.get(node)
        if known is None or now > known[0]:
            known = (now + ENTITLED_SECONDS, await asyncio.to_thread(self._files_of, node))
            self._entitled[node] = known
            while len(self._entitled) > MAX_REMEMBERED:
                self._entitled.popitem(last=False)
        return known[1].get(digest)

    def _files_of(self, node: str) -> dict[str, int]:
        """Approved files that the node's documents name."""
        with self._storage.read() as records:
            issued = [records.document(kind, node_scope(node)) for kind in KINDS]
            named = {digest for one in issued if one is not None for digest in unseal(one.envelope).document.digests}
            return records.approved_among(named)

    def _answer(self, node: str, block: Block) -> None:
        self._link.publish(down(node, "block"), pack(block), qos=0)


def _check(asked: GetBlocks) -> None:
    if not (0 <= asked.id < 2**32 and 0 <= asked.offset < 1 << 40):
        raise Malformed("blocks: id or offset out of range")
    if not (1 <= asked.length <= BLOCK and 1 <= asked.n <= MAX_BLOCKS):
        raise Malformed(f"blocks: length is 1 to {BLOCK}, n is 1 to {MAX_BLOCKS}")
