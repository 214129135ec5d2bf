"""Answers kept in this process: least recently used goes first, bounded by the bytes they hold.

What is kept is a private copy, and what is handed out cannot alter it: numeric arrays stand on immutable bytes, arrays of
BYTES are copied for each caller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from models.serving.predictor import InferResponse
from models.tensor import Array, bytes_of

ENTRY_BYTES = 1024
"""What an entry costs beside its arrays' data: its key, the answer, its dict."""
ARRAY_BYTES = 256
"""What an array costs beside its data."""
ELEMENT_BYTES = 48
"""What one BYTES element costs beside its data: a Python object and the reference to it."""
MAX_SHARE = 8
"""No single answer may take more than this fraction (1/8) of the budget."""


class Kept:
    """One answer as it is kept. `bytes`: what it holds, overhead included."""

    __slots__ = ("_answer", "_copied", "bytes")

    def __init__(self, answer: InferResponse) -> None:
        """Raises InvalidRequest for an output that is neither numbers nor text, which has no place on the wire either."""
        outputs = {name: _frozen(array, name) for name, array in answer.outputs.items()}
        self._answer = replace(answer, outputs=outputs, timings={}, id=None)
        self._copied = any(array.dtype.kind == "O" for array in outputs.values())
        self.bytes = ENTRY_BYTES + _weight(outputs)

    @property
    def answer(self) -> InferResponse:
        """To be read by whoever does not hand it out."""
        return self._answer

    def give(self, model: str, request_id: str | None, seconds: float) -> InferResponse:
        """The answer for a request of `model` with this id, which waited `seconds` for it. Never shared with another."""
        kept = self._answer
        outputs = kept.outputs
        return InferResponse(
            outputs={name: array.copy() for name, array in outputs.items()} if self._copied else dict(outputs),
            model=model,
            package=kept.package,
            version=kept.version,
            tier=kept.tier,
            confidence=kept.confidence,
            reason=kept.reason,
            timings={"cache": seconds},
            id=request_id,
        )


class Memory:
    """`budget`: bytes. `bytes`: held now; `evictions`: entries that had to go for others."""

    __slots__ = ("_budget", "_entries", "bytes", "evictions")

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: OrderedDict[bytes, Kept] = OrderedDict()
        self.bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Kept | None:
        kept = self._entries.get(key)
        if kept is not None:
            self._entries.move_to_end(key)
        return kept

    def takes(self, size: int) -> bool:
        """Whether an entry of `size` bytes may be kept: not when it would take more than 1/8 of the budget."""
        return size * MAX_SHARE <= self._budget

    def put(self, key: bytes, kept: Kept) -> None:
        """Keep an entry that `takes` allows, in place of those used longest ago. Nothing happens for a larger one."""
        if not self.takes(kept.bytes):
            return
        before = self._entries.pop(key, None)
        if before is not None:
            self.bytes -= before.bytes
        self._entries[key] = kept
        self.bytes += kept.bytes
        while self.bytes > self._budget:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.bytes
            self.evictions += 1

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0


def _weight(outputs: Mapping[str, Array]) -> int:
    weight = 0
    for name, array in outputs.items():
        weight += ARRAY_BYTES + len(name) + array.nbytes
        if array.dtype.kind == "O":
            weight += sum([ELEMENT_BYTES + len(element) for element in array.reshape(-1)])
    return weight


def _frozen(array: Array, name: str) -> Array:
    if array.dtype.kind == "O":
        frozen = np.empty(array.size, np.object_)
        for index, element in enumerate(array.reshape(-1)):
            frozen[index] = bytes_of(element, f"output '{name}'", index)
        return frozen.reshape(array.shape)
    if array.size == 0:
        return array.copy()
    # Bytes cannot be made writable again, an array that owns its data can.
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
