"""Deltas on the node: which files here may serve as a base, what a source's offer is worth. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sync.delta import Offer
from sync.errors import Malformed
from sync.quota import Entry
from sync.trust import check_digest

MIN_BYTES = 16 * 1024
"""A smaller file is fetched whole: the questions would cost as much."""
MAX_BASES = 8
"""Files that are named to a source: 8 digests fit a URL."""
MAX_RATIO = 3.0
"""A base that is so many times larger or smaller is another kind of file."""
WORTH = 0.8
"""Of what is still missing: a delta above it is not used."""
MAX_OFFER_BYTES = 1_024


def bases_for(digest: str, size: int, entries: Iterable[Entry]) -> list[str]:
    """Files of about this size, the one used last first."""
    near = [
        entry
        for entry in entries
        if not entry.half
        and entry.size
        and entry.digest != digest
        and max(size, entry.size) <= MAX_RATIO * min(size, entry.size)
    ]
    near.sort(key=lambda entry: -entry.used)
    return [entry.digest for entry in near[:MAX_BASES]]


def question(digest: str, bases: Iterable[str]) -> str:
    """The path to ask a source under."""
    return f"/deltas/{digest}?from={','.join(bases)}"


def read_offer(answer: bytes, bases: Iterable[str], missing: int) -> Offer | None:
    """The offer, None when it is not worth it. Raises Malformed for an offer of something else than was asked for."""
    try:
        offer = msgspec.json.decode(answer, type=Offer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"delta: offer: {error}") from error
    if offer.base not in set(bases):
        raise Malformed("delta: offer: its base was not asked for")
    check_digest(offer.delta)
    return offer if 0 < offer.size < WORTH * missing else None
