"""When a call may be tried again, and after which pause. Only if asked for: by default a refusal is the caller's to see."""

from __future__ import annotations

import random
import threading

import msgspec

from models.errors import DeadlineExceeded, Overloaded, TierlineError, TryAgain

RESERVE = 10.0
"""Retries that may be made beyond the share of calls: enough for a short outage, too few to feed an overload."""


class Retries(msgspec.Struct, frozen=True):
    """`most`: tries after the first, of one call. `share`: of all calls, how many may be tries again over time; together with
    a reserve of ten it keeps many clients from multiplying the load of a server that is down on its knees already.
    `pause`, `longest_pause`: seconds; the pause is drawn from 0 to `pause` x 2^tries ("full jitter"; M. Brooker, Exponential
    Backoff And Jitter), except when the server said when to come back: then not before, and up to a quarter later.
    """

    most: int = 2
    share: float = 0.1
    pause: float = 0.05
    longest_pause: float = 2.0


class RetryBudget:
    """Decides for all calls of one client; from any thread."""

    def __init__(self, retries: Retries, *, chance: random.Random | None = None) -> None:
        self._retries = retries
        self._chance = chance or random.Random()  # noqa: S311 - spreads load, keeps no secret
        self._left = RESERVE
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A call is made for the first time."""
        with self._lock:
            self._left = min(self._left + self._retries.share, RESERVE)

    def pause(self, tried: int, error: TierlineError, remaining: float) -> float | None:
        """Seconds to wait before the next try, None = `error` is the answer.

        `tried`: tries that were made after the first. `remaining`: seconds to the call's deadline; a pause that would use it
        up is not made.
        """
        retries = self._retries
        if tried >= retries.most or not isinstance(error, TryAgain) or isinstance(error, DeadlineExceeded):
            return None
        if isinstance(error, Overloaded):
            pause = error.retry_after * self._chance.uniform(1.0, 1.25)
        else:
            pause = self._chance.uniform(0.0, min(retries.longest_pause, retries.pause * 2.0**tried))
        if pause >= remaining:
            return None
        with self._lock:
            if self._left < 1.0:
                return None
            self._left -= 1.0
        return pause
