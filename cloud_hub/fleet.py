"""What the nodes say. Decoded and bounded here; garbage and strangers are counted, never fatal.

Nothing heard is trusted for more than showing it and deciding what to send again. Reports are kept as the bytes received: a
field of a later release is not lost here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from cloud_hub.records import PRESENT, Observation
from cloud_hub.storage import Storage
from sync.channel import LinkLike, Message
from sync.clock import Clock
from sync.errors import Malformed
from sync.messages import Capabilities, Reported, State, decode
from sync.topics import parse_up

STATES = (*PRESENT, "disconnected", "lost")
MAX_BATCH = 500
"""Observations of one transaction: one disk flush pays for all of them."""
YIELD_EVERY = 200
"""Messages taken in before the event loop gets a turn: a fleet's retained messages arrive all at once, without a pause."""
MAX_RUNNING = 1_000
"""Entries of one report's tables; a node serves at most 128 models."""

log = logging.getLogger(__name__)


class Fleet:
    """Remembers what nodes say. `counts`: garbage, unknown, event, stored. `events` takes payloads of `up/event`,
    `answers` those of `up/rpc`, `blocks` those of `up/block`."""

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        events: Callable[[str, bytes], None] | None = None,
        answers: Callable[[str, bytes], None] | None = None,
        blocks: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._events = events
        self._answers = answers
        self._blocks = blocks
        # The newest of each (node, leaf), so it is bounded by the registered nodes and a burst loses nothing that counts.
        self._waiting: dict[tuple[str, str], Observation] = {}
        self._arrived = asyncio.Event()
        self._in_hand: list[Observation] = []
        with storage.read() as records:
            self._known = {node.id for node in records.nodes()} - records.identities.denied().keys()
        self.counts: Counter[str] = Counter()

    @property
    def size(self) -> int:
        """How many nodes are listened to."""
        return len(self._known)

    def knows(self, node_id: str) -> bool:
        """Whether a node is listened to."""
        return node_id in self._known

    def admit(self, node_id: str) -> None:
        """Listen to a node that was registered just now."""
        self._known.add(node_id)

    def deny(self, node_id: str) -> None:
        """Hear nothing of a node from now on, what waits to be written included."""
        self._known.discard(node_id)
        for key in [key for key in self._waiting if key[0] == node_id]:
            del self._waiting[key]

    async def listen(self, link: LinkLike) -> None:
        """Take in everything that arrives, until the link closes."""
        taken = 0
        async for message in link.messages():
            self.hear(message)
            taken += 1
            if taken % YIELD_EVERY == 0:
                await asyncio.sleep(0)

    def hear(self, message: Message) -> None:
        """Take in one message; never raises for what it contains."""
        try:
            node_id, leaf = parse_up(message.topic)
            observation = self._decode(node_id, leaf, message.payload)
        except Malformed as error:
            self.counts["garbage"] += 1
            log.debug("ignored a message: %s", error)
            return
        if observation is None:
            return
        self._waiting[node_id, leaf] = observation
        self._arrived.set()

    def _decode(self, node_id: str, leaf: str, payload: bytes) -> Observation | None:
        if node_id not in self._known:
            self.counts["unknown"] += 1
            return None
        now = self._clock.wall()
        if leaf == "state":
            state = decode(payload, State)
            if state.state not in STATES or len(state.boot) > 64:
                raise Malformed(f"state: {state.state[:40]!r} is none of {', '.join(STATES)}")
            return Observation(node_id, now, state=state.state, boot=state.boot)
        if leaf == "reported":
            _check_bounds(decode(payload, Reported))
            return Observation(node_id, now, reported=payload)
        if leaf == "caps":
            decode(payload, Capabilities)
            return Observation(node_id, now, capabilities=payload)
        if leaf == "rpc":
            if self._answers is not None:
                self._answers(node_id, payload)
            return None
        if leaf == "block":
            if self._blocks is not None:
                self._blocks(node_id, payload)
            return None
        self.counts["event"] += 1
        if leaf == "event" and self._events is not None:
            self._events(node_id, payload)
        return None

    async def remember(self, heard: Callable[[Sequence[str]], None]) -> None:
        """Write what was heard, in batches, and tell `heard` the ids of the nodes it came from. Runs until cancelled.

        What could not be written stays in hand and is written first when this is called again.
        """
        while True:
            while not self._in_hand and not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            for key in list(islice(self._waiting, MAX_BATCH - len(self._in_hand))):
                self._in_hand.append(self._waiting.pop(key))
            await asyncio.to_thread(self._store, self._in_hand)
            nodes = sorted({observation.node for observation in self._in_hand})
            self.counts["stored"] += len(self._in_hand)
            self._in_hand = []
            heard(nodes)

    def _store(self, batch: Iterable[Observation]) -> None:
        with self._storage.write() as records:
            records.observe(*batch)


def _check_bounds(reported: Reported) -> None:
    for field in ("documents", "running", "refused"):
        if len(getattr(reported, field)) > MAX_RUNNING:
            raise Malformed(f"{field}: more than {MAX_RUNNING} entries")
