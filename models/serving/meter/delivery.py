"""What components of delivery count for themselves, shown as metrics. Structural: a node's parts fit, whoever makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from models.serving.meter.registry import OTHER, Registry
from models.serving.meter.sources import OutboxNumbers, watch_outbox

STATES = (
    "idle",
    "verifying",
    "fetching",
    "waiting",
    "held",
    "preparing",
    "committing",
    "probation",
    "applied",
    "refused",
    "failed",
    "rolled_back",
)
WAYS = ("whole", "resumed", "delta", "blocks", "medium", "metadata")
CODES = (
    "malformed",
    "bad_signature",
    "wrong_scope",
    "expired",
    "replayed",
    "not_listed",
    "digest_mismatch",
    "rejected",
    "unavailable",
    "store_failed",
)
"""Of errors; one that is not among them is shown as `other`."""
SOURCE_CODES = ("unavailable", "absent", "busy", "digest_mismatch", "store_failed")
REJECTED = ("bytes", "device_slots", "slots", "coming", "busy")


class ReportNumbers(Protocol):
    """`revision`: the newest accepted; `applied`: in force."""

    @property
    def state(self) -> str: ...
    @property
    def revision(self) -> int: ...
    @property
    def applied(self) -> int: ...
    @property
    def attempts(self) -> int: ...


class UpdaterNumbers(Protocol):
    """Keeps one kind of document in force. `refusals`: error code -> how many."""

    @property
    def report(self) -> ReportNumbers: ...
    @property
    def refusals(self) -> Mapping[str, int]: ...


class MetadataStatus(Protocol):
    """Unix seconds, 0 = never; `now` as the node counts them."""

    @property
    def fresh_until(self) -> float: ...
    @property
    def last_refresh(self) -> float: ...
    @property
    def now(self) -> float: ...
    @property
    def version(self) -> int: ...


class PackagesNumbers(Protocol):
    """The update repository's metadata. `refreshes`: `good` or error code -> how many."""

    @property
    def refreshes(self) -> Mapping[str, int]: ...
    def status(self) -> MetadataStatus: ...


class TrafficNumbers(Protocol):
    """`files` by way; `failures`, `attempts` by error code; `saved`: bytes."""

    @property
    def files(self) -> Mapping[str, int]: ...
    @property
    def failures(self) -> Mapping[str, int]: ...
    @property
    def attempts(self) -> Mapping[str, int]: ...
    @property
    def refused_deltas(self) -> int: ...
    @property
    def saved(self) -> int: ...
    def received(self) -> Mapping[str, int]: ...


class FetcherNumbers(Protocol):
    """What brings files."""

    @property
    def traffic(self) -> TrafficNumbers: ...


class UsageNumbers(Protocol):
    """Bytes."""

    @property
    def total(self) -> int: ...
    @property
    def needed(self) -> int: ...
    @property
    def free(self) -> int: ...


class QuotaNumbers(Protocol):
    """Bytes; `max_bytes`: None = no limit."""

    @property
    def max_bytes(self) -> int | None: ...
    @property
    def cache_bytes(self) -> int: ...


class SweeperNumbers(Protocol):
    """`latest`: what `usage`, which reads the disk, last said. `removed`: files; `removed_bytes`: what they took."""

    @property
    def quota(self) -> QuotaNumbers: ...
    @property
    def latest(self) -> UsageNumbers | None: ...
    @property
    def removed(self) -> int: ...
    @property
    def removed_bytes(self) -> int: ...
    async def usage(self) -> UsageNumbers: ...


class MirrorNumbers(Protocol):
    """`counts`: hits, misses, fetched. `refusals`: reason -> how many. `sent`: bytes; `downloads`: under way."""

    @property
    def counts(self) -> Mapping[str, int]: ...
    @property
    def sent(self) -> int: ...
    @property
    def downloads(self) -> int: ...
    def refusals(self) -> Mapping[str, int]: ...


class MemberNumbers(Protocol):
    """A node's side of the control plane. `updaters`: by kind of document, a closed list."""

    @property
    def outbox(self) -> OutboxNumbers: ...
    @property
    def updaters(self) -> Mapping[str, UpdaterNumbers]: ...
    @property
    def packages(self) -> PackagesNumbers: ...
    @property
    def fetcher(self) -> FetcherNumbers: ...
    @property
    def sweeper(self) -> SweeperNumbers: ...


