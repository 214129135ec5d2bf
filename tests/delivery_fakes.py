"""A node's side of the control plane and its mirror, as far as they count anything."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any


class FakeDelivery:
    """`member` and `mirror`, as `watch_member` and `watch_mirror` take them. `move` changes every number."""

    def __init__(self, outbox: Any) -> None:
        self.report = SimpleNamespace(state="idle", revision=0, applied=0, attempts=0)
        self.refusals: Counter[str] = Counter()
        self.status = SimpleNamespace(fresh_until=100.0, last_refresh=10.0, now=20.0, version=1)
        self.refreshes: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.traffic = SimpleNamespace(
            files=Counter(),
            failures=Counter(),
            attempts=Counter(),
            refused_deltas=0,
            saved=0,
            received=lambda: self.received,
        )
        self.usage = SimpleNamespace(total=0, needed=0, free=0)
        self.sweeper = SimpleNamespace(
            quota=SimpleNamespace(max_bytes=0, cache_bytes=0), latest=None, removed=0, removed_bytes=0, usage=self._look
        )
        self.turned_away: Counter[str] = Counter()
        self.mirror = SimpleNamespace(counts=Counter(), sent=0, downloads=0, refusals=lambda: self.turned_away)
        self.member: Any = SimpleNamespace(
            outbox=outbox,
            updaters={"desired": SimpleNamespace(report=self.report, refusals=self.refusals)},
            packages=SimpleNamespace(refreshes=self.refreshes, status=lambda: self.status),
            fetcher=SimpleNamespace(traffic=self.traffic),
            sweeper=self.sweeper,
        )

    async def _look(self) -> Any:
        self.sweeper.latest = self.usage
        return self.usage

    def move(self) -> None:
        self.report.state = "applied"
        self.status.now += 1
        self.status.version += 1
        for part in (self.report, self.traffic, self.usage, self.sweeper, self.sweeper.quota, self.mirror):
            for name, value in vars(part).items():
                if isinstance(value, int):
                    setattr(part, name, value + 1)
        counts = (self.refusals, self.refreshes, self.received, self.turned_away, self.mirror.counts)
        for counter in (*counts, self.traffic.files, self.traffic.failures, self.traffic.attempts):
            for name in ("whole", "good", "unavailable", "slots", "hits", "misses", "fetched"):
                counter[name] += 1
