"""What a link is, whoever provides it: its messages, its options, its protocol. Pure; knows no MQTT library."""

from __future__ import annotations

import re
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from sync.errors import InvalidConfig

SPREAD_PER_NODE = 0.01
"""Seconds of reconnect jitter per node of the fleet: 10 s at 1,000 nodes, 100 s at 10,000."""
MAX_SPREAD = 120.0
SESSION_SECONDS = 86_400
"""How long the broker keeps our session while we are away."""
MAX_FLEET = 1_000_000
"""Largest fleet a hub may claim: it only scales a jitter that is bounded anyway."""
PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}


@dataclass(frozen=True, slots=True)
class Message:
    """What arrived. `retain`: it is the broker's stored copy; never branch on it, some brokers set it wrongly."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for us when we vanish. Always retained, QoS 1."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """`url`: mqtt, mqtts, ws or wss. `fleet_size`: nodes that would reconnect together; it scales the jitter.

    `tls`: makes the context of each new connection, so that a renewed certificate is used from the next one on; needed for
    mqtts and wss. `proxy`: http://[user:password@]host:port of an HTTP proxy to tunnel through. `session_seconds`: how long the
    broker keeps our session while we are away.

    `keepalive`, `min_delay`, `max_delay`: seconds. `window`: publishes without acknowledgement under way (a broker may ask
    for fewer). `max_outgoing`, `max_incoming`: messages that may wait on either side.
    """

    url: str
    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    will: Will | None = None
    fleet_size: int = 1
    keepalive: int = 30
    min_delay: float = 0.5
    max_delay: float = 30.0
    window: int = 20
    max_outgoing: int = 10_000
    max_incoming: int = 1_000
    tls: Callable[[], ssl.SSLContext] | None = None
    proxy: str | None = field(default=None, repr=False)
    session_seconds: int = SESSION_SECONDS


class LinkLike(Protocol):
    """What users of a link need; `Link` and `sync.testing.MemoryLink` meet it."""

    @property
    def connected(self) -> bool: ...
    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None: ...
    def subscribe(self, *filters: str) -> None: ...
    def messages(self) -> AsyncIterator[Message]: ...
    def on_connect(self, callback: Callable[[], None]) -> None: ...
    def fleet(self, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is. `path`: of a WebSocket, None = plain MQTT."""

    host: str
    port: int
    tls: bool
    path: str | None


def broker_address(url: str) -> Address:
    """Raises InvalidConfig for anything but mqtt, mqtts, ws or wss with a host and without credentials in it, and does not
    repeat those."""
    shown = re.sub(r"//.*@", "//...@", url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidConfig(f"broker {shown!r}: {error}") from error
    web = parts.scheme in ("ws", "wss")
    extra = parts.query or parts.fragment or parts.username or (parts.path.strip("/") and not web)
    if parts.scheme not in PORTS or not host or extra:
        raise InvalidConfig(f"broker {shown!r} is not mqtt://host:port, mqtts://..., ws://host:port/path or wss://...")
    path = (parts.path if parts.path not in ("", "/") else "/mqtt") if web else None
    return Address(host, port or PORTS[parts.scheme], parts.scheme in ("mqtts", "wss"), path)


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a broker's URL. Raises InvalidConfig."""
    address = broker_address(url)
    return address.host, address.port


def spread(fleet_size: int) -> float:
    """Seconds over which a fleet spreads what all of it would do at once, reconnecting above all."""
    return min(MAX_SPREAD, max(fleet_size, 1) * SPREAD_PER_NODE)


def reconnect_delay(
    attempt: int, options: LinkOptions, uniform: Callable[[float, float], float], fleet_size: int | None = None
) -> float:
    """Seconds before attempt number `attempt` (1 = first after a loss): exponential, jittered, spread over the fleet.

    `fleet_size`: what the hub last said, None = what the options say.
    """
    ceiling = min(options.max_delay, options.min_delay * 2.0 ** min(attempt - 1, 16))
    return uniform(ceiling / 2, ceiling) + uniform(0.0, spread(fleet_size or options.fleet_size))