def watch_member(registry: Registry, member: MemberNumbers) -> None:
    """All that an edge node and a cloud worker have in common."""
    watch_outbox(registry, member.outbox)
    for kind, updater in member.updaters.items():
        watch_updater(registry, kind, updater)
    watch_metadata(registry, member.packages)
    watch_traffic(registry, member.fetcher.traffic)
    watch_store(registry, member.sweeper)


def watch_updater(registry: Registry, kind: str, updater: UpdaterNumbers) -> None:
    for state in STATES:
        registry.read("update.document.state", partial(_is_in, updater, state), kind=kind, state=state)
    registry.read("update.document.revision", lambda: updater.report.revision, kind=kind)
    registry.read("update.document.applied", lambda: updater.report.applied, kind=kind)
    registry.read("update.document.attempts", lambda: updater.report.attempts, kind=kind)
    _by_label(registry, "update.document.refusals", lambda: updater.refusals, "reason", CODES, kind=kind)


def watch_metadata(registry: Registry, packages: PackagesNumbers) -> None:
    registry.read("update.metadata.remaining", lambda: _remaining(packages.status()))
    registry.read("update.metadata.age", lambda: _age(packages.status()))
    registry.read("update.metadata.version", lambda: packages.status().version)
    _by_label(registry, "update.metadata.refreshes", lambda: packages.refreshes, "outcome", ("good", "absent", *CODES))


def watch_traffic(registry: Registry, traffic: TrafficNumbers) -> None:
    _by_label(registry, "delivery.file.count", lambda: traffic.files, "way", WAYS[:-1])
    _by_label(registry, "delivery.received", traffic.received, "way", WAYS)
    _by_label(registry, "delivery.file.errors", lambda: traffic.failures, "reason", SOURCE_CODES)
    _by_label(registry, "delivery.attempt.errors", lambda: traffic.attempts, "reason", SOURCE_CODES)
    registry.read("delivery.delta.refused", lambda: traffic.refused_deltas)
    registry.read("delivery.delta.saved", lambda: traffic.saved)


def watch_store(registry: Registry, sweeper: SweeperNumbers) -> None:
    registry.before_scrape(sweeper.usage)
    registry.read("store.size", lambda: sweeper.latest.total if sweeper.latest else None)
    registry.read("store.needed", lambda: sweeper.latest.needed if sweeper.latest else None)
    registry.read("store.disk.free", lambda: sweeper.latest.free if sweeper.latest else None)
    registry.read("store.size.limit", lambda: sweeper.quota.max_bytes)
    registry.read("store.cache.limit", lambda: sweeper.quota.cache_bytes)
    registry.read("store.file.removals", lambda: sweeper.removed)
    registry.read("store.removed", lambda: sweeper.removed_bytes)


def watch_mirror(registry: Registry, mirror: MirrorNumbers) -> None:
    registry.read("mirror.file.lookups", lambda: mirror.counts.get("hits", 0), outcome="hit")
    registry.read("mirror.file.lookups", lambda: mirror.counts.get("misses", 0), outcome="miss")
    registry.read("mirror.file.fetched", lambda: mirror.counts.get("fetched", 0))
    registry.read("mirror.file.sent", lambda: mirror.sent)
    registry.read("mirror.download.active", lambda: mirror.downloads)
    _by_label(registry, "mirror.request.rejected", mirror.refusals, "reason", REJECTED)


def _by_label(
    registry: Registry,
    name: str,
    counts: Callable[[], Mapping[str, int]],
    label: str,
    values: tuple[str, ...],
    **labels: str,
) -> None:
    """A series for each of `values`, from the start on, and one for all others."""
    for value in values:
        registry.read(name, partial(_one_of, counts, value), **labels, **{label: value})
    registry.read(name, partial(_rest_of, counts, values), **labels, **{label: OTHER})


def _one_of(counts: Callable[[], Mapping[str, int]], value: str) -> int:
    return counts().get(value, 0)


def _rest_of(counts: Callable[[], Mapping[str, int]], values: tuple[str, ...]) -> int:
    return sum(count for value, count in counts().items() if value not in values)


def _is_in(updater: UpdaterNumbers, state: str) -> int:
    return int(updater.report.state == state)


def _age(status: MetadataStatus) -> float | None:
    return status.now - status.last_refresh if status.last_refresh else None


def _remaining(status: MetadataStatus) -> float | None:
    return status.fresh_until - status.now if status.fresh_until else None
