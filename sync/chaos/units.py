"""Durations and sizes as people write them."""

from __future__ import annotations

import re

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
FOREVER = float("inf")

_DURATION = re.compile(r"([+-]?\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SIZE = re.compile(r"(\d+)([kmg]?)(?:i?b)?", re.IGNORECASE)


def signed_seconds(text: str) -> float:
    """`200ms`, `10s`, `5m`, `2h`, `-400d`, as seconds. Raises ValueError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a duration such as 200ms, 10s, 5m, 2h or 400d")
    return float(found[1]) * SECONDS[found[2]]


def seconds(text: str) -> float:
    """As `signed_seconds`, 0 or more; `forever` too. Raises ValueError."""
    if text == "forever":
        return FOREVER
    found = signed_seconds(text)
    if found < 0:
        raise ValueError(f"{text!r} is less than nothing")
    return found


def size(text: str) -> int:
    """`64M`, `500k`, `1024`, as bytes, at least 1. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise ValueError(f"{text!r} is not a size such as 500k or 64M")
    return int(found[1]) * BYTES[found[2].lower()]
