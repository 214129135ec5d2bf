"""What is chosen on the calibration part: the softmax temperature and the confidence threshold. Pure."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np

from models.tensor import Array

DELTA = 0.1
"""Chance that a promise made by `learn_then_test` is broken, over the draw of the calibration part."""
GRID = (0.995, *(round(0.99 - 0.01 * step, 2) for step in range(90)))
"""Thresholds tried, strict to loose; fixed before any label is looked at."""


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def fit_temperature(logits: Array, labels: Array) -> float:
    """The divisor of the logits that minimises the negative log-likelihood, between 1/8 and 8 (Guo et al., 2017).

    `logits` [n, classes], `labels` [n]. The loss is convex in 1/T, so a fine grid finds its one minimum.
    """
    candidates = np.exp2(np.linspace(-3, 3, 601))
    rows = np.arange(len(labels))
    losses = [-np.log(softmax(logits / t)[rows, labels] + 1e-12).mean() for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def learn_then_test(confidence: Array, wrong: Array, risk: float, delta: float = DELTA) -> float | None:
    """Loosest threshold for which P(wrong and kept) <= `risk` can be claimed with confidence 1 - `delta`; None = none can.

    `confidence` float [n], `wrong` bool [n]. Fixed-sequence testing (Angelopoulos et al., "Learn then Test", 2021) with the
    exact binomial p-value: thresholds go from strict to loose and the first one that fails ends the search.
    """
    best = None
    for threshold in GRID:
        kept_wrong = int(np.count_nonzero((confidence >= threshold) & wrong))
        if _binomial_cdf(kept_wrong, len(wrong), risk) > delta:
            break
        best = threshold
    return best


def _binomial_cdf(successes: int, trials: int, share: float) -> float:
    return sum(comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes + 1))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - spread) / scale, (centre + spread) / scale
