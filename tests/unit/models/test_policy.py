from __future__ import annotations

import json
from math import inf

import pytest

from models.errors import InvalidPolicy
from models.policy import (
    DEFAULT_RULE,
    Arm,
    Features,
    Policy,
    Reason,
    Rule,
    chance_in_time,
    choose,
    decode_policy,
    escalate,
    rule_for,
)

FAST_UP = Features(budget=1.0, up_mean=0.005, up_dev=0.001)


@pytest.mark.parametrize(
    ("rule", "features", "arm", "reason", "degraded"),
    [
        (Rule(), Features(has_here=False), Arm.UP, Reason.UPWARD, False),
        (Rule(), Features(has_up=False), Arm.HERE, Reason.LOCAL, False),
        (Rule(escalate=False, prefer="up"), FAST_UP, Arm.HERE, Reason.LOCAL, False),
        (Rule(), Features(breaker_open=True), Arm.HERE, Reason.CONFIDENT, False),
        (Rule(prefer="up"), FAST_UP, Arm.UP, Reason.UPWARD, False),
        (Rule(prefer="up"), Features(breaker_open=True), Arm.HERE, Reason.UP_UNREACHABLE, True),
        (Rule(prefer="up"), Features(budget=0.004, up_mean=0.02), Arm.HERE, Reason.NO_TIME, True),
        (Rule(prefer="auto", accuracy_up=0.99), FAST_UP, Arm.UP, Reason.UPWARD, False),
        (Rule(prefer="auto", price_up=0.5), FAST_UP, Arm.HERE, Reason.CONFIDENT, False),
        (Rule(prefer="auto"), Features(budget=0.01, up_mean=0.05), Arm.HERE, Reason.CONFIDENT, False),
    ],
)
def test_choose_puts_masks_before_utility(
    rule: Rule, features: Features, arm: Arm, reason: Reason, degraded: bool
) -> None:
    decision = choose(rule, features)
    assert (decision.arm, decision.reason, decision.degraded) == (arm, reason, degraded)


@pytest.mark.parametrize(
    ("rule", "features", "confidence", "arm", "reason", "degraded"),
    [
        (Rule(), FAST_UP, 0.95, Arm.HERE, Reason.CONFIDENT, False),
        (Rule(), FAST_UP, 0.90, Arm.HERE, Reason.CONFIDENT, False),
        (Rule(), FAST_UP, 0.89, Arm.UP, Reason.ESCALATED, False),
        (Rule(), FAST_UP, None, Arm.HERE, Reason.CONFIDENT, False),
        (Rule(escalate=False), FAST_UP, 0.1, Arm.HERE, Reason.LOCAL, False),
        (Rule(), Features(has_up=False), 0.1, Arm.HERE, Reason.LOCAL, False),
        (Rule(), Features(breaker_open=True), 0.1, Arm.HERE, Reason.UP_UNREACHABLE, True),
        (Rule(reserve_ms=8), Features(budget=0.012, up_mean=0.005, up_dev=0.001), 0.1, Arm.HERE, Reason.NO_TIME, True),
    ],
)
def test_escalate_risks_the_answer_in_hand_only_for_a_likely_better_one(
    rule: Rule, features: Features, confidence: float | None, arm: Arm, reason: Reason, degraded: bool
) -> None:
    decision = escalate(rule, features, confidence, threshold=0.9)
    assert (decision.arm, decision.reason, decision.degraded) == (arm, reason, degraded)


def test_the_first_matching_rule_wins() -> None:
    policy = Policy(rules=(Rule(model="digits", tier="edge", reserve_ms=1), Rule(tier="edge", reserve_ms=2)))
    assert rule_for(policy, "digits", "edge").reserve_ms == 1
    assert rule_for(policy, "faces", "edge").reserve_ms == 2
    assert rule_for(policy, "digits", "device") is DEFAULT_RULE


def test_chance_in_time_is_one_half_at_the_mean_and_falls_with_lateness() -> None:
    assert chance_in_time(0.02, 0.02, 0.01) == pytest.approx(0.5)
    assert chance_in_time(inf, 100, 1) == 1.0
    assert chance_in_time(-1e9, 0, 0) < 1e-20
    assert chance_in_time(0.03, 0.02, 0.004) > 0.95


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "policy"),
        (b'{"rulez": []}', "rulez"),
        (b'{"rules": [{"prefer": "sideways"}]}', r"rules\[0\].prefer"),
        (b'{"rules": [{"tier": "moon"}]}', r"rules\[0\].tier"),
        (b'{"rules": [{}, {"min_confidence": 1.5}]}', r"rules\[1\].min_confidence"),
        (b'{"rules": [{"default_deadline_ms": 0}]}', r"rules\[0\].default_deadline_ms"),
        (b'{"rules": [{"reserve_ms": -1}]}', r"rules\[0\].reserve_ms"),
        (b'{"rules": [{"reserve_ms": "8"}]}', r"reserve_ms"),
        (json.dumps({"rules": [{}] * 1001}).encode(), "rules"),
        (b" " * 70_000, "policy has 70000 bytes"),
    ],
)
def test_a_bad_policy_is_refused_naming_the_field(body: bytes, field: str) -> None:
    with pytest.raises(InvalidPolicy, match=field):
        decode_policy(body)
