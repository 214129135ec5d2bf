"""What a link is, whoever provides it: its messages, its options, its protocol. Pure; knows no MQTT library."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from sync.errors import InvalidConfig

SPREAD_PER_NODE = 0.01
"""Seconds of reconnect jitter per node of the fleet: 10 s at 1,000 nodes, 100 s at 10,000."""
MAX_SPREAD = 120.0


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
    """`url`: mqtt://host:port. `fleet_size`: nodes that would reconnect together; it scales the jitter.

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


class LinkLike(Protocol):
    """What users of a link need; `Link` and `sync.testing.MemoryLink` meet it."""

    @property
    def connected(self) -> bool: ...
    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None: ...
    def subscribe(self, *filters: str) -> None: ...
    def messages(self) -> AsyncIterator[Message]: ...
    def on_connect(self, callback: Callable[[], None]) -> None: ...


def address_of(url: str) -> tuple[str, int]:
    """Host and port of `mqtt://host[:port]`. Raises InvalidConfig."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 1883
    except ValueError as error:
        raise InvalidConfig(f"broker {url!r}: {error}") from error
    if parts.scheme != "mqtt" or not host:
        raise InvalidConfig(f"broker {url!r} is not mqtt://host:port")
    return host, port


def reconnect_delay(attempt: int, options: LinkOptions, uniform: Callable[[float, float], float]) -> float:
    """Seconds before attempt number `attempt` (1 = first after a loss): exponential, jittered, spread over the fleet."""
    ceiling = min(options.max_delay, options.min_delay * 2.0 ** min(attempt - 1, 16))
    spread = min(MAX_SPREAD, options.fleet_size * SPREAD_PER_NODE)
    return uniform(ceiling / 2, ceiling) + uniform(0.0, spread)
