"""The data of the digits models: scikit-learn's 1,797 handwritten 8x8 images, split once and for all.

Source: "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998), the
copy inside scikit-learn. The recipe needs scikit-learn; serving and evaluating need only the shipped `heldout.npz`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.tensor import Array

SPLIT_SEED = 20
HELD_OUT = 600
CALIBRATION = 300
GOLDEN = 8
"""Calibration images whose float outputs are shipped as golden: the first one of each of the digits 0 to 7."""


class Part(NamedTuple):
    """`images` uint8 [n, 64], row-major 8x8, ink 0..16; `labels` int64 [n], 0..9."""

    images: Array
    labels: Array

    def pixels(self) -> Array:
        """The images as the models take them: float32 [n, 64], raw values 0..16."""
        return self.images.astype(np.float32)


class Split(NamedTuple):
    """Disjoint parts: `train` fits weights, `calibration` chooses everything else, `held_out` is only ever reported."""

    train: Part
    calibration: Part
    held_out: Part


def load_split() -> Split:
    """The fixed stratified split, 897 / 300 / 600. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    everything = Part(digits.data.astype(np.uint8), digits.target.astype(np.int64))
    rest, held_out = deal(_shuffled_by_label(everything), HELD_OUT)
    train, calibration = deal(rest, CALIBRATION)
    return Split(train, calibration, held_out)


def _shuffled_by_label(part: Part) -> Part:
    # RandomState: numpy guarantees that this stream never changes (NEP 19), which default_rng does not.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(part.labels))
    order = order[np.argsort(part.labels[order], kind="stable")]
    return Part(part.images[order], part.labels[order])


def deal(part: Part, count: int) -> tuple[Part, Part]:
    """(the rest, `count` rows taken at even spacing). Rows sorted by label therefore give a stratified choice."""
    steps = np.arange(len(part.labels) + 1) * count // len(part.labels)
    taken = np.diff(steps) > 0
    return Part(part.images[~taken], part.labels[~taken]), Part(part.images[taken], part.labels[taken])


def golden_images(calibration: Part) -> Array:
    """float32 [8, 64]: one calibration image of each of the digits 0 to 7."""
    first = [int(np.argmax(calibration.labels == digit)) for digit in range(GOLDEN)]
    return calibration.pixels()[first]


def save_held_out(part: Part, path: Path) -> None:
    """Write the held-out part as a compressed .npz: `images` uint8 [600, 64], `labels` uint8 [600]."""
    np.savez_compressed(path, images=part.images, labels=part.labels.astype(np.uint8))
