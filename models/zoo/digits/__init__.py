"""Handwritten digits: one model name, three packages from light to heavy, two versions of each, shipped with the project.

Every package takes `image` FP32 [-1, 64] (8x8 row-major, ink 0..16) and gives `probabilities` FP32 [-1, 10]. The model card
is README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.errors import NotFound
from models.tensor import Array

MODEL = "digits"
PACKAGES = {"device": "digits-int8", "edge": "digits-cnn", "cloud": "digits-large"}
"""Tier -> the package meant for it."""
VERSIONS = ("1", "2")

_ARTIFACTS = Path(__file__).parent / "artifacts"


def package_folder(tier: str, version: str = VERSIONS[0]) -> Path:
    """The folder with manifest.json, golden.npz and the variant files of a tier's package. Raises NotFound."""
    if tier not in PACKAGES or version not in VERSIONS:
        raise NotFound(f"no digits package for tier {tier!r}, version {version!r}")
    return _ARTIFACTS / version / PACKAGES[tier]


def held_out() -> tuple[Array, Array]:
    """Images float32 [600, 64], ink 0..16, and labels int64 [600] that no recipe has seen."""
    with np.load(_ARTIFACTS / "heldout.npz", allow_pickle=False) as arrays:
        return arrays["images"].astype(np.float32), arrays["labels"].astype(np.int64)


__all__ = ["MODEL", "PACKAGES", "VERSIONS", "held_out", "package_folder"]
