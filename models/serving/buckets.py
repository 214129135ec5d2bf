"""Token buckets, and a bounded number of them: who has asked how much lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


SLACK_SECONDS = 1e-6
"""Sums of a machine's uptime and small intervals are this exact; without it a burst would be one short now and then."""


class Bucket:
    """`rate` requests a second on average, up to `burst` at once (None = one second's worth).

    Kept as one number, the time at which the bucket will be full again (GCRA, ITU-T I.371): nothing has to refill it.
    """

    __slots__ = ("_full_at", "_interval", "_tolerance", "rate")

    def __init__(self, rate: float, burst: int | None = None) -> None:
        self.rate = rate
        self._interval = 1.0 / rate
        room = self._interval * ((ceil(rate) if burst is None else burst) - 1)
        self._tolerance = room + min(SLACK_SECONDS, self._interval / 2)
        self._full_at = 0.0

    def take(self, now: float) -> float:
        """Take one and return 0.0, or take none and return the seconds after which there will be one."""
        full_at = self._full_at
        if full_at <= now:
            self._full_at = now + self._interval
            return 0.0
        wait = full_at - now - self._tolerance
        if wait > 0.0:
            return wait + SLACK_SECONDS
        self._full_at = full_at + self._interval
        return 0.0

    def is_empty(self, now: float) -> bool:
        return self._full_at - now > self._tolerance


class Recent(Generic[K, V]):
    """The `capacity` values that were used last; one that is not among them is made anew.

    For buckets that is almost lossless: one not used for longer than it takes to fill is as good as new.
    """

    __slots__ = ("_capacity", "_kept", "_make")

    def __init__(self, make: Callable[[K], V], capacity: int) -> None:
        self._make = make
        self._capacity = capacity
        self._kept: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, key: K) -> V:
        kept = self._kept
        value = kept.get(key)
        if value is not None:
            kept.move_to_end(key)
            return value
        value = kept[key] = self._make(key)
        if len(kept) > self._capacity:
            kept.popitem(last=False)
        return value

    def known(self, key: K) -> V | None:
        """The value, if there is one; not counted as a use."""
        return self._kept.get(key)
