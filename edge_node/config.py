"""Configuration of an edge node: one TOML file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from models.serving.assembly import Listening
from models.serving.remote import check_url
from sync.errors import InvalidConfig
from sync.identity import LOOPBACK, Membership, load_config


class Up(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tier above: the base URL of a server that speaks the Open Inference Protocol."""

    url: str

    def __post_init__(self) -> None:
        check_url(self.url)


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`threads`: engine threads for models too slow to run in the event loop (0.2 ms), None = one per usable core."""

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads {self.threads} is not 1 or more")


class EdgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[node]` who it is and whom it trusts, `[listen]` where it answers, `[serving]`, and `[up]`, absent = none is above."""

    node: Membership
    listen: Listening = Listening()
    serving: Serving = Serving()
    up: Up | None = None


def load_edge_config(path: Path) -> EdgeConfig:
    """Read and check. Raises InvalidConfig naming the file and the field."""
    config = load_config(path, EdgeConfig)
    if config.node.tier != "edge":
        raise InvalidConfig(f"{path}: node.tier is {config.node.tier!r}, an edge node's is 'edge'")
    if config.listen.host not in LOOPBACK or config.listen.metrics_host not in LOOPBACK:
        raise InvalidConfig(
            f"{path}: listen.host or listen.metrics_host is not loopback; until nodes can be enrolled "
            "with certificates nothing binds beyond it"
        )
    return config
