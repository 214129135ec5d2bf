"""The fetcher against every way a source can misbehave: the right file or a reason, never other bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sync.chaos import NeverFired
from sync.chaos.source import FILES, WAYS, MisbehavingSource
from sync.download import Limits
from sync.errors import DigestMismatch, Unavailable
from sync.fetch import Fetcher, Source
from sync.store import BlobStore
from sync.testing import FakeClock

DATA = bytes(range(256)) * 1_000
LIMITS = Limits(connect_seconds=1, read_seconds=0.3, budget_seconds=0.5, slowest_rate=10_000_000)


class Impatient(FakeClock):
    """Pauses between rounds take no time."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)


@pytest.fixture
def source() -> Iterator[MisbehavingSource]:
    with MisbehavingSource() as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def fetcher(store: BlobStore, *sources: MisbehavingSource) -> Fetcher:
    return Fetcher([Source(item.url) for item in sources], store, clock=Impatient(), limits=LIMITS)


@pytest.mark.parametrize("how", sorted(WAYS))
async def test_one_misbehaviour_and_then_honesty_gives_the_file_or_a_reason(
    source: MisbehavingSource, store: BlobStore, how: str
) -> None:
    digest = source.add(DATA)
    source.misbehave(FILES, how)
    try:
        path = await fetcher(store, source).fetch(digest, len(DATA))
        assert path.read_bytes() == DATA
    except DigestMismatch:
        assert how in ("wrong", "longer", "endless")
        assert not store.has(digest)
    source.insist(how)


@pytest.mark.parametrize("how", sorted(set(WAYS) - {"honest", "rangeless", "shifted"}))
async def test_a_source_that_never_delivers_is_a_reason_within_its_budget(
    source: MisbehavingSource, store: BlobStore, how: str
) -> None:
    digest = source.add(DATA)
    source.misbehave(FILES, how, times=None)
    began = time.monotonic()
    # "truncated" gives half of what is left each time: three rounds are too few for the whole of it.
    with pytest.raises((Unavailable, DigestMismatch)):
        await fetcher(store, source).fetch(digest, len(DATA))
    assert time.monotonic() - began < 4
    assert not store.has(digest)


async def test_a_cut_transfer_goes_on_where_it_broke(source: MisbehavingSource, store: BlobStore) -> None:
    digest = source.add(DATA)
    source.misbehave(FILES, "truncated", times=2)
    await fetcher(store, source).fetch(digest, len(DATA))
    half, quarter = len(DATA) // 2, len(DATA) // 2 + len(DATA) // 4
    assert [asked for _, asked, _ in source.requests] == [None, f"bytes={half}-", f"bytes={quarter}-"]


async def test_an_evil_mirror_does_not_keep_the_file_from_coming_from_the_next_source(
    source: MisbehavingSource, store: BlobStore
) -> None:
    with MisbehavingSource() as good:
        digest = good.add(DATA)
        source.add(DATA)
        source.misbehave(FILES, "wrong", times=None)
        path = await fetcher(store, source, good).fetch(digest, len(DATA))
    assert path.read_bytes() == DATA
    source.insist("wrong")


def test_a_misbehaviour_that_met_nobody_says_so(source: MisbehavingSource) -> None:
    source.misbehave(FILES, "dripping")
    with pytest.raises(NeverFired, match="dripping"):
        source.insist("dripping")


def test_an_unknown_way_is_named(source: MisbehavingSource) -> None:
    with pytest.raises(ValueError, match="no way 'nicely'"):
        source.misbehave(FILES, "nicely")
