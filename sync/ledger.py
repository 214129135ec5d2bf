"""The ledger of an outbox: enqueued = delivered + expired + dropped(reason) + pending, per stream, always. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

ENQUEUED, DELIVERED, EXPIRED, DROPPED = "enqueued", "delivered", "expired", "dropped"


@dataclass(frozen=True, slots=True)
class Stream:
    """What became of the events of one kind. `dropped`: reason -> how many."""

    enqueued: int = 0
    delivered: int = 0
    expired: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0

    @property
    def lost_count(self) -> int:
        """Events without a known end: 0 in a ledger that balances."""
        return self.enqueued - self.delivered - self.expired - sum(self.dropped.values()) - self.pending


@dataclass(frozen=True, slots=True)
class Ledger:
    """`streams`: by kind. `set_aside`: how often a damaged file was put away, with what it still held; those events are in no
    ledger any more."""

    streams: Mapping[str, Stream]
    set_aside: int = 0

    @property
    def imbalance(self) -> dict[str, int]:
        """kind -> events without a known end, of the streams that do not balance."""
        return {kind: stream.lost_count for kind, stream in self.streams.items() if stream.lost_count}

    def total(self) -> Stream:
        streams = self.streams.values()
        dropped: dict[str, int] = {}
        for stream in streams:
            for reason, count in stream.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        return Stream(
            sum(stream.enqueued for stream in streams),
            sum(stream.delivered for stream in streams),
            sum(stream.expired for stream in streams),
            dropped,
            sum(stream.pending for stream in streams),
        )


def ledger_of(counters: Iterable[tuple[str, str, str, int]], pending: Mapping[str, int], set_aside: int = 0) -> Ledger:
    """`counters`: (kind, what, reason, count)."""
    plain: dict[str, dict[str, int]] = {kind: {} for kind in pending}
    dropped: dict[str, dict[str, int]] = {}
    for kind, what, reason, count in counters:
        if what == DROPPED:
            reasons = dropped.setdefault(kind, {})
            reasons[reason] = reasons.get(reason, 0) + count
            plain.setdefault(kind, {})
        else:
            row = plain.setdefault(kind, {})
            row[what] = row.get(what, 0) + count
    return Ledger(
        {
            kind: Stream(
                row.get(ENQUEUED, 0),
                row.get(DELIVERED, 0),
                row.get(EXPIRED, 0),
                dict(sorted(dropped.get(kind, {}).items())),
                pending.get(kind, 0),
            )
            for kind, row in sorted(plain.items())
        },
        set_aside,
    )


def as_json(ledger: Ledger) -> dict[str, object]:
    """For programs; `imbalance` is empty when it balances."""
    return {
        "streams": {
            kind: {
                "enqueued": stream.enqueued,
                "delivered": stream.delivered,
                "expired": stream.expired,
                "dropped": dict(stream.dropped),
                "pending": stream.pending,
            }
            for kind, stream in ledger.streams.items()
        },
        "set_aside": ledger.set_aside,
        "imbalance": ledger.imbalance,
    }
