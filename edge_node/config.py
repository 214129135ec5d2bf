"""Configuration of an edge node: one TOML file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_node.shares import MirrorSettings
from models.serving.assembly import Listening
from models.serving.remote import check_url
from sync.blocks import BlockSettings
from sync.errors import InvalidConfig
from sync.identity import LOOPBACK, Membership, load_config
from sync.quota import Quota
from sync.settings import Settings

CACHE_BYTES = 8 << 30
"""Of files kept for the devices behind it, unless `[store]` says otherwise."""


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
    """`[node]` who it is and whom it trusts, `[listen]` where it answers, `[serving]`, `[up]`, absent = none is above,
    `[updates]`: when and how it updates, as far as the hub's settings say nothing else, `[store]`: how much disk its files
    may take, `[mirror]`: what each device behind it may take of them, and `[blocks]`: files over MQTT."""

    node: Membership
    listen: Listening = Listening()
    serving: Serving = Serving()
    up: Up | None = None
    updates: Settings = Settings()
    store: Quota = Quota(cache_bytes=CACHE_BYTES)
    mirror: MirrorSettings = MirrorSettings()
    blocks: BlockSettings = BlockSettings()


def load_edge_config(path: Path) -> EdgeConfig:
    """Read and check. Raises InvalidConfig naming the file and the field."""
    config = load_config(path, EdgeConfig)
    if config.node.tier != "edge":
        raise InvalidConfig(f"{path}: node.tier is {config.node.tier!r}, an edge node's is 'edge'")
    check_listening(path, config.listen)
    return config


def check_listening(path: Path, listen: Listening) -> None:
    """Beyond this machine only callers that are known, over TLS. Raises InvalidConfig naming the field."""
    known = listen.access is not None or (listen.tls is not None and listen.tls.client_ca is not None)
    if listen.host not in LOOPBACK and not (listen.tls is not None and known):
        raise InvalidConfig(
            f"{path}: listen.host {listen.host!r} is not loopback: others may come with [listen.tls] and either "
            "listen.access or listen.tls.client_ca; its identity serves: cert = 'identity/cert.pem', key = 'identity/key.pem', "
            "client_ca = 'identity/ca.pem'"
        )
    if listen.metrics_host not in LOOPBACK:
        raise InvalidConfig(
            f"{path}: listen.metrics_host {listen.metrics_host!r} is not loopback: metrics are open to all"
        )
