"""Whether a version does its work as well as the one before it: judged from counts of live traffic. Pure.

Every share is judged by the lower end of its confidence interval (`surely_above`), so that a handful of unlucky answers
condemns nobody, and a version that fails every second time is caught within a dozen.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from math import log, log2, sqrt
from typing import Any

import msgspec

from models.errors import InvalidRequest

MIN_BASELINE = 50
"""Answers of the previous version from which its latency can be compared with."""
MIN_PAIRS = 12
"""Different inputs that both versions have seen, from which their confidences are compared."""
BASELINE_ANSWERS = 1 << 14
"""Answers after which a record halves its counts: traffic of last month says little about today's."""

Z = 3.09
"""One-sided 99.9 %: quantile of the normal distribution."""
CHI_SQUARE = (0.0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88)
"""99.9 % quantiles of the chi-squared distribution, by degrees of freedom."""
CONFIDENCE_EDGES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
"""Ten bins of a confidence in 0..1, finer where classifiers spend their time."""
LATENCY_STEPS = 4
"""Bins per doubling of the latency: 19 % wide."""
LATENCY_BINS = 30 * LATENCY_STEPS
"""From a microsecond to a quarter of an hour."""
SLOW_SHARE = 0.05
"""What may lie above a 95th percentile."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a new version is judged by. None switches a measure off. Shares are of 0..1.

    `answers`: real inferences after which a version without a fault has proved itself. `watch_answers`: for how many more it
    is still watched. `latency_ratio`: how many times the previous version's 95th percentile of the run time its own may be,
    if that is also `latency_rise_ms` more: a machine's caches and neighbours change small times by themselves.
    `error_share`: of answers that are engine failures. `late_share`: of requests not answered by their deadline.
    `not_finite_share`: of answers with NaN or infinity. `confidence_psi`: largest population stability index between the
    confidences of the two versions on the same inputs (what they were asked at different times says more of the callers);
    0.1 is a small, 0.25 a significant shift (Siddiqi, Credit Risk Scorecards, 2006; Lewis, 1994). `confidence_upward`:
    whether a shift towards more confidence counts, too; a better model makes one. `disagreement`: share of the same inputs
    that the two versions put into different classes; two models that are right in 87.5 % of cases differ in at most 25 %.
    `shadow`: whether the previous version stays loaded during probation to be compared with; `shadow_answers`: how often it
    is asked; `shadow_share`: of one thread's time that this may take.
    """

    answers: int = 20
    watch_answers: int = 1000
    latency_ratio: float | None = 2.0
    latency_rise_ms: float = 2.0
    error_share: float | None = 0.1
    late_share: float | None = 0.1
    not_finite_share: float | None = 0.05
    confidence_psi: float | None = 0.25
    confidence_upward: bool = False
    disagreement: float | None = 0.25
    shadow: bool = True
    shadow_answers: int = 50
    shadow_share: float = 0.05


def read_rules(given: Mapping[str, Any]) -> Rules:
    """Rules from settings; unknown fields are those of another release. Raises InvalidRequest naming the field."""
    try:
        rules = msgspec.convert(given, Rules)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"quality: {error}") from error
    shares = ("error_share", "late_share", "not_finite_share", "disagreement", "shadow_share")
    for name in shares:
        share = getattr(rules, name)
        if share is not None and not 0 < share <= 1:
            raise InvalidRequest(f"quality.{name}: {share} is not above 0 and at most 1")
    if rules.latency_ratio is not None and not 1 <= rules.latency_ratio <= 1e6:
        raise InvalidRequest(f"quality.latency_ratio: {rules.latency_ratio} is not 1 or more")
    if rules.confidence_psi is not None and not 0 < rules.confidence_psi <= 100:
        raise InvalidRequest(f"quality.confidence_psi: {rules.confidence_psi} is not between 0 and 100")
    if not 0 <= rules.latency_rise_ms <= 1e6:
        raise InvalidRequest(f"quality.latency_rise_ms: {rules.latency_rise_ms} is not between 0 and 1e6")
    for name in ("answers", "watch_answers", "shadow_answers"):
        if not 1 <= getattr(rules, name) <= 1_000_000:
            raise InvalidRequest(f"quality.{name}: {getattr(rules, name)} is not between 1 and 1000000")
    return rules


