"""The last step of the recipe: `python -m models.zoo.digits.package --work DIR --out DIR`, after `train`, `int8`, `tflite`.

Measures what the earlier steps made, through the engines that serve it, and writes the package folders: model files,
golden inputs and the manifest with threshold, tolerances and held-out accuracy. Needs scikit-learn and both engines.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.engines import EngineOptions, get_engine
from models.manifest import Blob, Confidence, Contract, Manifest, Variant, check_manifest, encode_manifest
from models.tensor import Array, TensorSpec
from models.zoo.digits.calibrate import learn_then_test
from models.zoo.digits.data import Part, Split, load_split

OUTPUT = "probabilities"
DATASET = "scikit-learn digits, held-out 600 of 1797"
RISK = 0.01
"""Share of all requests that a package may keep and answer wrongly: the promise its threshold is chosen for."""
FLOAT_TOLERANCE = 1e-3
MARGIN = 2.0
TOLERANCE_STEP = 0.05
"""INT8 tolerance = MARGIN times the largest difference seen on the golden images, rounded up to the next step: kernels of
another processor round differently."""


class Form(NamedTuple):
    """One file of a package: what the recipe made, and as what it ships."""

    engine: str
    precision: str
    made: str
    ships: str


class Plan(NamedTuple):
    """What a package consists of; the first form is the preferred one."""

    forms: tuple[Form, ...]
    description: str


_FLOAT = (Form("onnx", "fp32", "float.onnx", "model.onnx"),)
_INT8 = (Form("onnx", "int8", "int8.onnx", "model.onnx"), Form("litert", "int8", "int8.tflite", "model.tflite"))
PLANS: Mapping[str, Plan] = {
    "digits-int8": Plan(_INT8, "Handwritten digits 0-9, two dense layers in INT8, for devices"),
    "digits-cnn": Plan(_FLOAT, "Handwritten digits 0-9, three convolutions, for edge nodes"),
    "digits-large": Plan(_FLOAT, "Handwritten digits 0-9, an ensemble of three convolutional networks, for the cloud"),
}


def outputs_of(engine: str, path: Path, images: Array) -> Array:
    """Probabilities float32 [n, 10] of the model file at `path` for raw pixels float32 [n, 64], run as one batch."""
    session = get_engine(engine).load(path, EngineOptions())
    try:
        return session.run({"image": images}, [OUTPUT])[0]
    finally:
        session.close()


def accuracy(probabilities: Array, part: Part) -> float:
    """Share 0..1 of the part's images whose largest probability is at the label."""
    return float((probabilities.argmax(axis=1) == part.labels).mean())


def threshold(probabilities: Array, part: Part) -> float:
    """The package's confidence threshold; 1.0 (escalate whatever is not certain) when none can be promised."""
    wrong = probabilities.argmax(axis=1) != part.labels
    found = learn_then_test(probabilities.max(axis=1), wrong, RISK)
    return 1.0 if found is None else found


def blob_of(path: Path) -> Blob:
    """The file by its content."""
    content = path.read_bytes()
    return Blob(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def tolerance(form: Form, path: Path, golden: Mapping[str, Array]) -> float:
    """How far the file at `path` may differ from the golden outputs, as an absolute difference of probabilities."""
    if form.precision == "fp32":
        return FLOAT_TOLERANCE
    worst = np.abs(outputs_of(form.engine, path, golden["in.image"]) - golden["out.probabilities"]).max()
    return round(ceil(float(worst) * MARGIN / TOLERANCE_STEP) * TOLERANCE_STEP, 2)


def build(package: str, version: str, made: Path, out: Path, split: Split) -> Manifest:
    """Fill the package folder `out` from the recipe's files in `made`; returns the manifest written."""
    out.mkdir(parents=True, exist_ok=True)
    plan = PLANS[package]
    shutil.copyfile(made / "golden.npz", out / "golden.npz")
    with np.load(out / "golden.npz") as arrays:
        golden = dict(arrays)
    variants = []
    for form in plan.forms:
        shipped = out / form.ships
        shutil.copyfile(made / form.made, shipped)
        variants.append(Variant(form.engine, form.precision, blob_of(shipped), tolerance(form, shipped, golden)))
    first, shipped = plan.forms[0].engine, out / plan.forms[0].ships
    calibrated = outputs_of(first, shipped, split.calibration.pixels())
    measured = accuracy(outputs_of(first, shipped, split.held_out.pixels()), split.held_out)
    confidence = Confidence(OUTPUT, "max", threshold(calibrated, split.calibration))
    manifest = Manifest(
        package=package,
        version=version,
        inputs=(TensorSpec("image", "FP32", (-1, 64)),),
        outputs=(TensorSpec(OUTPUT, "FP32", (-1, 10)),),
        variants=tuple(variants),
        golden=blob_of(out / "golden.npz"),
        confidence=confidence,
        contract=Contract(round(measured, 4), DATASET),
        description=plan.description,
    )
    check_manifest(manifest)
    (out / "manifest.json").write_bytes(encode_manifest(manifest))
    kept = calibrated.max(axis=1) >= confidence.threshold
    print(f"{package} {version}: calibration {accuracy(calibrated, split.calibration):.4f}, kept {kept.mean():.3f}")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Assemble the digits package folders from the recipe's files.")
    parser.add_argument("--work", type=Path, required=True, help="the folder that the other steps filled")
    parser.add_argument("--out", type=Path, required=True, help="the artifacts folder to write")
    arguments = parser.parse_args()
    split = load_split()
    for made in sorted(arguments.work.glob("*/digits-*")):
        package, version = made.name, made.parent.name
        build(package, version, made, arguments.out / version / package, split)
    shutil.copyfile(arguments.work / "heldout.npz", arguments.out / "heldout.npz")


if __name__ == "__main__":
    main()
