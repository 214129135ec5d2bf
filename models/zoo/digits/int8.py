"""The INT8 recipe of the device package: `python -m models.zoo.digits.int8 --work DIR`, after `train`.

Needs onnxruntime, onnx and scikit-learn. Static quantization in QDQ form, unsigned activations and signed weights, both 8
bits, min-max ranges from the whole calibration part. Weights use 7 of their 8 bits: without VNNI, x86 adds pairs of u8 x s8
products in 16 bits and saturates on full-range weights, so another processor would give other answers. The softmax stays
in float, so confidence keeps its resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from models.tensor import Array
from models.zoo.digits.data import load_split

BATCH = 50
QUANTIZED = ["Gemm", "Conv", "MatMul", "Relu"]


class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not analysed
    """Feeds calibration images [n, 64] in batches."""

    def __init__(self, images: Array) -> None:
        self._batches: Iterator[Array] = iter([images[start : start + BATCH] for start in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def quantize(source: Path, target: Path, images: Array) -> None:
    """Write `source` (float ONNX) as INT8 QDQ to `target`, calibrated on raw pixels `images` float32 [n, 64]."""
    with TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Batches(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize the device package to INT8 ONNX.")
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="the folder that `train` filled")
    images = load_split().calibration.pixels()
    for folder in sorted(parser.parse_args().work.glob("*/digits-int8")):
        quantize(folder / "float.onnx", folder / "int8.onnx", images)
        print(f"{folder / 'int8.onnx'}: {(folder / 'int8.onnx').stat().st_size} bytes")


if __name__ == "__main__":
    main()
