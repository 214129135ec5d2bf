"""A delta is believed in nothing: lies, bombs and damage end in a refusal with a reason, within bounds."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from sync.delta import FORMAT, MAGIC, MAX_RECIPE_BYTES, MAX_SEGMENTS, Recipe, apply, read_recipe, write
from sync.errors import Malformed

OLD, NEW = b"abcdefgh" * 10_000, b"abcdefgh" * 5_000 + b"new bytes" + b"abcdefgh" * 100


def digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def recipe(segments: Sequence[tuple[int, int]] | None = None, **changed: object) -> Recipe:
    honest = [(0, 40_000), (-1, 9), (0, 800)]
    fields: dict[str, object] = {
        "format": FORMAT,
        "base": digest(OLD),
        "base_size": len(OLD),
        "target": digest(NEW),
        "size": len(NEW),
        "segments": list(honest if segments is None else segments),
        **changed,
    }
    return Recipe(**fields)  # type: ignore[arg-type]


def packed(of: Recipe, new: bytes = b"new bytes") -> bytes:
    head = msgspec.msgpack.encode(of)
    return MAGIC + struct.pack(">I", len(head)) + head + zlib.compress(new)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "old").write_bytes(OLD)
    return tmp_path


def attempt(place: Path, delta: bytes) -> bytes:
    (place / "delta").write_bytes(delta)
    apply(place / "old", place / "delta", place / "out", base_digest=digest(OLD), digest=digest(NEW), size=len(NEW))
    return (place / "out").read_bytes()


def test_an_honest_delta_makes_the_file(place: Path) -> None:
    assert attempt(place, packed(recipe())) == NEW
    out = io.BytesIO()
    write(out, recipe(), [b"new ", memoryview(b"bytes")])
    assert attempt(place, out.getvalue()) == NEW


LIES = [
    (packed(recipe(), b"bad bytes"), "another digest"),
    (packed(recipe(), b"new"), "ends too soon"),
    (packed(recipe())[:-10], "ends too soon"),
    (packed(recipe(base=digest(b"x"))), "between other files"),
    (packed(recipe(base_size=1)), "between other files"),
    (packed(recipe(target=digest(b"x"))), "between other files"),
    (packed(recipe(size=1 << 60)), "between other files"),
    (packed(recipe([(0, 1 << 40)])), "a segment of"),
    (packed(recipe([(-1, 1 << 40)])), "its segments make"),
    (packed(recipe([(len(OLD) - 1, 2)])), "a segment of"),
    (packed(recipe([(-2, 9)])), "a segment of"),
    (packed(recipe([(0, 0)])), "a segment of"),
    (packed(recipe([(0, -5)])), "a segment of"),
    (packed(recipe([])), "its segments make 0"),
    (packed(recipe([(0, 1)] * (MAX_SEGMENTS + 1))), "segments|recipe"),
    (packed(recipe(format=2)), "format 2"),
    (b"", "not a delta"),
    (b"TLD2" + packed(recipe())[4:], "not a delta"),
    (MAGIC + struct.pack(">I", MAX_RECIPE_BYTES + 1), "at most"),
    (MAGIC + struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1", "recipe"),
    (MAGIC + struct.pack(">I", 1000) + b"\x91" * 1000, "recipe"),
    (packed(recipe())[: -len(zlib.compress(b"new bytes"))] + b"not zlib", "delta:"),
]


@pytest.mark.parametrize("number", range(len(LIES)))
def test_a_delta_that_lies_is_refused_with_a_reason_and_leaves_nothing(place: Path, number: int) -> None:
    delta, reason = LIES[number]
    with pytest.raises(Malformed, match=reason):
        attempt(place, delta)
    assert not (place / "out").exists()


def test_a_small_stream_that_stands_for_an_endless_one_costs_neither_memory_nor_disk(place: Path) -> None:
    bomb = packed(recipe(), bytes(200_000_000))
    assert len(bomb) < 300_000
    tracemalloc.start()
    with pytest.raises(Malformed, match="another digest"):
        attempt(place, bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


def test_damage_anywhere_is_refused_or_harmless(place: Path) -> None:
    honest, uniform = packed(recipe()), random.Random(5)
    for _ in range(300):
        data = bytearray(honest)
        data[uniform.randrange(len(data))] ^= 1 << uniform.randrange(8)
        try:
            assert attempt(place, bytes(data)) == NEW  # what is damaged was never read
        except Malformed:
            assert not (place / "out").exists()


def test_a_recipe_beyond_its_bounds_is_not_written() -> None:
    with pytest.raises(Malformed, match="segments"):
        write(io.BytesIO(), recipe([(0, 1)] * (MAX_SEGMENTS + 1)), [])
    with pytest.raises(Malformed):
        read_recipe(io.BytesIO(b"TLD1"))
