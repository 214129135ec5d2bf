"""What an outbox decides: what an event is worth, how much may wait, what is sent when. Pure; time and chance come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sync.channel import spread
from sync.events import (
    ALARM,
    MAX_PACKET_BYTES,
    MAX_PACKET_EVENTS,
    UPDATE,
    Event,
    EventPacket,
    pack,
    pack_event,
)

ROW_BYTES = 200
"""What a stored event takes beside its body: columns, two index entries, its share of a page."""
MAX_KINDS = 64
"""Streams of one node: each has its line in the ledger and its series among the metrics."""
WINDOW = 64
"""Events under way without acknowledgement. Without one, measured: 23,701 repetitions of 3,000 events, and never drained."""
RESEND_SECONDS = 4.0
"""First repetition; doubled each time."""
MAX_RESEND_SECONDS = 300.0
LONELY_AFTER = 2
"""Repetitions after which an event travels alone: one that a broker or a hub chokes on must not hold up its neighbours."""
MAX_FLEET = 1_000_000
PACKETS_PER_SECOND, PACKET_BURST = 80.0, 200.0
BYTES_PER_SECOND, BYTE_BURST = 768 * 1024.0, 512 * 1024.0
"""What goes out, repetitions included: less than a hub takes of one node. What is over is lost there and backed off here: a
window full of that, simulated, drained a backlog of 100,000 events in 22 minutes instead of 1."""

Uniform = Callable[[float, float], float]


@dataclass(frozen=True, slots=True)
class KindPolicy:
    """`priority`: 0..9, when the caller says none. `ttl`: seconds, None = for ever. `last`: dropped only when nothing else
    is left to drop, whatever its priority."""

    priority: int = 5
    ttl: float | None = None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Quota:
    """What may wait on the disk: bytes (bodies, `ROW_BYTES` each) and events. Above it the oldest of the lowest priority go."""

    bytes: int = 64 * 1024 * 1024
    rows: int = 100_000

    def exceeded(self, size: int, rows: int) -> bool:
        return size > self.bytes or rows > self.rows


@dataclass(frozen=True, slots=True)
class OutboxPolicy:
    """All settings of one outbox. `kinds`: the kinds that differ from the plain `KindPolicy()`."""

    quota: Quota = field(default_factory=Quota)
    kinds: Mapping[str, KindPolicy] = field(
        default_factory=lambda: {ALARM: KindPolicy(9, None, True), UPDATE: KindPolicy(8, None, True)}
    )
    window: int = WINDOW

    def of(self, kind: str) -> KindPolicy:
        return self.kinds.get(kind, _PLAIN)


_PLAIN = KindPolicy()


def resend_delay(attempt: int, fleet: int, uniform: Uniform) -> float:
    """Seconds until what was sent `attempt` times is sent again: never less than `RESEND_SECONDS`, spread over the fleet."""
    base = min(RESEND_SECONDS * 2.0 ** min(attempt - 1, 16), MAX_RESEND_SECONDS)
    return uniform(base, 1.5 * base) + uniform(0.0, spread(fleet))


@dataclass(slots=True)
class _Flying:
    seq: int
    attempts: int
    due: float
    settling: bool = False


class Flight:
    """Events that were sent and are not settled yet. `resent` counts repetitions."""

    def __init__(self, window: int, uniform: Uniform) -> None:
        self.resent = 0
        self.fleet = 1
        self._window = window
        self._uniform = uniform
        self._flying: dict[str, _Flying] = {}

    def __len__(self) -> int:
        return len(self._flying)

    @property
    def free(self) -> int:
        """How many more may be sent."""
        return max(self._window - len(self._flying), 0)

    @property
    def seqs(self) -> frozenset[int]:
        return frozenset(item.seq for item in self._flying.values())

    def sent(self, events: Iterable[Event], now: float) -> None:
        for event in events:
            item = self._flying.get(event.id)
            if item is None:
                item = self._flying[event.id] = _Flying(event.seq, 0, 0.0)
            else:
                self.resent += 1
            item.attempts += 1
            item.due = now + resend_delay(item.attempts, self.fleet, self._uniform)

    def lonely(self, event: Event) -> bool:
        item = self._flying.get(event.id)
        return item is not None and item.attempts > LONELY_AFTER

    def settling(self, ids: Iterable[str]) -> None:
        """They were acknowledged; until the disk knows, they are neither repeated nor fetched again."""
        for id_ in ids:
            if id_ in self._flying:
                self._flying[id_].settling = True

    def settled(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            self._flying.pop(id_, None)

    def unsettled(self, ids: Iterable[str]) -> None:
        """The disk did not take it: they stay, and are sent again in time."""
        for id_ in ids:
            if id_ in self._flying:
                self._flying[id_].settling = False

    def keep_only(self, asked: Iterable[int], found: Iterable[int]) -> None:
        """Forget those asked for on the disk and not found there any more."""
        gone = set(asked) - set(found)
        self._flying = {id_: item for id_, item in self._flying.items() if item.seq not in gone}

    def clear(self) -> None:
        self._flying.clear()

    def due(self, now: float) -> list[int]:
        return [item.seq for item in self._flying.values() if item.due <= now and not item.settling]

    def next_due(self) -> float | None:
        return min((item.due for item in self._flying.values() if not item.settling), default=None)

    def postpone(self, now: float) -> None:
        """The link is back and repeats by itself what the broker had not taken: no second repetition at the same time."""
        for item in self._flying.values():
            item.due = max(item.due, now + resend_delay(1, self.fleet, self._uniform))

    def hasten(self, now: float) -> None:
        """Whoever acknowledges has come back: what was backed off for its sake is repeated soon, spread over the fleet."""
        for item in self._flying.values():
            item.attempts = min(item.attempts, 1)
            item.due = min(item.due, now + resend_delay(1, self.fleet, self._uniform))


@dataclass(slots=True)
class Allowance:
    """What may be sent right now. What has begun may go over it; then nothing is sent until that is made up for."""

    at: float
    packets: float = PACKET_BURST
    size: float = BYTE_BURST

    def wait(self, now: float) -> float:
        """Seconds until something may be sent, 0 = now."""
        passed = max(now - self.at, 0.0)
        self.at = now
        self.packets = min(self.packets + passed * PACKETS_PER_SECOND, PACKET_BURST)
        self.size = min(self.size + passed * BYTES_PER_SECOND, BYTE_BURST)
        return max((1.0 - self.packets) / PACKETS_PER_SECOND, -self.size / BYTES_PER_SECOND, 0.0)

    def spend(self, size: int) -> None:
        """A packet of `size` bytes went out."""
        self.packets, self.size = self.packets - 1, self.size - size


def packets(
    events: Sequence[Event], alone: Callable[[Event], bool], *, boot: str, starts: int, low: int
) -> list[tuple[bytes, Sequence[Event]]]:
    """Events in order, as few packets as fit."""
    groups: list[tuple[list[Event], int, bool]] = []
    for event in events:
        size, apart = len(event.body) + ROW_BYTES, alone(event)
        if groups and not apart and not groups[-1][2]:
            last, used, _ = groups[-1]
            if len(last) < MAX_PACKET_EVENTS and used + size <= MAX_PACKET_BYTES:
                last.append(event)
                groups[-1] = (last, used + size, False)
                continue
        groups.append(([event], size, apart))
    return [
        (pack(EventPacket(boot=boot, starts=starts, low=low, events=tuple(map(pack_event, group)))), group)
        for group, _, _ in groups
    ]
