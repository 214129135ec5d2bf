"""What the nodes say. Decoded and bounded here; garbage and strangers are counted, never fatal.

Nothing heard is trusted for more than showing it and deciding what to send again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cloud_hub.records import PRESENT, Observation
from cloud_hub.storage import Storage
from sync.channel import LinkLike, Message
from sync.clock import Clock
from sync.errors import Malformed
from sync.messages import Capabilities, Reported, State, decode
from sync.topics import parse_up

STATES = (*PRESENT, "disconnected", "lost")
MAX_WAITING = 10_000
"""Observations that may wait for the database; above it new ones are dropped and counted, the next report replaces them."""
MAX_BATCH = 500
"""Observations of one transaction: one disk flush pays for all of them."""
MAX_RUNNING = 1_000
"""Entries of one report's tables; a node serves at most 128 models."""

log = logging.getLogger(__name__)


class Fleet:
    """Remembers what nodes say. `counts`: garbage, unknown, dropped, event, stored."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock
        self._waiting: asyncio.Queue[Observation] = asyncio.Queue(MAX_WAITING)
        self._in_hand: list[Observation] = []
        with storage.read() as records:
            self._known = {node.id for node in records.nodes()}
        self.counts: Counter[str] = Counter()

    def admit(self, node_id: str) -> None:
        """Listen to a node that was registered just now."""
        self._known.add(node_id)

    async def listen(self, link: LinkLike) -> None:
        """Take in everything that arrives, until the link closes."""
        async for message in link.messages():
            self.hear(message)

    def hear(self, message: Message) -> None:
        """Take in one message; never raises for what it contains."""
        try:
            observation = self._decode(message)
        except Malformed as error:
            self.counts["garbage"] += 1
            log.debug("ignored a message: %s", error)
            return
        if observation is None:
            return
        if self._waiting.full():
            self.counts["dropped"] += 1
            return
        self._waiting.put_nowait(observation)

    def _decode(self, message: Message) -> Observation | None:
        node_id, leaf = parse_up(message.topic)
        if node_id not in self._known:
            self.counts["unknown"] += 1
            return None
        now = self._clock.wall()
        if leaf == "state":
            state = decode(message.payload, State)
            if state.state not in STATES or len(state.boot) > 64:
                raise Malformed(f"state: {state.state[:40]!r} is none of {', '.join(STATES)}")
            return Observation(node_id, now, state=state.state, boot=state.boot)
        if leaf == "reported":
            return Observation(node_id, now, reported=msgspec.json.encode(_bounded(decode(message.payload, Reported))))
        if leaf == "caps":
            return Observation(node_id, now, capabilities=msgspec.json.encode(decode(message.payload, Capabilities)))
        self.counts["event"] += 1
        return None

    async def remember(self, heard: Callable[[Sequence[str]], None]) -> None:
        """Write what was heard, in batches, and tell `heard` the ids of the nodes it came from. Runs until cancelled.

        What could not be written stays in hand and is written first when this is called again.
        """
        while True:
            if not self._in_hand:
                self._in_hand.append(await self._waiting.get())
            while len(self._in_hand) < MAX_BATCH and not self._waiting.empty():
                self._in_hand.append(self._waiting.get_nowait())
            await asyncio.to_thread(self._store, self._in_hand)
            nodes = sorted({observation.node for observation in self._in_hand})
            self.counts["stored"] += len(self._in_hand)
            self._in_hand = []
            heard(nodes)

    def _store(self, batch: Iterable[Observation]) -> None:
        with self._storage.write() as records:
            for observation in batch:
                records.observe(observation)


def _bounded(reported: Reported) -> Reported:
    for field in ("documents", "running", "refused"):
        if len(getattr(reported, field)) > MAX_RUNNING:
            raise Malformed(f"{field}: more than {MAX_RUNNING} entries")
    return reported
