"""What a package version promises: its interface, its variants, its golden inputs, its contract. Pure: bytes in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec
import numpy as np

from models.errors import InvalidManifest, NoUsableVariant
from models.tensor import DTYPES, MAX_RANK, Array, TensorSpec

MAX_MANIFEST_BYTES = 256 * 1024
"""A manifest is a page of JSON; anything larger is a mistake or an attack."""
MAX_VARIANTS = 32
MAX_TENSORS = 256
MAX_VARIANT_BYTES = 4 << 30
"""Largest single model file (4 GiB)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Blob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file by its content: `sha256:<hex>` and its size in bytes."""

    digest: str
    size: int


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The package's function as one file for one engine and precision.

    `tolerance`: largest absolute difference from the golden outputs that this precision may show.
    """

    engine: str
    precision: str
    blob: Blob
    tolerance: float = 1e-3


class Confidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a caller's confidence is read from the outputs, and from which value on an answer may stay where it was made.

    `output`: floats in 0..1, shaped (batch, ..., classes), or (classes,) where their number is fixed. `method`: `max` =
    largest value of the last axis; `margin` = largest minus second largest. A batch is as confident as its least confident
    row. `threshold` comes from calibration data, never from a held-out part.
    """

    output: str
    method: str = "max"
    threshold: float = 0.0


class Contract(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the publisher states and the toolchain measured: shown, compared, never guessed. None = not stated.

    `accuracy` is a share in 0..1 on the data named by `dataset`. `latency_ms`: 95th percentile of the run time of one
    request that the version may need wherever it runs; a node that sees more in live traffic goes back. Unknown fields are
    promises of a later release, which this one does not judge.
    """

    accuracy: float | None = None
    dataset: str | None = None
    latency_ms: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A package version. Immutable: the digest of these very bytes names it.

    `golden` is a .npz without pickles whose arrays are called `in.<input>` and `out.<output>`.
    """

    package: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: tuple[Variant, ...]
    golden: Blob
    confidence: Confidence | None = None
    contract: Contract = Contract()
    description: str = ""


def decode_manifest(data: bytes) -> Manifest:
    """Decode and check a manifest. Raises InvalidManifest naming the field."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidManifest(f"manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are accepted")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(f"manifest: {error}") from error
    check_manifest(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes that are stored, signed and named by digest."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def check_manifest(manifest: Manifest) -> None:
    """Raise InvalidManifest, naming the field, when the manifest contradicts itself."""
    _check_name("package", manifest.package)
    _check_name("version", manifest.version)
    for field, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        _check_specs(field, specs)
    if not 1 <= len(manifest.variants) <= MAX_VARIANTS:
        raise InvalidManifest(f"variants: {len(manifest.variants)} given, 1 to {MAX_VARIANTS} are accepted")
    for index, variant in enumerate(manifest.variants):
        _check_name(f"variants[{index}].engine", variant.engine)
        _check_name(f"variants[{index}].precision", variant.precision)
        _check_blob(f"variants[{index}].blob", variant.blob)
        if not 0 <= variant.tolerance <= 1e6:
            raise InvalidManifest(f"variants[{index}].tolerance: {variant.tolerance} is not between 0 and 1e6")
    _check_blob("golden", manifest.golden)
    if manifest.confidence is not None:
        _check_confidence(manifest.confidence, manifest.outputs)
    accuracy = manifest.contract.accuracy
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise InvalidManifest(f"contract.accuracy: {accuracy} is not between 0 and 1")
    latency = manifest.contract.latency_ms
    if latency is not None and not 0 < latency <= 1e7:
        raise InvalidManifest(f"contract.latency_ms: {latency} is not between 0 and 1e7 milliseconds")


def _check_name(field: str, value: str) -> None:
    if not _NAME.fullmatch(value):
        raise InvalidManifest(f"{field}: {value!r} is not 1-128 letters, digits, '.', '_' or '-'")


def _check_blob(field: str, blob: Blob) -> None:
    if not _DIGEST.fullmatch(blob.digest):
        raise InvalidManifest(f"{field}.digest: {blob.digest!r} is not 'sha256:' and 64 hexadecimal digits")
    if not 0 < blob.size <= MAX_VARIANT_BYTES:
        raise InvalidManifest(f"{field}.size: {blob.size} is not between 1 and {MAX_VARIANT_BYTES}")


def _check_specs(field: str, specs: Sequence[TensorSpec]) -> None:
    if not 1 <= len(specs) <= MAX_TENSORS:
        raise InvalidManifest(f"{field}: {len(specs)} given, 1 to {MAX_TENSORS} are accepted")
    if len({spec.name for spec in specs}) != len(specs):
        raise InvalidManifest(f"{field}: a name is given twice")
    for spec in specs:
        if not spec.name:
            raise InvalidManifest(f"{field}: a name is empty")
        if spec.datatype not in DTYPES:
            raise InvalidManifest(f"{field}.{spec.name}.datatype: {spec.datatype!r} is none of {', '.join(DTYPES)}")
        if len(spec.shape) > MAX_RANK or any(dim < -1 for dim in spec.shape):
            raise InvalidManifest(f"{field}.{spec.name}.shape: {list(spec.shape)} is not a shape (-1 = any size)")


def _check_confidence(confidence: Confidence, outputs: Sequence[TensorSpec]) -> None:
    spec = next((spec for spec in outputs if spec.name == confidence.output), None)
    if spec is None:
        raise InvalidManifest(f"confidence.output: {confidence.output!r} is not an output")
    if DTYPES[spec.datatype].kind != "f":
        raise InvalidManifest(
            f"confidence.output: {spec.name!r} is {spec.datatype}; shares in 0..1 are FP16, FP32 or FP64"
        )
    if spec.shape in ((), (-1,)):
        raise InvalidManifest(
            f"confidence.output: {spec.name!r} has shape {list(spec.shape)}, without an axis of classes"
        )
    if confidence.method not in CONFIDENCE:
        raise InvalidManifest(f"confidence.method: {confidence.method!r} is none of {', '.join(CONFIDENCE)}")
    if not 0 <= confidence.threshold <= 1:
        raise InvalidManifest(f"confidence.threshold: {confidence.threshold} is not between 0 and 1")


def choose_variant(variants: Sequence[Variant], engines: Sequence[str]) -> Variant:
    """The first variant, in the publisher's order of preference, whose engine this node has. Raises NoUsableVariant."""
    for variant in variants:
        if variant.engine in engines:
            return variant
    offered = ", ".join(f"{variant.engine} {variant.precision}" for variant in variants)
    raise NoUsableVariant(f"no variant runs here: offered {offered}; engines here: {', '.join(engines) or 'none'}")


def _max(scores: Array) -> float:
    # A single row, the common case, needs one pass.
    return float(scores.max() if scores.size == scores.shape[-1] else scores.max(axis=-1).min())


def _margin(scores: Array) -> float:
    if scores.shape[-1] < 2:
        return _max(scores)
    top = np.partition(scores, -2, axis=-1)[..., -2:]
    return float((top[..., 1] - top[..., 0]).min())


CONFIDENCE = {"max": _max, "margin": _margin}


def confidence_of(rule: Confidence | None, outputs: Mapping[str, Array]) -> float | None:
    """Confidence of an answer in 0..1, or None when the package does not say how to read one.

    Fails closed: scores that are empty, without an axis or not finite are no confidence at all (0.0), so the answer escalates.
    """
    if rule is None:
        return None
    scores: Any = outputs.get(rule.output)
    if scores is None or scores.size == 0 or not scores.shape:
        return 0.0
    value = CONFIDENCE[rule.method](scores)
    return min(max(value, 0.0), 1.0) if isfinite(value) else 0.0
