"""Where a request should be answered. Pure: the policy, the state of the tiers and the clock's reading come in as values.

`choose` decides before an inference, `escalate` after one, with the local answer in hand. Both return the arm and a reason
code, so every decision can be explained and replayed. The shape of the decision (masks first, then utility = chance of
being on time x accuracy - price) follows the deadline-aware routers of the literature (SHEPHERD, NSDI'23; INFaaS, ATC'21);
the two modes, infer-then-decide and decide-then-infer, are those of KubeEdge Sedna's joint inference.
"""

from __future__ import annotations

from enum import StrEnum
from math import exp, inf

import msgspec

from models.errors import InvalidPolicy

MAX_POLICY_BYTES = 64 * 1024
MAX_RULES = 1_000
MIN_CHANCE = 0.5
"""An answer in hand is risked on the tier above only when that tier will more likely than not be in time."""


class Reason(StrEnum):
    """Why an answer came from where it came."""

    LOCAL = "local"  # the policy keeps it here, or there is no tier above
    CONFIDENT = "confident"  # answered here, sure enough
    ESCALATED = "escalated"  # answered here first, not sure enough; the tier above answered
    UPWARD = "upward"  # sent up without asking here: the policy prefers it, or the model is not here
    UP_UNREACHABLE = "up_unreachable"  # degraded: the tier above is down, or the breaker to it is open
    UP_LATE = "up_late"  # degraded: the tier above did not answer in time
    UP_REFUSED = "up_refused"  # degraded: the tier above answered with an error
    NO_TIME = "no_time"  # degraded: the tier above was not expected to make the deadline


class Arm(StrEnum):
    HERE = "here"
    UP = "up"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests for `model` are routed on nodes of `tier`; `*` matches any. The first matching rule wins.

    `escalate`: whether a request may leave this tier. `prefer`: `here` = answer here, then decide by confidence;
    `up` = ask above first; `auto` = the arm of higher utility. `min_confidence`: 0..1, None = the package's own threshold.
    `default_deadline_ms`: for requests that carry none. `reserve_ms`: part of the budget kept back so that the answer in
    hand still leaves in time. `accuracy_here`, `accuracy_up`: shares 0..1 for the utility. `price_up`: what going up costs,
    in accuracy (0.02 = two points).
    """

    model: str = "*"
    tier: str = "*"
    escalate: bool = True
    prefer: str = "here"
    min_confidence: float | None = None
    default_deadline_ms: float = 1_000.0
    reserve_ms: float = 8.0
    accuracy_here: float = 0.95
    accuracy_up: float = 0.99
    price_up: float = 0.02


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a policy document."""

    rules: tuple[Rule, ...] = ()
    description: str = ""


DEFAULT_RULE = Rule()


class Features(msgspec.Struct, frozen=True):
    """What a decision sees. Durations in seconds; `budget` is the time left to the deadline.

    `has_here`, `has_up`: whether the model is served here, and whether a tier above is configured. `breaker_open`: calls
    to the tier above are suspended. `*_mean`, `*_dev`: estimate of that arm's time and its mean absolute deviation.
    """

    budget: float = inf
    has_here: bool = True
    has_up: bool = True
    breaker_open: bool = False
    here_mean: float = 0.001
    here_dev: float = 0.0005
    up_mean: float = 0.005
    up_dev: float = 0.005


class Decision(msgspec.Struct, frozen=True):
    """Which arm, why, and whether that is second best."""

    arm: Arm
    reason: Reason
    degraded: bool = False


def decode_policy(body: bytes) -> Policy:
    """Decode and check a policy document's body. Raises InvalidPolicy naming the field."""
    if len(body) > MAX_POLICY_BYTES:
        raise InvalidPolicy(f"policy has {len(body)} bytes, at most {MAX_POLICY_BYTES} are accepted")
    try:
        policy = msgspec.json.decode(body, type=Policy)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidPolicy(f"policy: {error}") from error
    if len(policy.rules) > MAX_RULES:
        raise InvalidPolicy(f"rules: {len(policy.rules)} given, at most {MAX_RULES} are accepted")
    for index, rule in enumerate(policy.rules):
        _check_rule(f"rules[{index}]", rule)
    return policy


