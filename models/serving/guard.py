"""Refuses what is too much before it costs anything: per client, per tenant and in all. A Predictor around another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from models.errors import Overloaded
from models.serving.access.settings import NO_SETTINGS, Settings
from models.serving.buckets import Bucket, Recent
from models.serving.caller import Caller
from models.serving.predictor import InferRequest, InferResponse, Predictor

MAX_CLIENTS = 16_384
"""Clients whose buckets are kept, the latest; some 5 MB."""
BUSY_RETRY_SECONDS = 0.25
"""When to come back after a limit on requests in work: nobody knows when one of them ends."""


class SettingsSource(Protocol):
    """Where the limits come from. Another object in `settings` = new limits, in force with the next request."""

    @property
    def settings(self) -> Settings: ...


class NoLimits:
    settings = NO_SETTINGS


class _Allowance:
    """What one client may do. `concurrency`: of its whole tenant."""

    __slots__ = ("bucket", "concurrency")

    def __init__(self, bucket: Bucket | None, concurrency: int | None) -> None:
        self.bucket = bucket
        self.concurrency = concurrency


class Guard:
    """Raises Overloaded when a client asks too often (`retry_after` says exactly when it may again), a tenant has too many
    requests in work, or the server has.

    Callers without a name share one bucket. With no limits configured it counts what is in work and costs 0.2 us.
    `in_flight`: requests in work now; `rejected_rate`, `rejected_concurrency`: refused since the process began.
    `clock`: monotonic seconds.
    """

    def __init__(
        self, inner: Predictor, source: SettingsSource | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.in_flight = 0
        self.rejected_rate = 0
        self.rejected_concurrency = 0
        self._inner = inner
        self._source = source or NoLimits()
        self._clock = clock
        self._of_tenant: dict[str | None, int] = {}  # in work; those with none are left out
        self._apply(self._source.settings)

    async def infer(self, request: InferRequest) -> InferResponse:
        settings = self._source.settings
        if settings is not self._settings:
            self._apply(settings)
        if not self._checks:
            self.in_flight += 1
            try:
                return await self._inner.infer(request)
            finally:
                self.in_flight -= 1
        self._admit(request)
        if self._default_deadline is not None and request.deadline is None:
            request = replace(request, deadline=self._clock() + self._default_deadline)
        tenant, counts = request.tenant, self._of_tenant
        counts[tenant] = counts.get(tenant, 0) + 1
        self.in_flight += 1
        try:
            return await self._inner.infer(request)
        finally:
            self.in_flight -= 1
            left = counts[tenant] - 1
            if left:
                counts[tenant] = left
            else:
                del counts[tenant]

    def _admit(self, request: InferRequest) -> None:
        if self._max_in_flight is not None and self.in_flight >= self._max_in_flight:
            self.rejected_concurrency += 1
            raise Overloaded(f"this server has {self._max_in_flight} requests in work, its limit", BUSY_RETRY_SECONDS)
        if not self._limited:
            return
        allowance = self._allowances[request.tenant, request.client]
        limit = allowance.concurrency
        if limit is not None and self._of_tenant.get(request.tenant, 0) >= limit:
            self.rejected_concurrency += 1
            raise Overloaded(f"the tenant has {limit} requests in work, its limit", BUSY_RETRY_SECONDS)
        # Last: a request refused for another reason takes nothing out of the bucket.
        self._take(allowance.bucket)

    def admit(self, caller: Caller) -> None:
        """Count a request of `caller` that infers nothing now: a job handed in or asked for. Raises Overloaded."""
        settings = self._source.settings
        if settings is not self._settings:
            self._apply(settings)
        if self._limited:
            self._take(self._allowances[caller.tenant, caller.client].bucket)

    def _take(self, bucket: Bucket | None) -> None:
        if bucket is None:
            return
        wait = bucket.take(self._clock())
        if wait:
            self.rejected_rate += 1
            raise Overloaded(f"this client may ask {bucket.rate:g} times a second: again in {wait:.3f} s", wait)

    def _apply(self, settings: Settings) -> None:
        self._settings = settings
        self._limited = settings.is_limited
        self._max_in_flight = settings.max_in_flight
        deadline = settings.default_deadline_ms
        self._default_deadline = None if deadline is None else deadline / 1e3
        self._checks = self._limited or self._max_in_flight is not None or deadline is not None
        self._allowances: Recent[tuple[str | None, str | None], _Allowance] = Recent(self._allowance_of, MAX_CLIENTS)

    def _allowance_of(self, key: tuple[str | None, str | None]) -> _Allowance:
        limits = self._settings.limits(*key)
        bucket = None if limits.rate is None else Bucket(limits.rate, limits.burst)
        return _Allowance(bucket, limits.concurrency)
