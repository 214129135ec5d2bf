"""What deltas save: on the zoo's own versions, and on a synthetic model of which one layer was retrained.

python -m tests.proofs.delta [--megabytes 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from models.delta import literals, segments
from sync.delta import FORMAT, Recipe, apply, write
from tests.onnx_writer import Node, Value, write_model

ZOO = Path("models/zoo/digits/artifacts")
LAYERS = 20


def measure(name: str, old: Path, new: Path, folder: Path) -> dict[str, Any]:
    """Make the delta, apply it, compare the result byte for byte. Raises AssertionError when it differs."""
    base, target = old.read_bytes(), new.read_bytes()
    names = [f"sha256:{sha256(data).hexdigest()}" for data in (base, target)]
    began = time.perf_counter()
    parts = segments(memoryview(base), memoryview(target))
    delta = folder / "delta"
    with delta.open("wb") as out:
        write(
            out, Recipe(FORMAT, names[0], len(base), names[1], len(target), parts), literals(memoryview(target), parts)
        )
    made = time.perf_counter()
    apply(old, delta, folder / "result", base_digest=names[0], digest=names[1], size=len(target))
    applied = time.perf_counter()
    assert (folder / "result").read_bytes() == target
    return {
        "files": name,
        "bytes": len(target),
        "delta": delta.stat().st_size,
        "share": round(delta.stat().st_size / len(target), 4),
        "segments": len(parts),
        "make_seconds": round(made - began, 3),
        "apply_seconds": round(applied - made, 3),
    }


def synthetic(path: Path, megabytes: float, changed: int | None, extra: bool = False) -> Path:
    """A chain of `LAYERS` dense layers; layer `changed` has other weights, `extra` puts one more in front."""
    width = int((megabytes * 1e6 / LAYERS / 4) ** 0.5)
    weights = {}
    for layer in range(LAYERS):
        random = np.random.default_rng(layer + (1000 if layer == changed else 0))
        weights[f"w{layer}"] = random.standard_normal((width, width), np.float32)
    nodes = [Node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]) for layer in range(LAYERS)]
    if extra:
        nodes.insert(0, Node("Relu", ["x"], ["x0"]))
    inputs = [Value("x" if extra else "x0", "FP32", ("n", width))]
    return write_model(path, nodes, inputs, [Value(f"x{LAYERS}", "FP32", ("n", width))], weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for new in sorted(ZOO.glob("2/*/model.*")):
            old = ZOO / "1" / new.relative_to(ZOO / "2")
            if old.exists():
                rows.append(measure(f"digits {new.parent.name} {new.suffix[1:]}, 1 -> 2", old, new, folder))
        old = synthetic(folder / "old.onnx", options.megabytes, None)
        for title, changed, extra in (
            ("one of 20 layers retrained", 10, False),
            ("one layer retrained, one operator added in front", 10, True),
        ):
            new = synthetic(folder / "new.onnx", options.megabytes, changed, extra)
            rows.append(measure(f"{options.megabytes:g} MB, {title}", old, new, folder))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['files']:<62} {row['bytes']:>10} -> {row['delta']:>9} bytes ({row['share']:7.2%}), "
            f"made in {row['make_seconds']:.2f} s, applied in {row['apply_seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
