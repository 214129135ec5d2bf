"""What a router believes about the tier above: how long it takes, and whether to stop asking for a while.

Constants and shapes: mean and mean absolute deviation as TCP keeps them for its retransmission timer (RFC 6298), with
gains of 1/10 and 1/5; the breaker counts misses in a row. Time comes in as monotonic seconds, so tests need no clock.
"""

from __future__ import annotations

GAIN_MEAN = 0.1
GAIN_DEV = 0.2
STALE_SECONDS = 10.0
"""An estimate this old says nothing about now: it falls back to its prior."""
MISSES_TO_OPEN = 5
"""Misses in a row before the tier above is left alone. One lost packet must not open it, a dead tier must cost few waits."""
PROBE_FIRST_SECONDS = 0.25
PROBE_EVERY_SECONDS = 0.5
IDLE_PING_SECONDS = 1.0
"""An arm that carries no traffic is pinged this often: without it a fault freezes the estimate and nobody returns after the
repair."""


class Estimate:
    """Exponentially weighted mean and mean absolute deviation of a duration, in seconds."""

    __slots__ = ("_dev", "_mean", "_prior", "_updated")

    def __init__(self, mean: float, dev: float) -> None:
        self._prior = (mean, dev)
        self._mean, self._dev = mean, dev
        self._updated: float | None = None

    def add_late(self, waited: float, now: float) -> None:
        """Learn that it took longer than `waited`, when we gave up. Pushes the estimate up, never down."""
        mean, dev = self.get(now)
        self.add(max(waited, mean + dev), now)

    def add(self, seconds: float, now: float) -> None:
        """Learn one duration."""
        if self._updated is None or now - self._updated > STALE_SECONDS:
            self._mean, self._dev = self._prior
        self._dev += GAIN_DEV * (abs(seconds - self._mean) - self._dev)
        self._mean += GAIN_MEAN * (seconds - self._mean)
        self._updated = now

    def get(self, now: float) -> tuple[float, float]:
        """(mean, deviation) in seconds."""
        if self._updated is None or now - self._updated > STALE_SECONDS:
            return self._prior
        return self._mean, self._dev


class Breaker:
    """Closed: requests pass. Open: they do not; probes find out when to close it. User traffic is never the probe.

    An error (refused, reset, not ready) is evidence against the tier above. An answer that did not come by a caller's own
    deadline is not: the caller may have been in a hurry. A row of those only asks for a probe, which then decides.
    """

    __slots__ = ("_late", "_misses", "_next_probe", "_open", "_touched")

    def __init__(self) -> None:
        self._misses = 0
        self._late = 0
        self._open = False
        self._next_probe = 0.0
        self._touched = float("-inf")

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def is_suspect(self) -> bool:
        """Enough callers in a row were not answered in time: a probe is due now."""
        return self._late >= MISSES_TO_OPEN

    def succeed(self, now: float) -> bool:
        """Count an answer, from a request or a probe. True when this closed the breaker."""
        self._misses = self._late = 0
        self._touched = now
        closed, self._open = self._open, False
        return closed

    def late(self, now: float) -> bool:
        """Count a request that its own deadline ended. True when this makes a probe due."""
        self._late += 1
        self._touched = now
        return self._late == MISSES_TO_OPEN

    def miss(self, now: float) -> bool:
        """Count an error of a request or a probe. True when this opened the breaker."""
        self._misses += 1
        self._touched = now
        if self._open:
            self._next_probe = now + PROBE_EVERY_SECONDS
            return False
        return self._open_if(self._misses >= MISSES_TO_OPEN, now)

    def probe_missed(self, now: float) -> bool:
        """Count a probe without an answer: under suspicion that is proof enough. True when this opened the breaker."""
        suspect, self._late = self.is_suspect, 0
        return self.miss(now) or self._open_if(suspect and not self._open, now)

    def seconds_to_probe(self, now: float) -> float:
        """How long until the tier above should be pinged: at once when suspect, soon while open, once a second while idle."""
        if self._open:
            return max(self._next_probe - now, 0.0)
        return 0.0 if self.is_suspect else max(self._touched + IDLE_PING_SECONDS - now, 0.0)

    def _open_if(self, enough: bool, now: float) -> bool:
        if enough:
            self._open = True
            self._next_probe = now + PROBE_FIRST_SECONDS
        return enough
