"""A version that does its work worse than the one before is found out; bad luck and a busy machine condemn nobody."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import InvalidRequest
from models.serving.quality import MIN_PAIRS, Record, Rules, fault, psi, psi_by_chance, read_rules, surely_above

RULES = Rules()


def record(version: str = "1", *, seconds: float = 0.001, answers: int = 0, seed: int = 0) -> Record:
    made, rng = Record("digits-cnn", version), np.random.default_rng(seed)
    for _ in range(answers):
        made.add(seconds * float(rng.uniform(0.9, 1.1)))
    return made


def paired(own: np.ndarray, before: np.ndarray) -> Record:
    """Of confidences that two versions have on the same inputs."""
    made = Record("digits-cnn", "2")
    for mine, others in zip(own, before, strict=True):
        made.pair(float(mine), float(others))
    return made


def beta(a: float, b: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).beta(a, b, count)


def test_a_share_is_judged_by_what_is_sure() -> None:
    assert not surely_above(3, 20, 0.05)
    assert surely_above(5, 20, 0.05)
    assert surely_above(100, 1000, 0.05)
    assert not surely_above(0, 0, 0.0)
    assert not surely_above(55, 1000, 0.05)


def test_the_stability_index_is_zero_for_the_same_and_as_published_for_a_known_pair() -> None:
    assert psi([100, 200, 700], [10, 20, 70]) == pytest.approx(0, abs=0.01)
    # By hand: (0.5-0.25)ln(0.5/0.25) twice with opposite signs = 2 * 0.25 * ln(...) of 0.75/0.5 and 0.25/0.5.
    expected = (0.5 - 0.75) * np.log(0.5 / 0.75) + (0.5 - 0.25) * np.log(0.5 / 0.25)
    assert psi([75_000, 25_000], [50_000, 50_000]) == pytest.approx(expected, rel=1e-3)


def test_samples_of_one_distribution_stay_below_what_chance_makes() -> None:
    above = 0
    for seed in range(300):
        pairs = paired(beta(8, 2, 40, 1000 + seed), beta(8, 2, 40, seed))
        above += psi(pairs.before, pairs.confidence) > psi_by_chance(pairs.before, pairs.confidence)
    assert above <= 3


def test_a_fall_of_confidence_is_found_within_a_few_inputs() -> None:
    found = fault(paired(beta(2, 4, 20, 2), beta(30, 1, 20, 1)), None, RULES)
    assert found is not None
    assert found.startswith("confidence: stability index ")
    assert "on 20 inputs, the limit is " in found


def test_a_rise_of_confidence_counts_only_when_asked_for() -> None:
    risen = paired(beta(30, 1, 100, 2), beta(2, 4, 100, 1))
    assert fault(risen, None, RULES) is None
    assert fault(risen, None, Rules(confidence_upward=True)) is not None


def test_confidences_on_a_handful_of_inputs_say_nothing() -> None:
    assert fault(paired(beta(2, 4, MIN_PAIRS - 1, 2), beta(30, 1, MIN_PAIRS - 1, 1)), None, RULES) is None


def test_a_machine_that_gets_busier_slows_both_and_condemns_nobody() -> None:
    old, new = record(answers=500, seconds=0.001), record("2", answers=100, seconds=0.02)
    assert "run time" in (fault(new, old, RULES) or "")
    for _ in range(MIN_PAIRS):
        new.compare(False, 0.015)
    assert fault(new, old, RULES) is None
    slower = record("2", answers=100, seconds=0.2)
    for _ in range(MIN_PAIRS):
        slower.compare(False, 0.015)
    assert "run time" in (fault(slower, old, RULES) or "")


def test_a_version_that_is_slower_is_found_out_and_one_that_is_as_fast_is_not() -> None:
    old = record(answers=500, seconds=0.005)
    assert fault(record("2", answers=500, seconds=0.0055, seed=1), old, RULES) is None
    found = fault(record("2", answers=20, seconds=0.015, seed=1), old, RULES)
    assert found is not None
    assert found.startswith("run time: 95th percentile ")
    assert "of 20 runs" in found
    assert "the previous version's" in found


def test_a_few_slow_runs_of_a_busy_machine_condemn_nobody() -> None:
    old, new = record(answers=500, seconds=0.005), record("2", answers=97, seconds=0.005)
    for _ in range(3):
        new.add(0.5)
    assert fault(new, old, RULES) is None


def test_small_times_may_change_by_themselves() -> None:
    old = record(answers=500, seconds=0.0001)
    assert fault(record("2", answers=500, seconds=0.0004), old, RULES) is None


def test_a_promise_of_the_contract_holds_without_any_previous_version() -> None:
    new = record(answers=50, seconds=0.05)
    assert fault(new, None, RULES) is None
    found = fault(new, None, RULES, latency_ms=10)
    assert found is not None
    assert "the limit is 10 ms (the contract's)" in found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"answers": 10, "errors": 10}, "engine failures: 10 of 20"),
        ({"answers": 30, "looked": 10, "not_finite": 5}, "answers that are not finite: 5 of 10"),
        ({"answers": 30, "compared": 20, "differed": 14}, "otherwise than by the previous version: 14 of 20"),
        ({"answers": 10, "late": 10}, "not answered in time: 10 of 20"),
    ],
)
def test_every_share_has_its_limit_and_the_verdict_names_measure_value_and_limit(fields, words: str) -> None:
    new = Record("digits-cnn", "2", **fields)
    found = fault(new, Record("digits-cnn", "1", answers=100), RULES)
    assert found is not None
    assert words in found
    assert "the limit is" in found
    off = {"error_share": None, "late_share": None, "not_finite_share": None, "disagreement": None}
    assert fault(new, Record("digits-cnn", "1", answers=100), read_rules(off)) is None


def test_a_machine_on_which_every_version_is_late_condemns_none() -> None:
    old = Record("digits-cnn", "1", answers=50, late=50)
    assert fault(Record("digits-cnn", "2", answers=50, late=50), old, RULES) is None


def test_old_traffic_weighs_ever_less() -> None:
    old = record(answers=1000, seconds=0.005)
    p95 = old.p95()
    old.age()
    assert (old.answers, sum(old.latency)) == (500, pytest.approx(500, abs=10))
    assert old.p95() == p95


def test_a_percentile_is_at_most_one_bin_above_the_truth() -> None:
    made, values = Record("m", "1"), np.random.default_rng(5).lognormal(-6, 1, 5000)
    for value in values:
        made.add(float(value))
    truth = float(np.percentile(values, 95))
    assert truth <= made.p95() <= truth * 2**0.5


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"answers": 0}, "answers"),
        ({"error_share": 2}, "error_share"),
        ({"disagreement": 0}, "disagreement"),
        ({"latency_ratio": 0.5}, "latency_ratio"),
        ({"latency_rise_ms": -1}, "latency_rise_ms"),
        ({"confidence_psi": "much"}, "confidence_psi"),
        ({"shadow_share": None}, "shadow_share"),
    ],
)
def test_rules_that_make_no_sense_are_refused_by_their_field(given, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        read_rules(given)


def test_rules_of_a_later_release_are_ignored() -> None:
    assert read_rules({"answers": 5, "taste": 1}).answers == 5
