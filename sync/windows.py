"""Maintenance windows: when a node may change what it runs. Pure: the time comes in as Unix seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from sync.errors import Malformed

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_WINDOWS = 32
MINUTES_PER_DAY = 24 * 60
MAX_MINUTES = 7 * MINUTES_PER_DAY

_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")
_OFFSET = re.compile(r"([+-])(0\d|1[0-4]):([0-5]\d)")


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Opens at `start` (`HH:MM`) on `days` (mon ... sun, () = every day) for `minutes`.

    `zone`: UTC, an offset such as `+02:00`, or a name of the IANA time zone database.
    """

    start: str
    minutes: int
    days: tuple[str, ...] = ()
    zone: str = "UTC"


def check_windows(windows: Sequence[Window]) -> None:
    """Raises Malformed naming the field."""
    if len(windows) > MAX_WINDOWS:
        raise Malformed(f"windows: {len(windows)} given, at most {MAX_WINDOWS} are accepted")
    for index, window in enumerate(windows):
        field = f"windows[{index}]"
        if not _TIME.fullmatch(window.start):
            raise Malformed(f"{field}.start: {window.start[:20]!r} is not HH:MM")
        if not 1 <= window.minutes <= MAX_MINUTES:
            raise Malformed(f"{field}.minutes: {window.minutes} is not between 1 and {MAX_MINUTES}")
        for day in window.days:
            if day not in DAYS:
                raise Malformed(f"{field}.days: {day[:20]!r} is none of {', '.join(DAYS)}")
        try:
            zone_of(window.zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise Malformed(f"{field}.zone: {window.zone[:60]!r} is no time zone known here") from error


def zone_of(name: str) -> tzinfo:
    """Raises ZoneInfoNotFoundError, ValueError or OSError for a name this machine does not know."""
    if name == "UTC":
        return UTC
    found = _OFFSET.fullmatch(name)
    if found is None:
        return ZoneInfo(name)
    offset = timedelta(hours=int(found[2]), minutes=int(found[3]))
    return timezone(-offset if found[1] == "-" else offset)


def is_open(windows: Sequence[Window], now: float) -> bool:
    """Whether one is open at `now`; no windows = always."""
    return not windows or any(
        start <= now < end
        for window in windows
        for start, end in _openings(window, now, range(-(window.minutes // MINUTES_PER_DAY) - 2, 2))
    )


def next_opening(windows: Sequence[Window], now: float) -> float | None:
    """Unix seconds of the next opening after `now`, None without windows."""
    return min(
        (start for window in windows for start, _ in _openings(window, now, range(-1, 9)) if start > now), default=None
    )


def _openings(window: Window, now: float, days: range) -> Iterator[tuple[float, float]]:
    """(opening, closing) of each day among `days`, 0 = today where the window is.

    Local times that a clock change skips or repeats are read as PEP 495 does with fold=0; the length is real time.
    """
    zone = zone_of(window.zone)
    hour, minute = (int(part) for part in window.start.split(":"))
    today = datetime.fromtimestamp(now, zone).date()
    for day in days:
        date = today + timedelta(days=day)
        if window.days and DAYS[date.weekday()] not in window.days:
            continue
        opening = datetime(date.year, date.month, date.day, hour, minute, tzinfo=zone).timestamp()
        yield opening, opening + 60 * window.minutes
