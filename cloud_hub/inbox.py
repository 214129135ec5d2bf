"""Events up, the hub's half: each is taken in once, with what follows from it, and only then acknowledged.

    up/event -> hear (bounds) -> [waiting] -> one transaction: event, effect, watermark, counts -> down/ack

A node repeats what is not acknowledged, so whatever goes wrong before the commit loses nothing, and what arrives again is
recognised. What no repetition would mend is put aside, counted and refused by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from cloud_hub.event_records import EventRecords
from cloud_hub.storage import Storage
from cloud_hub.watermark import Stream, heed
from models.errors import TryAgain
from sync.channel import LinkLike
from sync.clock import Clock
from sync.errors import Malformed
from sync.events import ALARM, MAX_ACK_IDS, MAX_REASON_CHARS, Ack, Event, EventPacket, salvage, unpack, unpack_event
from sync.messages import encode
from sync.topics import down

MAX_BATCH = 64
"""Packets of one transaction: one disk flush pays for all of them."""
MAX_WAITING = 4_000
MAX_WAITING_BYTES = 32 * 1024 * 1024
MAX_OF_NODE = 128
"""Packets that wait, their bytes, and how many of them from one node; what is beyond is not acknowledged and comes again."""
PACKETS_PER_SECOND, PACKET_BURST = 100.0, 400.0
"""Of one node: its window makes at most 64 of them in one round trip."""
BYTES_PER_SECOND, BYTE_BURST = 1024 * 1024.0, 4 * 1024 * 1024.0
RETENTION_SECONDS = 30 * 86_400.0
MAX_EVENTS = 1_000_000
"""Events kept: of these days, and at most so many; above it those go first that have the most."""
PRUNE_SECONDS = 600.0
PRUNE_BATCH = 5_000
"""Rows of one transaction: others want to write too."""
PRUNE_BATCHES, PRUNE_AGAIN_SECONDS = 5, 5.0
"""Transactions before events are taken in again, and when to go on."""
MAX_ALARM_CHARS = 64

Effect = Callable[[EventRecords, str, Event], None]
log = logging.getLogger(__name__)


class AlarmBody(msgspec.Struct, frozen=True):
    """Body of an event of kind `alarm`. `state`: raised or cleared."""

    alarm: str
    state: str
    text: str = ""


def mark_alarm(records: EventRecords, node: str, event: Event) -> None:
    """The effect of an alarm: what is raised on a node right now. Raises Malformed."""
    try:
        body = msgspec.json.decode(event.body, type=AlarmBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"alarm: {error}") from error
    if body.state not in ("raised", "cleared") or not 0 < len(body.alarm) <= MAX_ALARM_CHARS:
        raise Malformed(f"alarm: a name of 1-{MAX_ALARM_CHARS} characters and 'raised' or 'cleared' are needed")
    records.set_alarm(node, body.alarm, body.state == "raised", body.text[:500], event)


EFFECTS: Mapping[str, Effect] = {ALARM: mark_alarm}
"""kind -> what follows from an event, in the transaction that stores it. Raises Malformed before it changes anything."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A payload of `up/event` that waits. `at`: Unix seconds of its arrival."""

    node: str
    payload: bytes
    at: float


@dataclass(slots=True)
class _Allowance:
    """What a node may send right now."""

    at: float
    packets: float = PACKET_BURST
    size: float = BYTE_BURST

    def take(self, now: float, size: int) -> bool:
        passed = max(now - self.at, 0.0)
        self.at = now
        self.packets = min(self.packets + passed * PACKETS_PER_SECOND, PACKET_BURST)
        self.size = min(self.size + passed * BYTES_PER_SECOND, BYTE_BURST)
        if self.packets < 1 or self.size < size:
            return False
        self.packets, self.size = self.packets - 1, self.size - size
        return True


