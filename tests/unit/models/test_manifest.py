from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from models.errors import InvalidManifest, NoUsableVariant
from models.manifest import (
    Blob,
    Confidence,
    Contract,
    Manifest,
    Variant,
    check_manifest,
    choose_variant,
    confidence_of,
    decode_manifest,
    encode_manifest,
)
from models.tensor import TensorSpec

BLOB = Blob("sha256:" + "ab" * 32, 100)
GOOD = Manifest(
    package="digits-cnn",
    version="1",
    inputs=(TensorSpec("image", "FP32", (-1, 64)),),
    outputs=(TensorSpec("probabilities", "FP32", (-1, 10)),),
    variants=(Variant("onnx", "fp32", BLOB), Variant("litert", "int8", BLOB)),
    golden=BLOB,
    confidence=Confidence("probabilities", "max", 0.9),
)


def test_a_manifest_survives_the_round_trip() -> None:
    assert decode_manifest(encode_manifest(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (replace(GOOD, package="../x"), "package"),
        (replace(GOOD, version=""), "version"),
        (replace(GOOD, inputs=()), "inputs"),
        (
            replace(GOOD, outputs=(TensorSpec("a", "FP32", ()), TensorSpec("a", "FP32", ()))),
            "outputs: a name is given twice",
        ),
        (replace(GOOD, inputs=(TensorSpec("a", "FLOAT", (1,)),)), r"inputs.a.datatype"),
        (replace(GOOD, inputs=(TensorSpec("a", "FP32", (-2,)),)), r"inputs.a.shape"),
        (replace(GOOD, variants=()), "variants"),
        (replace(GOOD, variants=(Variant("onnx", "fp32", Blob("md5:1", 1)),)), r"variants\[0\].blob.digest"),
        (replace(GOOD, variants=(Variant("onnx", "fp32", Blob(BLOB.digest, 0)),)), r"variants\[0\].blob.size"),
        (replace(GOOD, variants=(Variant("onnx", "fp32", BLOB, tolerance=-1),)), r"variants\[0\].tolerance"),
        (replace(GOOD, golden=Blob(BLOB.digest, -5)), "golden.size"),
        (replace(GOOD, confidence=Confidence("logits")), "confidence.output"),
        (replace(GOOD, confidence=Confidence("probabilities", "entropy")), "confidence.method"),
        (replace(GOOD, confidence=Confidence("probabilities", "max", 2.0)), "confidence.threshold"),
        *(
            (replace(GOOD, outputs=(TensorSpec("probabilities", datatype, shape),)), f"confidence.output: .*{reason}")
            for datatype, shape, reason in (
                ("BYTES", (-1, 10), "is BYTES"),
                ("BOOL", (-1, 10), "is BOOL"),
                ("UINT8", (-1, 10), "is UINT8"),
                ("FP32", (), r"has shape \[\]"),
                ("FP32", (-1,), r"has shape \[-1\]"),
            )
        ),
        (replace(GOOD, contract=Contract(accuracy=99.0)), "contract.accuracy"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_naming_the_field(bad: Manifest, field: str) -> None:
    with pytest.raises(InvalidManifest, match=field):
        check_manifest(bad)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"package": 1}', encode_manifest(GOOD)[:-2], b'{"extra": 1}', b" " * 300_000]
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidManifest, match="manifest"):
        decode_manifest(data)


def test_the_publishers_order_of_variants_is_kept() -> None:
    assert choose_variant(GOOD.variants, ("litert", "onnx")).engine == "onnx"
    assert choose_variant(GOOD.variants, ("litert",)).engine == "litert"
    with pytest.raises(NoUsableVariant, match="onnx fp32, litert int8; engines here: none"):
        choose_variant(GOOD.variants, ())


@pytest.mark.parametrize(
    ("method", "scores", "expected"),
    [
        ("max", [[0.1, 0.9]], 0.9),
        ("max", [[0.1, 0.9], [0.6, 0.4]], 0.6),
        ("margin", [[0.1, 0.7, 0.2]], 0.5),
        ("margin", [[0.4]], 0.4),
        ("max", [[1.0000001, 0.0]], 1.0),
        ("max", [[float("nan"), 0.5]], 0.0),
        ("max", [[float("inf"), 0.5]], 0.0),
        ("max", np.zeros((0, 10)), 0.0),
        ("max", 0.7, 0.0),
        ("margin", 0.7, 0.0),
    ],
)
def test_confidence_is_the_least_confident_row_and_fails_closed(method: str, scores: object, expected: float) -> None:
    outputs = {"p": np.asarray(scores, dtype=np.float32)}
    assert confidence_of(Confidence("p", method), outputs) == pytest.approx(expected)


def test_without_a_rule_there_is_no_confidence_and_without_the_output_there_is_none_at_all() -> None:
    assert confidence_of(None, {}) is None
    assert confidence_of(Confidence("p"), {}) == 0.0


@pytest.mark.parametrize("shape", [(10,), (-1, 10), (-1, -1), (-1, 4, 10)])
def test_confidence_is_read_along_an_axis_of_classes(shape: tuple[int, ...]) -> None:
    check_manifest(replace(GOOD, outputs=(TensorSpec("probabilities", "FP16", shape),)))
