"""Packages for tests: a model file with the manifest and the golden arrays that go with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx_writer import scale_model

from models.desired import Assignment, Desired, assignment_of, encode_desired
from models.manifest import Blob, Confidence, Manifest, Variant, encode_manifest
from models.tensor import TensorSpec, datatype_of

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Package:
    """`blobs`: digest -> file, as an activator is given them."""

    manifest: Manifest
    assignment: Assignment
    blobs: Mapping[str, Path]
    model: Path
    golden: Path


def write_package(
    model: Path,
    inputs: Arrays,
    outputs: Arrays,
    *,
    package: str = "scale",
    version: str = "1",
    engine: str = "onnx",
    tolerance: float = 1e-4,
    confidence: Confidence | None = None,
) -> Package:
    """Write manifest.json and golden.npz beside `model`, one folder for each package. Every first dimension is free."""
    golden = model.parent / "golden.npz"
    arrays = {f"in.{name}": array for name, array in inputs.items()}
    np.savez(golden, **arrays, **{f"out.{name}": array for name, array in outputs.items()})
    manifest = Manifest(
        package=package,
        version=version,
        inputs=tuple(_spec(name, array) for name, array in inputs.items()),
        outputs=tuple(_spec(name, array) for name, array in outputs.items()),
        variants=(Variant(engine, "fp32", blob_of(model), tolerance),),
        golden=blob_of(golden),
        confidence=confidence,
    )
    path = model.parent / "manifest.json"
    path.write_bytes(encode_manifest(manifest))
    blobs = {blob_of(file).digest: file for file in (model, golden, path)}
    return Package(manifest, assignment_of(manifest, blob_of(path)), blobs, model, golden)


def scale_package(folder: Path, factor: float, *, version: str = "1", **options: Any) -> Package:
    """`y = x * factor`, FP32 [n, 4], with three golden rows."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    model = scale_model(folder / f"{factor}-{version}" / "model.onnx", factor)
    return write_package(model, {"x": x}, {"y": x * np.float32(factor)}, version=version, **options)


def desired_body(**packages: Package) -> tuple[bytes, dict[str, Path]]:
    """The body of a desired document, model name -> package, and the files it names."""
    blobs: dict[str, Path] = {}
    for package in packages.values():
        blobs |= package.blobs
    return encode_desired(Desired({name: package.assignment for name, package in packages.items()})), blobs


def blob_of(path: Path) -> Blob:
    data = path.read_bytes()
    return Blob(f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def _spec(name: str, array: np.ndarray[Any, Any]) -> TensorSpec:
    return TensorSpec(name, datatype_of(array.dtype), (-1, *array.shape[1:]))
