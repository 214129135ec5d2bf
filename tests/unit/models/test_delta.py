"""What two files have in common is found wherever it has moved to."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.delta import MAX_CHUNK, chunks, literals, pieces, segments
from tests.proofs.delta import synthetic

RANDOM = random.Random(3)
NOISE = RANDOM.randbytes(300_000)


def made(old: bytes, new: bytes) -> tuple[bytes, int]:
    """`new` made again from `old`, and how many new bytes that took."""
    parts = segments(memoryview(old), memoryview(new))
    fresh = b"".join(literals(memoryview(new), parts))
    at, out = 0, b""
    for offset, length in parts:
        if offset < 0:
            out, at = out + fresh[at : at + length], at + length
        else:
            out += old[offset : offset + length]
    return out, len(fresh)


@pytest.mark.parametrize(
    ("new", "most"),
    [
        (NOISE, 0),
        (NOISE[:150_000] + b"inserted" + NOISE[150_000:], 70_000),
        (NOISE[200_000:] + NOISE[:200_000], 140_000),
        (b"", 0),
        (b"short", 5),
        (random.Random(4).randbytes(100_000), 100_000),
        (bytes(200_000), 200_000),
    ],
)
def test_the_new_file_comes_out_byte_for_byte(new: bytes, most: int) -> None:
    result, fresh = made(NOISE, new)
    assert result == new
    assert fresh <= most


def test_one_retrained_layer_costs_its_own_bytes(tmp_path: Path) -> None:
    old = synthetic(tmp_path / "old.onnx", 4.0, None).read_bytes()
    new = synthetic(tmp_path / "new.onnx", 4.0, 10, extra=True).read_bytes()
    result, fresh = made(old, new)
    assert result == new
    assert fresh < 0.06 * len(new)


def test_some_changed_rows_of_a_large_tensor_cost_their_blocks(tmp_path: Path) -> None:
    from tests.onnx_writer import Node, Value, write_model

    table = np.random.default_rng(1).random((4096, 64), np.float32)
    changed = table.copy()
    changed[100:110] = 0
    ends = ([Value("x", "FP32", ("n", 4096))], [Value("y", "FP32", ("n", 64))])
    files = [
        write_model(tmp_path / name, [Node("MatMul", ["x", "w"], ["y"])], *ends, {"w": array}).read_bytes()
        for name, array in (("old", table), ("new", changed))
    ]
    result, fresh = made(*files)
    assert result == files[1]
    assert fresh < 0.15 * len(files[1])


def test_pieces_cover_a_file_without_gaps_and_stay_small() -> None:
    data = memoryview(NOISE + bytes(500_000))
    spans = list(pieces(data))
    assert spans[0][0] == 0
    assert spans[-1][1] == len(data)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert max(end - start for start, end in spans) <= MAX_CHUNK


def test_cuts_depend_on_content_alone() -> None:
    shifted = b"x" * 1_000 + NOISE
    before = {NOISE[start:end] for start, end in chunks(memoryview(NOISE), 0, len(NOISE))}
    after = {shifted[start:end] for start, end in chunks(memoryview(shifted), 0, len(shifted))}
    assert len(before - after) <= 2
