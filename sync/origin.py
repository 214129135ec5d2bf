"""Origins of HTTP sources: scheme, host and port, compared exactly, to decide who is shown a node's credential. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_ORIGINS = 16
"""Kept of what a hub says about itself: it has a handful of names."""
PORTS = {"http": 80, "https": 443}

# Stricter than any parser of URLs: where two of them could differ about the host (RFC 3986, 3.2), there is no origin.
_URL = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[^\s\x00-\x1f\x7f/?#@\\:\[\]%]{1,253})(?::([0-9]{1,5}))?(?:/[^\s\\]*)?", re.IGNORECASE
)


def origin_of(url: str) -> str | None:
    """`scheme://host:port` in lower case and with the port always said (RFC 6454, 4); None for what has no certain origin."""
    found = _URL.fullmatch(url)
    if found is None:
        return None
    scheme, host = found[1].lower(), found[2].lower()
    port = int(found[3]) if found[3] else PORTS[scheme]
    return f"{scheme}://{host}:{port}" if 0 < port < 65_536 else None


def origins_of(urls: Iterable[str]) -> tuple[str, ...]:
    """Each origin once, the first `MAX_ORIGINS` of them; what has none is left out."""
    return tuple(dict.fromkeys(origin for url in urls if (origin := origin_of(url))))[:MAX_ORIGINS]
