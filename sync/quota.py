"""How much of the disk a node's files may take, and which of them go first. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from sync.errors import InvalidConfig, StoreFailed

MIN_FREE_BYTES = 64 << 20
"""Left free on the disk unless said otherwise: the state, the outbox and the logs need room to go on."""
GiB = 1 << 30


class Quota(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[store]`. Bytes. `max_bytes`: of all files and half downloads together, None = what the disk has.

    `cache_bytes`: of those that no document of this node names, kept for its devices; the longest unused go first.
    `free_bytes`: no download may leave less of the disk than this.
    Raises InvalidConfig naming the field.
    """

    max_bytes: int | None = None
    cache_bytes: int = 0
    free_bytes: int = MIN_FREE_BYTES

    def __post_init__(self) -> None:
        for field in ("max_bytes", "cache_bytes", "free_bytes"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise InvalidConfig(f"store.{field}: {value} is below 0")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the store. `half`: a download that can be continued. `used`: Unix seconds of its last use."""

    digest: str
    size: int
    used: float
    half: bool = False


def to_remove(
    entries: Iterable[Entry],
    needed: Collection[str],
    busy: Collection[str],
    quota: Quota,
    free: int,
    room: int = 0,
) -> Sequence[Entry]:
    """What has to go so that the quota holds and `room` more bytes fit; half downloads first, then the longest unused.

    `needed`: never removed, half or whole. `busy`: being written, so not removed either. `free`: bytes the disk has left.
    """
    files = list(entries)
    loose = [entry for entry in files if entry.digest not in needed and entry.digest not in busy]
    loose.sort(key=lambda entry: (not entry.half, entry.used))
    total, cached = sum(entry.size for entry in files), sum(entry.size for entry in loose)
    gone: list[Entry] = []
    for entry in loose:
        over = quota.max_bytes is not None and total + room > quota.max_bytes
        if 0 < quota.cache_bytes >= cached and not over and free - room >= quota.free_bytes:
            break
        gone.append(entry)
        total, cached, free = total - entry.size, cached - entry.size, free + entry.size
    return gone


def check_room(total: int, free: int, room: int, quota: Quota) -> None:
    """Raises StoreFailed when `room` more bytes do not fit."""
    if quota.max_bytes is not None and total + room > quota.max_bytes:
        raise StoreFailed(
            f"no room for {room} more bytes: the store holds {total} that are needed, its quota is {quota.max_bytes}"
        )
    if free - room < quota.free_bytes:
        raise StoreFailed(
            f"no room for {room} more bytes: the disk has {free} left, of which {quota.free_bytes} stay free"
        )
