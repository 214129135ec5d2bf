"""A delta: how to make a file from one that is here. Its format, and applying it. Knows no model formats.

    "TLD1"   length of the recipe, 4 bytes big-endian   recipe, MessagePack   new bytes, one zlib stream

Whoever made it is trusted for nothing: memory is bounded by the recipe's limit and two buffers, output by the size that was
signed for, and the result counts only when it has the digest that was signed for.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import msgspec

from sync.durable import disk
from sync.errors import Malformed

MAGIC = b"TLD1"
FORMAT = 1
MAX_SEGMENTS = 65_536
MAX_RECIPE_BYTES = 1 << 20
BUFFER = 256 * 1024

_LENGTH = struct.Struct(">I")


class Recipe(msgspec.Struct, frozen=True, array_like=True):
    """`segments`: (offset in the base, length), or (-1, length) for as many new bytes. Digests as `sha256:<hex>`, sizes in
    bytes."""

    format: int
    base: str
    base_size: int
    target: str
    size: int
    segments: list[tuple[int, int]]


class Offer(msgspec.Struct, frozen=True):
    """A source's answer: the delta from `base` is the blob `delta` of `size` bytes."""

    base: str
    delta: str
    size: int


def write(out: BinaryIO, recipe: Recipe, new: Iterable[bytes | memoryview]) -> None:
    """`new`: the new bytes in the order of the segments. Raises Malformed when the recipe is beyond its bounds."""
    head = msgspec.msgpack.encode(recipe)
    if len(recipe.segments) > MAX_SEGMENTS or len(head) > MAX_RECIPE_BYTES:
        raise Malformed(f"delta: {len(recipe.segments)} segments, at most {MAX_SEGMENTS} are allowed")
    out.write(MAGIC + _LENGTH.pack(len(head)) + head)
    packer = zlib.compressobj(6)
    for piece in new:
        for start in range(0, len(piece), BUFFER):
            out.write(packer.compress(piece[start : start + BUFFER]))
    out.write(packer.flush())


def read_recipe(delta: BinaryIO) -> Recipe:
    """The recipe at the beginning of a delta. Raises Malformed."""
    start = delta.read(len(MAGIC) + _LENGTH.size)
    if len(start) < len(MAGIC) + _LENGTH.size or start[: len(MAGIC)] != MAGIC:
        raise Malformed("delta: not a delta of a format this release reads")
    (length,) = _LENGTH.unpack(start[len(MAGIC) :])
    if length > MAX_RECIPE_BYTES:
        raise Malformed(f"delta: a recipe of {length} bytes, at most {MAX_RECIPE_BYTES} are accepted")
    try:
        recipe = msgspec.msgpack.decode(delta.read(length), type=Recipe)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"delta: recipe: {error}") from error
    if recipe.format != FORMAT:
        raise Malformed(f"delta: format {recipe.format}, this release reads format {FORMAT}")
    return recipe


def apply(base: Path, delta: Path, out: Path, *, base_digest: str, digest: str, size: int) -> None:
    """Write the file `digest` of `size` bytes, as they were signed for, to `out`.

    Raises Malformed for a delta that is wrong in any way, StoreFailed. `out` is removed then.
    """
    done = False
    try:
        with disk(f"write {out}"), base.open("rb") as old, delta.open("rb") as given, out.open("wb") as new:
            recipe = read_recipe(given)
            _check(recipe, os.fstat(old.fileno()).st_size, base_digest, digest, size)
            hasher = sha256()
            for piece in _pieces(recipe, old, given):
                hasher.update(piece)
                new.write(piece)
        if f"sha256:{hasher.hexdigest()}" != digest:
            raise Malformed("delta: the result has another digest than was signed for")
        done = True
    finally:
        if not done:
            out.unlink(missing_ok=True)


def _check(recipe: Recipe, base_size: int, base: str, digest: str, size: int) -> None:
    if (recipe.base, recipe.base_size, recipe.target, recipe.size) != (base, base_size, digest, size):
        raise Malformed("delta: it is between other files")
    if len(recipe.segments) > MAX_SEGMENTS:
        raise Malformed(f"delta: {len(recipe.segments)} segments, at most {MAX_SEGMENTS} are accepted")
    total = 0
    for offset, length in recipe.segments:
        total += length
        if length <= 0 or offset < -1 or (offset >= 0 and offset + length > base_size):
            raise Malformed(f"delta: a segment of {length} bytes at {offset} of a base of {base_size}")
    if total != size:
        raise Malformed(f"delta: its segments make {total} bytes, {size} were signed for")


def _pieces(recipe: Recipe, base: BinaryIO, delta: BinaryIO) -> Iterator[bytes]:
    unpacker = _Unpacker(delta)
    for offset, length in recipe.segments:
        left = length
        if offset >= 0:
            base.seek(offset)
        while left:
            most = min(BUFFER, left)
            piece = base.read(most) if offset >= 0 else unpacker.read(most)
            if not piece:
                raise Malformed("delta: it ends too soon")
            left -= len(piece)
            yield piece


class _Unpacker:
    """The new bytes, never more at once than asked for: a small stream may stand for an endless one."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._zlib = zlib.decompressobj()

    def read(self, most: int) -> bytes:
        while True:
            packed = self._zlib.unconsumed_tail or self._source.read(BUFFER)
            try:
                piece = self._zlib.decompress(packed, most)
            except zlib.error as error:
                raise Malformed(f"delta: {error}") from error
            if piece or not packed or self._zlib.eof:
                return piece
