"""What the metadata of a call says: whose it is, until when it counts, which trace it belongs to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import isfinite

import msgspec

from models.errors import InvalidRequest
from models.serving.caller import Peer

DEADLINE_KEY = "tierline-deadline-ms"
MAX_PEERS = 1024
"""Addresses that are remembered; every connection has another one."""
_COMMON_NAME = "x509_common_name"


class Said(msgspec.Struct, frozen=True):
    """`budget`: seconds from now, None = nothing was said."""

    authorization: bytes | None = None
    budget: float | None = None
    trace: str | None = None


NOTHING = Said()


def read_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> Said:
    """Of a key sent twice, the last one counts. Raises InvalidRequest."""
    said = NOTHING
    for key, value in metadata:
        if key == "authorization":
            authorization = value.encode() if isinstance(value, str) else value
            said = msgspec.structs.replace(said, authorization=authorization)
        elif key == DEADLINE_KEY:
            said = msgspec.structs.replace(said, budget=_seconds(value))
        elif key == "traceparent" and isinstance(value, str):
            said = msgspec.structs.replace(said, trace=value)
    return said


def read_peer(text: str, encrypted: Mapping[str, Sequence[bytes]] | None) -> Peer:
    """The other end, as grpc writes it. `encrypted`: what TLS knows of it, None = the connection is not TLS."""
    if encrypted is None:
        return _peer(text)
    names = encrypted.get(_COMMON_NAME)
    certificate = names[0].decode("utf-8", "replace") if names else None
    return Peer(_peer(text).address, certificate, True)


@lru_cache(maxsize=MAX_PEERS)
def _peer(text: str) -> Peer:
    # Such as ipv4:127.0.0.1:1234 and ipv6:%5B::1%5D:1234 and unix:/path of gRPC's "Name resolution".
    family, _, rest = text.partition(":")
    if family == "unix":
        return Peer("unix")
    host = rest.rpartition(":")[0]
    return Peer(host.replace("%5B", "").replace("%5D", "").strip("[]"))


def _seconds(value: str | bytes) -> float:
    try:
        remaining = float(value)
    except ValueError:
        remaining = float("nan")
    if not isfinite(remaining):
        raise InvalidRequest(f"{DEADLINE_KEY} {value!r} is not a number of milliseconds")
    return remaining / 1e3