@dataclass(slots=True)
class _Answers:
    """What one transaction has to tell the nodes, and counted."""

    done: dict[str, dict[str, None]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(node, kind, what) -> how many."""


class Inbox:
    """`counts`: received, duplicates, dead_letters, limited, overflow, acks. Lives in the event loop; writes in a thread."""

    def __init__(self, storage: Storage, clock: Clock, link: LinkLike, effects: Mapping[str, Effect] = EFFECTS) -> None:
        self.counts: Counter[str] = Counter()
        self._storage = storage
        self._clock = clock
        self._link = link
        self._effects = effects
        self._waiting: deque[Packet] = deque()
        self._waiting_bytes = 0
        self._of_node: Counter[str] = Counter()
        self._allowances: dict[str, _Allowance] = {}
        self._arrived = asyncio.Event()
        self._in_hand: list[Packet] = []
        self._began = (clock.wall(), clock.monotonic())
        self._prune_at = clock.monotonic() + PRUNE_SECONDS

    def hear(self, node: str, payload: bytes) -> None:
        """Take in one payload of a node that is known here; never raises."""
        now = self._clock.monotonic()
        allowance = self._allowances.get(node)
        if allowance is None:
            allowance = self._allowances[node] = _Allowance(now)
        if not allowance.take(now, len(payload)):
            self.counts["limited"] += 1
            return
        full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + len(payload) > MAX_WAITING_BYTES
        if full or self._of_node[node] >= MAX_OF_NODE:
            self.counts["overflow"] += 1
            return
        self._waiting.append(Packet(node, payload, self._clock.wall()))
        self._waiting_bytes += len(payload)
        self._of_node[node] += 1
        self._arrived.set()

    async def run(self, knows: Callable[[str], bool], fleet: Callable[[], int]) -> None:
        """Write what was heard and acknowledge it. Runs until cancelled; after an error it may be called again.

        `knows`: whether a node is still to be heard; `fleet`: how many nodes there are.
        """
        while True:
            while not self._in_hand and not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            self._take()
            batch = [packet for packet in self._in_hand if knows(packet.node)]
            answers = await asyncio.to_thread(self._store, batch)
            self._in_hand = []
            for (_, _, what), count in answers.counts.items():
                self.counts[what] += count
            self._answer(answers, fleet())
            if self._clock.monotonic() >= self._prune_at:
                more = await asyncio.to_thread(self._prune)
                self._prune_at = self._clock.monotonic() + (PRUNE_AGAIN_SECONDS if more else PRUNE_SECONDS)

    def _take(self) -> None:
        for _ in range(min(MAX_BATCH - len(self._in_hand), len(self._waiting))):
            packet = self._waiting.popleft()
            self._waiting_bytes -= len(packet.payload)
            self._of_node[packet.node] -= 1
            if not self._of_node[packet.node]:
                del self._of_node[packet.node]
            self._in_hand.append(packet)

    def _answer(self, answers: _Answers, fleet: int) -> None:
        for node in {**answers.done, **answers.refused}:
            done, refused = iter(answers.done.get(node, ())), iter(answers.refused.get(node, {}).items())
            while True:
                some = dict(islice(refused, MAX_ACK_IDS))
                ids = tuple(islice(done, MAX_ACK_IDS - len(some)))
                if not ids and not some:
                    break
                self._link.publish(down(node, "ack"), encode(Ack(ids=ids, refused=some, fleet=fleet)))
                self.counts["acks"] += 1

    # --- in a thread --------------------------------------------------------------------------------------------

    def _store(self, batch: Sequence[Packet]) -> _Answers:
        """All in one transaction. What makes a transaction fail for a reason of its own is found and put aside alone."""
        try:
            return self._transact(batch)
        except TryAgain:
            raise
        except Exception:
            log.exception("a batch of events could not be stored; its packets are tried one by one")
        answers = _Answers()
        for packet in batch:
            for part in self._store_alone(packet):
                for node, ids in part.done.items():
                    answers.done.setdefault(node, {}).update(ids)
                for node, refused in part.refused.items():
                    answers.refused.setdefault(node, {}).update(refused)
                answers.counts.update(part.counts)
        return answers

    def _store_alone(self, packet: Packet) -> Iterator[_Answers]:
        try:
            yield self._transact([packet])
        except TryAgain:
            raise
        except Exception as error:
            log.exception("a packet of %s could not be stored", packet.node)
            answers = _Answers()
            with self._storage.write() as records:
                self._put_aside(records.events, packet, f"the hub failed: {type(error).__name__}", answers)
                records.events.count(answers.counts)
            yield answers

    def _transact(self, batch: Sequence[Packet]) -> _Answers:
        answers = _Answers()
        if batch:
            with self._storage.write() as records:
                for packet in batch:
                    self._take_in(records.events, packet, answers)
                records.events.count(answers.counts)
        return answers

    def _take_in(self, records: EventRecords, packet: Packet, answers: _Answers) -> None:
        try:
            content = unpack(packet.payload)
        except Malformed as error:
            self._put_aside(records, packet, str(error), answers)
            return
        stream = heed(records.stream(packet.node), content)
        records.put_stream(packet.node, stream)
        events = list(self._readable(records, packet, content, answers))
        known = records.known(packet.node, [event.id for event in events])
        done = answers.done.setdefault(packet.node, {})
        for event in events:
            if event.id in known or stream.is_late(event.seq):
                answers.counts[packet.node, event.kind, "duplicates"] += 1
                done[event.id] = None
            elif self._apply(records, packet, event, stream, answers):
                known.add(event.id)
                done[event.id] = None

    def _apply(self, records: EventRecords, packet: Packet, event: Event, stream: Stream, answers: _Answers) -> bool:
        effect = self._effects.get(event.kind)
        try:
            if effect is not None:
                effect(records, packet.node, event)
        except SQLAlchemyError:
            raise
        except Exception as error:
            if not isinstance(error, Malformed):
                log.exception("the effect of an event of kind %s failed", event.kind)
            self._refuse(records, packet, event.id, event.kind, str(error) or type(error).__name__, event.body, answers)
            return False
        records.add(packet.node, event, packet.at)
        answers.counts[packet.node, event.kind, "received"] += 1
        return True

    def _readable(
        self, records: EventRecords, packet: Packet, content: EventPacket, answers: _Answers
    ) -> Iterator[Event]:
        for raw in content.events:
            try:
                yield unpack_event(raw)
            except Malformed as error:
                found = salvage(raw)
                self._refuse(records, packet, found.id, found.kind, str(error), bytes(raw), answers)

    def _refuse(
        self,
        records: EventRecords,
        packet: Packet,
        id_: str,
        kind: str,
        reason: str,
        content: bytes,
        answers: _Answers,
    ) -> None:
        records.add_dead_letter(packet.node, packet.at, reason, content)
        answers.counts[packet.node, kind, "dead_letters"] += 1
        if id_:
            answers.refused.setdefault(packet.node, {})[id_] = reason[:MAX_REASON_CHARS]

    def _put_aside(self, records: EventRecords, packet: Packet, reason: str, answers: _Answers) -> None:
        self._refuse(records, packet, "", "", reason, packet.payload, answers)

    def _prune(self) -> bool:
        """Whether there may be more to forget."""
        wall, monotonic = self._began
        # A clock that is set ahead makes nothing old.
        before = min(self._clock.wall(), wall + self._clock.monotonic() - monotonic) - RETENTION_SECONDS
        with self._storage.read() as records:
            crowded = records.events.crowded(MAX_EVENTS)
        steps: deque[Callable[[EventRecords], bool]] = deque(
            partial(EventRecords.prune_node, node=node, last=last, last_id=last_id, limit=PRUNE_BATCH)
            for node, (last, last_id) in crowded.items()
        )
        steps.append(partial(EventRecords.prune_received_before, before=before, limit=PRUNE_BATCH))
        for _ in range(PRUNE_BATCHES):
            if not steps:
                break
            with self._storage.write() as records:
                if not steps[0](records.events):
                    steps.popleft()
        return bool(steps)
