"""The TFLite recipe of the device package: `python -m models.zoo.digits.tflite --work DIR`, after `train`.

Needs tensorflow (made with 2.21.0) and scikit-learn, in an environment of its own: TensorFlow weighs 1.6 GB and pins much.
The same trained weights are put into the same two dense layers in Keras and converted to full INT8 with the calibration
part as representative data; inputs and outputs stay float, the batch dimension stays free.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from models.tensor import Array
from models.zoo.digits.data import load_split


def convert(weights: Path, images: Array) -> bytes:
    """The .tflite file made of `weights` (`<layer>.kernel`, `<layer>.bias`), ranges taken from raw pixels float32 [n, 64]."""
    with np.load(weights) as arrays:
        image = tf.keras.Input(shape=(64,), name="image")
        hidden = tf.keras.layers.Dense(arrays["0.bias"].size, activation="relu")
        out = tf.keras.layers.Dense(arrays["1.bias"].size, activation="softmax", name="probabilities")
        model = tf.keras.Model(image, {"probabilities": out(hidden(image))})
        hidden.set_weights([arrays["0.kernel"], arrays["0.bias"]])
        out.set_weights([arrays["1.kernel"], arrays["1.bias"]])

    def representative() -> Iterator[list[Array]]:
        for row in images:
            yield [row[np.newaxis]]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return bytes(converter.convert())


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the device package to INT8 TFLite.")
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="the folder that `train` filled")
    images = load_split().calibration.pixels()
    print(f"tensorflow {tf.__version__}")
    for folder in sorted(parser.parse_args().work.glob("*/digits-int8")):
        content = convert(folder / "weights.npz", images)
        (folder / "int8.tflite").write_bytes(content)
        print(f"{folder / 'int8.tflite'}: {len(content)} bytes")


if __name__ == "__main__":
    main()
