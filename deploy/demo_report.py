"""What the demo measured: one record per request, figures and checks made from them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TIERS = ("device", "edge", "cloud")
MIN_IN_TIME = 0.995
MAX_POLICY_MS = 50.0
SLACK_SAMPLES = 3
"""How many held-out samples the cascade may lose against the edge model alone."""


@dataclass(frozen=True)
class Served:
    """One request through the SDK. `label`: what the picture shows; `guess`: what was answered, None = no answer."""

    index: int
    label: int
    guess: int | None
    tier: str = ""
    reason: str = ""
    degraded: bool = False
    latency_ms: float = 0.0
    lag_ms: float = 0.0
    error: str = ""


@dataclass
class Results:
    """Everything the demo reports. Filled step by step, written as JSON at the end."""

    deadline_ms: float
    models: dict[str, float] = field(default_factory=dict)
    cascade: list[Served] = field(default_factory=list)
    paused: list[Served] = field(default_factory=list)
    during_rollout: list[Served] = field(default_factory=list)
    first_answer_seconds: float = 0.0
    policy_applied_ms: float = 0.0
    edge_served_while_hub_down: bool = False
    rollout_v2_seconds: float = 0.0
    tampered_refused: bool = False
    tampered_reason: str = ""
    total_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "models": {tier: {"accuracy": value} for tier, value in self.models.items()},
            "tiers": {tier: tier_figures(self.cascade, tier) for tier in TIERS},
            "cascade_accuracy": accuracy(self.cascade),
            "unanswered": unanswered(self.everything),
            "in_time_share": in_time_share(self.cascade, self.deadline_ms),
            "deadline_ms": self.deadline_ms,
            "misses": [_miss(one) for one in self.everything if not in_time(one, self.deadline_ms)],
            "policy_applied_ms": round(self.policy_applied_ms, 2),
            "cloud_paused": {
                "requests": len(self.paused),
                "answered": len(self.paused) - unanswered(self.paused),
                "in_time_share": in_time_share(self.paused, self.deadline_ms),
                "degraded": sum(one.degraded for one in self.paused),
            },
            "edge_served_while_hub_down": self.edge_served_while_hub_down,
            "rollout_v2_seconds": round(self.rollout_v2_seconds, 2),
            "rollout_v2_requests": len(self.during_rollout),
            "tampered_refused": self.tampered_refused,
            "tampered_reason": self.tampered_reason,
            "first_answer_seconds": round(self.first_answer_seconds, 2),
            "total_seconds": round(self.total_seconds, 2),
        }

    @property
    def everything(self) -> list[Served]:
        return [*self.cascade, *self.paused, *self.during_rollout]


def accuracy(served: Sequence[Served]) -> float:
    """Share of requests answered with the right digit; an unanswered one is wrong."""
    return round(sum(one.guess == one.label for one in served) / len(served), 4) if served else 0.0


def unanswered(served: Iterable[Served]) -> int:
    return sum(one.guess is None for one in served)


def in_time(one: Served, deadline_ms: float) -> bool:
    return one.guess is not None and one.latency_ms <= deadline_ms


def in_time_share(served: Sequence[Served], deadline_ms: float) -> float:
    return round(sum(in_time(one, deadline_ms) for one in served) / len(served), 4) if served else 0.0


def tier_figures(served: Iterable[Served], tier: str) -> dict[str, float | int | None]:
    """Requests, accuracy, p50 and p99 in milliseconds of what `tier` answered; None where it answered nothing."""
    mine = [one for one in served if one.tier == tier]
    times = sorted(one.latency_ms for one in mine)
    return {
        "requests": len(mine),
        "accuracy": accuracy(mine) if mine else None,
        "p50_ms": percentile(times, 0.50),
        "p99_ms": percentile(times, 0.99),
    }


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile of ascending values."""
    if not ordered:
        return None
    rank = min(int(share * len(ordered)), len(ordered) - 1)
    return round(ordered[rank], 3)


def failures(found: Mapping[str, Any]) -> list[str]:
    """Every promise that the figures break, in words. Empty = all kept."""
    broken = [f"the {tier} tier answered nothing" for tier in TIERS if not found["tiers"][tier]["requests"]]
    floor = found["models"]["edge"]["accuracy"] - SLACK_SAMPLES / max(
        sum(found["tiers"][tier]["requests"] for tier in TIERS), 1
    )
    if found["cascade_accuracy"] < floor:
        broken.append(f"cascade accuracy {found['cascade_accuracy']} is below {floor:.4f}")
    if found["unanswered"]:
        broken.append(f"{found['unanswered']} requests were not answered")
    for what, share in (
        ("", found["in_time_share"]),
        (" with the cloud paused", found["cloud_paused"]["in_time_share"]),
    ):
        if share < MIN_IN_TIME:
            broken.append(f"only {share:.2%} of the answers{what} were in time")
    if not found["cloud_paused"]["degraded"]:
        broken.append("no answer was marked degraded with the cloud paused")
    if not 0 < found["policy_applied_ms"] < MAX_POLICY_MS:
        broken.append(f"the policy took {found['policy_applied_ms']} ms to apply")
    if not found["edge_served_while_hub_down"]:
        broken.append("the edge did not serve while the hub was down")
    if not found["tampered_refused"]:
        broken.append("the tampered version was not refused")
    return broken


def _miss(one: Served) -> dict[str, object]:
    return {
        "index": one.index,
        "latency_ms": round(one.latency_ms, 2),
        "loop_lag_ms": one.lag_ms,
        "tier": one.tier,
        "reason": one.reason,
        "error": one.error,
    }