def _check_rule(where: str, rule: Rule) -> None:
    if rule.tier not in ("*", "device", "edge", "cloud"):
        raise InvalidPolicy(f"{where}.tier: {rule.tier!r} is none of *, device, edge, cloud")
    if rule.prefer not in ("here", "up", "auto"):
        raise InvalidPolicy(f"{where}.prefer: {rule.prefer!r} is none of here, up, auto")
    for field in ("min_confidence", "accuracy_here", "accuracy_up", "price_up"):
        value = getattr(rule, field)
        if value is not None and not 0 <= value <= 1:
            raise InvalidPolicy(f"{where}.{field}: {value} is not between 0 and 1")
    if not 1 <= rule.default_deadline_ms <= 600_000:
        raise InvalidPolicy(f"{where}.default_deadline_ms: {rule.default_deadline_ms} is not between 1 and 600000")
    if not 0 <= rule.reserve_ms <= 60_000:
        raise InvalidPolicy(f"{where}.reserve_ms: {rule.reserve_ms} is not between 0 and 60000")


def rule_for(policy: Policy, model: str, tier: str) -> Rule:
    """The first rule that matches, else the defaults."""
    for rule in policy.rules:
        if rule.model in ("*", model) and rule.tier in ("*", tier):
            return rule
    return DEFAULT_RULE


def chance_in_time(budget: float, mean: float, dev: float) -> float:
    """Probability 0..1 that a duration of this mean and mean absolute deviation fits the budget (seconds).

    The logistic curve with slope 1.702 approximates the normal distribution's to within 0.01 (Haley, 1952); 1.25 turns a
    mean absolute deviation into a standard deviation.
    """
    if budget == inf:
        return 1.0
    spread = 1.25 * max(dev, 1e-6)
    exponent = min(max(-1.702 * (budget - mean) / spread, -60.0), 60.0)
    return 1.0 / (1.0 + exp(exponent))


def choose(rule: Rule, features: Features) -> Decision:
    """Where to answer first. Masks come before utility: no price buys a request past them."""
    if not features.has_here:
        return Decision(Arm.UP, Reason.UPWARD)
    if not features.has_up or not rule.escalate:
        return Decision(Arm.HERE, Reason.LOCAL)
    if rule.prefer == "here":
        return Decision(Arm.HERE, Reason.CONFIDENT)
    if features.breaker_open:
        return Decision(Arm.HERE, Reason.UP_UNREACHABLE, degraded=rule.prefer == "up")
    up_chance = chance_in_time(features.budget - rule.reserve_ms / 1e3, features.up_mean, features.up_dev)
    if rule.prefer == "up":
        if up_chance >= MIN_CHANCE:
            return Decision(Arm.UP, Reason.UPWARD)
        return Decision(Arm.HERE, Reason.NO_TIME, degraded=True)
    here_chance = chance_in_time(features.budget, features.here_mean, features.here_dev)
    if up_chance * rule.accuracy_up - rule.price_up > here_chance * rule.accuracy_here:
        return Decision(Arm.UP, Reason.UPWARD)
    return Decision(Arm.HERE, Reason.CONFIDENT)


def escalate(rule: Rule, features: Features, confidence: float | None, threshold: float) -> Decision:
    """Whether the answer in hand stays (`Arm.HERE`) or the tier above is asked for a better one."""
    if not features.has_up or not rule.escalate:
        return Decision(Arm.HERE, Reason.LOCAL)
    if confidence is None or confidence >= threshold:
        return Decision(Arm.HERE, Reason.CONFIDENT)
    if features.breaker_open:
        return Decision(Arm.HERE, Reason.UP_UNREACHABLE, degraded=True)
    if chance_in_time(features.budget - rule.reserve_ms / 1e3, features.up_mean, features.up_dev) < MIN_CHANCE:
        return Decision(Arm.HERE, Reason.NO_TIME, degraded=True)
    return Decision(Arm.UP, Reason.ESCALATED)