class Record(msgspec.Struct):
    """What traffic said of one version of a model.

    `latency`: histogram of all runs. `looked`: answers whose numbers were looked through. `compared`, `differed`: different
    inputs that the previous version was asked, too; `confidence`, `before`: histograms of its own confidence and of the
    previous version's on them; `before_latency`: of the previous version's runs on them, now and not when it was in force.
    `bad`: it was condemned, and is nothing to compare with.
    """

    package: str
    version: str
    answers: int = 0
    errors: int = 0
    late: int = 0
    looked: int = 0
    not_finite: int = 0
    compared: int = 0
    differed: int = 0
    bad: bool = False
    latency: list[int] = msgspec.field(default_factory=lambda: [0] * LATENCY_BINS)
    confidence: list[int] = msgspec.field(default_factory=lambda: [0] * (len(CONFIDENCE_EDGES) + 1))
    before: list[int] = msgspec.field(default_factory=lambda: [0] * (len(CONFIDENCE_EDGES) + 1))
    before_latency: list[int] = msgspec.field(default_factory=lambda: [0] * LATENCY_BINS)

    @property
    def key(self) -> str:
        return f"{self.package}/{self.version}"

    def add(self, seconds: float) -> None:
        """Count one answer: `seconds` of its run."""
        self.answers += 1
        self.latency[_latency_bin(seconds)] += 1

    def compare(self, differs: bool, seconds: float) -> None:
        """Count an input that the previous version was asked too: whether it says something else, how long its run took."""
        self.compared += 1
        self.differed += differs
        self.before_latency[_latency_bin(seconds)] += 1

    def pair(self, own: float, before: float) -> None:
        """Count the confidences, in 0..1, of this version and of the previous one on one input."""
        self.confidence[bisect_right(CONFIDENCE_EDGES, own)] += 1
        self.before[bisect_right(CONFIDENCE_EDGES, before)] += 1

    def age(self) -> None:
        """Let the past weigh half."""
        for name in ("answers", "errors", "late", "looked", "not_finite", "compared", "differed"):
            setattr(self, name, getattr(self, name) // 2)
        self.latency = [count // 2 for count in self.latency]
        self.confidence = [count // 2 for count in self.confidence]
        self.before = [count // 2 for count in self.before]
        self.before_latency = [count // 2 for count in self.before_latency]

    @property
    def requests(self) -> int:
        return self.answers + self.errors + self.late

    def p95(self) -> float:
        """Upper edge, in seconds, of the bin that holds the 95th percentile of the run time."""
        return _exceeded_by(SLOW_SHARE, self.latency)

    def slow_now(self) -> float:
        """What half of the previous version's runs of these days take longer than, in seconds; 0 = too few to say."""
        return _exceeded_by(0.5, self.before_latency) if sum(self.before_latency) >= MIN_PAIRS else 0.0

    def slower_than(self, seconds: float) -> int:
        """Runs that surely took longer: the bin that holds `seconds` does not count."""
        return sum(self.latency[bisect_left(_EDGES, seconds) :])


_EDGES: Sequence[float] = tuple(2.0 ** (bin_ / LATENCY_STEPS - 20) for bin_ in range(LATENCY_BINS + 1))
"""Seconds where the bins of `Record.latency` begin, and where the last one ends."""


def _latency_bin(seconds: float) -> int:
    bin_ = int(LATENCY_STEPS * (log2(seconds) + 20)) if seconds > 1e-6 else 0
    return min(bin_, LATENCY_BINS - 1)


def _exceeded_by(share: float, histogram: Sequence[int]) -> float:
    """Upper edge, in seconds, of the bin above which less than `share` of a latency histogram lies."""
    left = share * sum(histogram)
    for bin_ in range(LATENCY_BINS - 1, -1, -1):
        left -= histogram[bin_]
        if left < 0:
            return _EDGES[bin_ + 1]
    return 0.0


def surely_above(hits: int, of: int, limit: float) -> bool:
    """Whether the true share is above `limit` with 99.9 % confidence: the lower end of Wilson's interval (JASA 1927)."""
    if of == 0:
        return False
    share, zz = hits / of, Z * Z
    middle = share + zz / (2 * of)
    spread = Z * sqrt(share * (1 - share) / of + zz / (4 * of * of))
    return (middle - spread) / (1 + zz / of) > limit


def psi(expected: Sequence[int], actual: Sequence[int]) -> float:
    """Population stability index of two histograms; half a count in every bin keeps it finite."""
    n, m = sum(expected) + len(expected) / 2, sum(actual) + len(actual) / 2
    total = 0.0
    for before, after in zip(expected, actual, strict=True):
        p, q = (before + 0.5) / n, (after + 0.5) / m
        total += (q - p) * log(q / p)
    return total


def psi_by_chance(expected: Sequence[int], actual: Sequence[int]) -> float:
    """What 99.9 % of samples of one distribution stay below: PSI / (1/n + 1/m) is chi-squared with bins - 1 degrees of freedom

    (Yurdakul, Statistical Properties of the Population Stability Index, 2018). Bins empty in both do not count.
    """
    used = sum(bool(before or after) for before, after in zip(expected, actual, strict=True))
    return CHI_SQUARE[max(used - 1, 0)] * (1 / max(sum(expected), 1) + 1 / max(sum(actual), 1))


def fault(new: Record, old: Record | None, rules: Rules, latency_ms: float | None = None) -> str | None:
    """Which measure is broken, with its value and its limit; None = none so far.

    `old`: of the previous version. `latency_ms`: 95th percentile that the package's contract promises.
    """
    checks = (
        _share("engine failures", new.errors, new.requests, rules.error_share),
        _share("answers that are not finite", new.not_finite, new.looked, rules.not_finite_share),
        _late(new, old, rules),
        _latency(new, old, rules, latency_ms),
        _confidence(new, rules),
        _share(
            "inputs classified otherwise than by the previous version", new.differed, new.compared, rules.disagreement
        ),
    )
    return next((each for each in checks if each is not None), None)


def _share(what: str, hits: int, of: int, limit: float | None) -> str | None:
    if limit is None or not surely_above(hits, of, limit):
        return None
    return f"{what}: {hits} of {of} ({hits / of:.0%}), the limit is {limit:.0%}"


def _late(new: Record, old: Record | None, rules: Rules) -> str | None:
    """An overloaded machine is late with any version; without another to compare with, nothing is said."""
    if rules.late_share is None or old is None:
        return None
    usual = old.late / old.requests if old.requests >= MIN_BASELINE else 0.0
    return _share("requests not answered in time", new.late, new.requests, min(max(rules.late_share, 2 * usual), 1.0))


def _latency(new: Record, old: Record | None, rules: Rules, promised_ms: float | None) -> str | None:
    limits: list[tuple[float, str]] = []
    if promised_ms is not None:
        limits.append((promised_ms / 1e3, "the contract's"))
    if rules.latency_ratio is not None and old is not None and sum(old.latency) >= MIN_BASELINE:
        # A machine that is busier than it was slows both: then what the previous version takes now is what counts.
        usual = max(old.p95(), new.slow_now())
        limits.append(
            (max(rules.latency_ratio * usual, usual + rules.latency_rise_ms / 1e3), "by the previous version's")
        )
    for limit, whose in limits:
        runs = sum(new.latency)
        if surely_above(new.slower_than(limit), runs, SLOW_SHARE):
            found = f"95th percentile {new.p95() * 1e3:.3g} ms of {runs} runs"
            return f"run time: {found}, the limit is {limit * 1e3:.3g} ms ({whose})"
    return None


def _confidence(new: Record, rules: Rules) -> str | None:
    pairs = sum(new.before)
    if rules.confidence_psi is None or pairs < MIN_PAIRS:
        return None
    if not rules.confidence_upward and _mean_bin(new.confidence) >= _mean_bin(new.before):
        return None
    value, chance = psi(new.before, new.confidence), psi_by_chance(new.before, new.confidence)
    limit = max(rules.confidence_psi, chance)
    if value <= limit:
        return None
    return f"confidence: stability index {value:.2f} against the previous version on {pairs} inputs, the limit is {limit:.2f}"


def _mean_bin(histogram: Sequence[int]) -> float:
    return sum(bin_ * count for bin_, count in enumerate(histogram)) / sum(histogram)
