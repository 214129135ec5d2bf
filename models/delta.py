"""What a new model file has in common with an old one: which parts to copy, which bytes are new. Pure.

Both are cut into pieces: tensors at their own bounds, everything else where its content says so (a gear hash over 32 bytes,
as in FastCDC, Xia et al., USENIX ATC 2016). A piece of the new file whose sha256 the old one also has is copied. So a layer
that was retrained costs its own bytes, wherever the others have moved to.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from models.tensors import Span, tensor_spans

BLOCK = 64 * 1024
"""Tensors are cut into blocks of this size from their first byte on: a change of some rows costs these blocks."""
MIN_CHUNK, MEAN_CHUNK, MAX_CHUNK = 2 * 1024, 8 * 1024, 64 * 1024
WINDOW = 32
"""Bytes that decide about a cut."""
STRIDE = 4 << 20
"""Bytes hashed at a time: what the hash of a large file needs in memory."""

Segment = tuple[int, int]
"""Offset in the old file and length; offset -1: `length` new bytes, which follow those of the segment before."""


def _gear() -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    words = b"".join(sha256(b"tierline gear %d" % number).digest() for number in range(32))
    return np.frombuffer(words, np.uint32).copy()


_GEAR = _gear()
_MASK = np.uint32((MEAN_CHUNK - 1) << (32 - MEAN_CHUNK.bit_length() + 1))


def segments(old: memoryview, new: memoryview) -> list[Segment]:
    """How to make `new` from `old` and new bytes, in order."""
    known: dict[bytes, int] = {}
    for start, end in pieces(old):
        known.setdefault(sha256(old[start:end]).digest(), start)
    found: list[Segment] = []
    for start, end in pieces(new):
        offset = known.get(sha256(new[start:end]).digest(), -1)
        length = end - start
        if found and _continues(found[-1], offset):
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


def _continues(last: Segment, offset: int) -> bool:
    if last[0] < 0 or offset < 0:
        return last[0] == offset
    return last[0] + last[1] == offset


def literals(new: memoryview, parts: list[Segment]) -> Iterator[memoryview]:
    """The new bytes that `parts` (of `segments`) ask for, in order."""
    at = 0
    for offset, length in parts:
        if offset < 0:
            yield new[at : at + length]
        at += length


def pieces(data: memoryview) -> Iterator[Span]:
    """`data` cut into pieces, without gaps."""
    at = 0
    for start, end in tensor_spans(data):
        yield from chunks(data, at, start)
        yield from ((first, min(first + BLOCK, end)) for first in range(start, end, BLOCK))
        at = end
    yield from chunks(data, at, len(data))


def chunks(data: memoryview, start: int, end: int) -> Iterator[Span]:
    """Pieces of a range, cut where its content says so."""
    first = start
    for cut in _cuts(data, start, end):
        while cut - first > MAX_CHUNK:
            yield first, first + MAX_CHUNK
            first += MAX_CHUNK
        if cut - first >= MIN_CHUNK:
            yield first, cut
            first = cut
    while end - first > MAX_CHUNK:
        yield first, first + MAX_CHUNK
        first += MAX_CHUNK
    if end > first:
        yield first, end


def _cuts(data: memoryview, start: int, end: int) -> Iterator[int]:
    for at in range(start, end, STRIDE):
        before = max(start, at - WINDOW)
        part = np.frombuffer(data[before : min(at + STRIDE, end)], np.uint8)
        hashes = _GEAR[part]
        width = 1
        while width < WINDOW:  # h[i] = sum of gear[b[i - k]] << k for k < 32, by doubling
            hashes[width:] += hashes[:-width] << np.uint32(width)
            width *= 2
        hits = np.flatnonzero((hashes & _MASK) == 0)
        yield from (before + int(hit) + 1 for hit in hits if before + hit >= at)
