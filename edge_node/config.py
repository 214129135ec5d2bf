"""Configuration of an edge node: one TOML file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from models.serving.process import MAX_PORT
from models.serving.remote import check_url
from sync.errors import InvalidConfig
from sync.identity import LOOPBACK, Membership, load_config


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the data plane answers. `port` 0 = chosen by the system. Loopback only until nodes can be enrolled."""

    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise ValueError(f"port {self.port} is not 0 to {MAX_PORT}")


class Up(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tier above: the base URL of a server that speaks the Open Inference Protocol."""

    url: str

    def __post_init__(self) -> None:
        check_url(self.url)


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`threads`: engine threads for models too slow to run in the event loop (0.2 ms); one per core is enough."""

    threads: int = 2

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads {self.threads} is not 1 or more")


class EdgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[node]` who it is and whom it trusts, `[listen]`, `[serving]`, and `[up]`, absent = there is no tier above."""

    node: Membership
    listen: Listen = Listen()
    serving: Serving = Serving()
    up: Up | None = None


def load_edge_config(path: Path) -> EdgeConfig:
    """Read and check. Raises InvalidConfig naming the file and the field."""
    config = load_config(path, EdgeConfig)
    if config.node.tier != "edge":
        raise InvalidConfig(f"{path}: node.tier is {config.node.tier!r}, an edge node's is 'edge'")
    if config.listen.host not in LOOPBACK:
        raise InvalidConfig(
            f"{path}: listen.host {config.listen.host!r} is not loopback; until nodes can be enrolled "
            "with certificates nothing binds beyond it"
        )
    return config
