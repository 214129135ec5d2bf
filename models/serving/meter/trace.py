"""Traces: W3C trace context in and out, one light span per request worth keeping, a ring of the last ones. No I/O here.

Sources: W3C Trace Context level 2; sampling by the trace id's last 56 random bits is OpenTelemetry's "consistent probability
sampling", so that tiers with the same rate keep the same traces.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf, log
from random import Random
from typing import NamedTuple

RING = 2_000
"""Spans that are remembered for who looks at them."""
KEPT_PER_SECOND = 50
"""Most spans a second that are kept for having gone wrong: an overload must not become one of the tracing too."""
_RANDOM_BITS = 56

# Level 2, 2.2: lower case, all-zero ids are invalid, version ff is forbidden; a later version may have more after it.
_VALID = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_LENGTH = 55


def parse(header: str) -> tuple[str, str, bool] | None:
    """(trace id, parent span id, sampled) of a traceparent; None for one that is not valid."""
    match = _VALID.match(header)
    if match is None or (len(header) != _LENGTH and (header[:2] == "00" or header[_LENGTH] != "-")):
        return None
    trace, parent, flags = match.groups()
    return trace, parent, bool(int(flags[1], 16) & 1)


class Context(NamedTuple):
    """Where a request stands in its trace. `span`: of this server; `parent`: who asked, "" = it began here."""

    trace: str
    span: str
    parent: str
    sampled: bool

    @property
    def header(self) -> str:
        """The traceparent for the next hop, and for the answer."""
        return f"00-{self.trace}-{self.span}-{'01' if self.sampled else '00'}"


class Span(NamedTuple):
    """One request at this server. `start`: nanoseconds of the epoch; `seconds`, `queue`, `compute`: durations, None = unknown.

    `error`: as in the metric inference.request.errors, "" = answered.
    """

    context: Context
    start: int
    seconds: float
    model: str
    version: str
    tier: str
    reason: str
    error: str = ""
    degraded: bool = False
    queue: float | None = None
    compute: float | None = None


class Tracer:
    """Decides which requests are traced, and keeps their spans.

    `rate`: share 0..1 of the traces that are sampled, beside those whose caller did so. `export`: told each span that is
    sampled, or that went wrong, None = nobody. `clock`: monotonic seconds; `wall`: nanoseconds of the epoch. Belongs to the
    event loop's thread.
    """

    def __init__(
        self,
        *,
        rate: float = 0.01,
        export: Callable[[Span], None] | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"the sampling rate {rate} is not between 0 and 1")
        self._rate = rate
        self._threshold = round((1.0 - rate) * (1 << _RANDOM_BITS))
        self._export = export
        self._random = random or Random()  # noqa: S311 - ids that collide are an inconvenience, no danger
        self._clock = clock
        self._wall = wall
        self._ring: deque[Span] = deque(maxlen=RING)
        self._second = -inf
        self._kept = 0
        self.untraced = self._gap()

    def recent(self) -> Sequence[Span]:
        """The spans remembered, oldest first."""
        return tuple(self._ring)

    def join(self, header: str) -> Context:
        """The place of a request that came with a traceparent; one that is not valid is replaced."""
        found = parse(header)
        if found is None:
            return self.begin(self._random.getrandbits(128))
        trace, parent, sampled = found
        return Context(trace, self._span_id(), parent, sampled or self._samples(int(trace[-14:], 16)))

    def begin(self, number: int) -> Context:
        """A new trace with this id."""
        return Context(f"{number or 1:032x}", self._span_id(), "", self._samples(number & ((1 << _RANDOM_BITS) - 1)))

    def sample(self) -> Context:
        """A new trace that is sampled, for the request at which `untraced` has come down to zero."""
        self.untraced = self._gap()
        low = self._random.randrange(self._threshold, 1 << _RANDOM_BITS)
        return self.begin(self._random.getrandbits(128 - _RANDOM_BITS) << _RANDOM_BITS | low)

    def keep(self, span: Span, *, wrong: bool) -> None:
        """Remember a span that has just ended; export it when it is sampled, or went wrong."""
        self._ring.append(span)
        if self._export is not None and (span.context.sampled or wrong):
            self._export(span)

    def catch(self) -> Context | None:
        """A new trace for a request that went wrong and had none; None when there were enough of those this second."""
        now = self._clock()
        if now - self._second >= 1.0:
            self._second, self._kept = now, 0
        if self._kept >= KEPT_PER_SECOND:
            return None
        self._kept += 1
        return self.begin(self._random.getrandbits(128))

    def started(self, seconds: float) -> int:
        """When what has just ended after `seconds` began, in nanoseconds of the epoch."""
        return self._wall() - int(seconds * 1e9)

    def _samples(self, bits: int) -> bool:
        return bits >= self._threshold

    def _span_id(self) -> str:
        return f"{self._random.getrandbits(64) or 1:016x}"

    def _gap(self) -> float:
        """Requests until the next one that is sampled: drawn at once, so that the others need no dice."""
        if self._rate == 0.0:
            return inf
        if self._rate == 1.0:
            return 1
        return 1 + int(log(1.0 - self._random.random()) / log(1.0 - self._rate))
