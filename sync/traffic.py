"""What files cost a node's network and what kept them from coming: counts, read whenever somebody asks. In the event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from sync.errors import SyncError

WHOLE, RESUMED, DELTA, BLOCKS, MEDIUM, METADATA = "whole", "resumed", "delta", "blocks", "medium", "metadata"
"""The ways: over HTTP from the first byte; over HTTP from where an earlier attempt ended; a delta; over MQTT; from a folder
that a medium brought; metadata and other small files over HTTP. What carries it comes first: the bytes of a delta that came
over MQTT are `blocks`."""


class Counted(Protocol):
    """A transfer. `received`: bytes so far; `resumed`: what an earlier one left was continued. Written by its thread."""

    received: int
    resumed: bool


class Traffic:
    """`files` by way. `failures`: files that could not be had, by error code; `attempts`: the same of one source each.
    `refused_deltas`: those of no use; `saved`: bytes that the others saved."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.refused_deltas = 0
        self.saved = 0
        self._over: Counter[str] = Counter()
        self._running: dict[Counted, str] = {}

    def received(self) -> Mapping[str, int]:
        """Bytes by way, those of transfers under way included, whatever became of them."""
        total = Counter(self._over)
        for transfer, way in self._running.items():
            total[way_of(transfer, way)] += transfer.received
        return total

    @contextmanager
    def watching(self, transfer: Counted, way: str) -> Iterator[None]:
        """Count what `transfer` receives. `way`: as far as it is known before."""
        self._running[transfer] = way
        try:
            yield
        finally:
            del self._running[transfer]
            self._over[way_of(transfer, way)] += transfer.received

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one file from one source."""
        try:
            yield
        except SyncError as error:
            self.attempts[error.code] += 1
            raise

    @contextmanager
    def file(self) -> Iterator[None]:
        """Around one file from all of them."""
        try:
            yield
        except SyncError as error:
            self.failures[error.code] += 1
            raise


def way_of(transfer: Counted, way: str) -> str:
    """`way`, once it is known where the transfer began."""
    return RESUMED if way == WHOLE and transfer.resumed else way
